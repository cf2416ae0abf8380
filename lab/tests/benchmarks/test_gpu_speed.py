"""GPU utilization of training, from image files to the optimizer: `pytest -n 0 -m gpu`."""

import time

import pytest
import torch
from datasets import Image, load_dataset
from paths import AERIAL_TREES
from torch.utils.data import DataLoader

from lab.benchmarks.measuring import now
from lab.benchmarks.step_time import gemm_peak, options_of
from modeling_vitp import ViTPConfig, ViTPDataCollator, ViTPForConditionalGeneration, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.raw_tiles import normalize_tiles
from modeling_vitp.pretraining.loading import build_tokenizer
from modeling_vitp.training.config import default_device, has_fast_bf16
from modeling_vitp.training.costs import count_operations


def messages_of(row: dict) -> dict:
    answer = {"role": "assistant", "content": f"There are {len(row['boxes'])} trees."}
    return {"images": [row["image"]], "messages": [{"role": "user", "content": "How many trees are there?"}, answer]}


def speed_of_training(tmp_path, shape: str, batch_size: int, batches: int, workers: int, max_patches: int) -> dict:
    """Measure training steps on batches of real images, in bf16 where it is fast.

    Returns:
        `share`, the speed relative to bare matrix products, and `waiting`, the share of the time spent on the loader. A
        first pass over the same batches warms up and counts the operations.
    """
    device = default_device()
    trees = load_dataset(str(AERIAL_TREES), split="train", cache_dir=str(tmp_path)).cast_column("image", Image(False))
    rows = [{"id": str(n), **messages_of(trees[n % len(trees)])} for n in range(batch_size * batches)]
    config = ViTPConfig(**options_of(shape))
    height, width = config.vision_config.image_size
    image_processor = ViTPImageProcessor(size={"height": height, "width": width}, max_patches=max_patches)
    tokenizer = build_tokenizer(["How many trees are there? There are 12 trees."], vocab_size=400)
    processor = ViTPProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    config.image_token_id = processor.image_token_id
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75).with_raw_tiles()
    with device:
        model = ViTPForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    bf16 = has_fast_bf16()

    def step(batch: dict) -> int:
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        batch["pixel_values"] = normalize_tiles(batch["pixel_values"], processor.image_processor)
        batch["answer_labels"] = batch.pop("labels")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            (-model(**batch).log_probs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(batch["pixel_values"])

    pinned = device.type == "cuda"
    loader = DataLoader(
        rows, batch_size, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0, pin_memory=pinned
    )
    counter, waiting, tiles = count_operations(), 0.0, 0
    with counter:
        for batch in loader:
            step(batch)
    iterator = iter(loader)
    batch = next(iterator)  # starts the workers
    start = last = now()
    while batch is not None:
        tiles += step(batch)
        asked = now()
        batch = next(iterator, None)
        last = time.perf_counter()
        waiting += last - asked
    seconds = last - start
    patches = tiles * (1 + 4 * config.image_seq_length)
    peak = gemm_peak(config, patches // batches, torch.bfloat16 if bf16 else torch.float32, device)
    return {"share": counter.get_total_flops() / seconds / peak, "waiting": waiting / seconds}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it is the speed of a GPU")
def test_gpu_reaches_half_of_its_matrix_products(tmp_path):
    found = speed_of_training(tmp_path, "internvl2_5_1b", batch_size=8, batches=20, workers=8, max_patches=12)
    assert found["share"] >= 0.5 and found["waiting"] < 0.05, found


@pytest.mark.slow
def test_utilization_is_a_share_on_cpu(tmp_path):
    found = speed_of_training(tmp_path, "small", batch_size=2, batches=2, workers=0, max_patches=2)
    assert 0.05 < found["share"] < 1 and 0 < found["waiting"] < 1, found
