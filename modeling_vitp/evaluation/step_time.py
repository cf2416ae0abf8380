"""Time and peak memory of a training step: VRL beside plain transformers InternVL, on synthetic samples."""

import resource
import time

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ..configuration_vitp import ViTPConfig
from ..modeling_vitp import ViTPForConditionalGeneration
from ..training.run_config import has_fast_bf16
from ..vrl import draw_visual_tokens, keyed_generator

IMAGE_TOKEN_ID, TEXT_TOKENS, ANSWER_TOKENS = 7, 64, 32
SHAPES = {
    "small": {
        "vision": {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "image_size": [224, 224],
        },
        "text": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 2048,
            "vocab_size": 8192,
        },
    },
    "internvl2_5_1b": {  # InternViT-300M and Qwen2.5-0.5B
        "vision": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": [448, 448],
        },
        "text": {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151674,
        },
    },
}
CASES = {"transformers InternVL": None, "ViTP, r = 0": 0.0, "ViTP, r = 0.75": 0.75}


def build(shape: str, is_vitp: bool) -> torch.nn.Module:
    vision = SHAPES[shape]["vision"] | {"patch_size": [14, 14], "attention_bias": True}
    text = SHAPES[shape]["text"] | {"model_type": "qwen2", "tie_word_embeddings": False}
    options = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN_ID}
    torch.manual_seed(0)
    if is_vitp:
        return ViTPForConditionalGeneration(ViTPConfig(**options))
    return InternVLForConditionalGeneration(InternVLConfig(**options, tie_word_embeddings=False))


def make_batch(
    tokens_per_tile: int, image_size: list[int], tiles: int, batch_size: int, drop_ratio: float | None
) -> dict[str, torch.Tensor]:
    """Samples of `tiles` tiles; with a drop ratio the sequence is as short as the processor would make it."""
    full, kept, rows = tiles * tokens_per_tile, [], []
    for sample in range(batch_size):
        chosen = torch.arange(full)
        if drop_ratio:
            chosen = draw_visual_tokens(full, drop_ratio, generator=keyed_generator(0, sample, 0))
        kept.append(chosen + sample * full)
        after = torch.arange(full + 1, full + TEXT_TOKENS)
        rows.append(torch.cat([torch.zeros(1, dtype=torch.long), chosen + 1, after]))
    positions = torch.stack(rows)
    input_ids = torch.full_like(positions, 100)
    input_ids[:, 1 : 1 + len(kept[0])] = IMAGE_TOKEN_ID
    labels = input_ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(batch_size * tiles, 3, *image_size, generator=torch.Generator().manual_seed(0)),
    }
    if drop_ratio:
        batch |= {"position_ids": positions, "visual_token_indices": torch.cat(kept)}
    return batch


def time_steps(
    case: str, shape: str, tiles: int, batch_size: int, steps: int, gradient_checkpointing: bool = False
) -> dict:
    """Times of the steps in seconds, peak memory in GiB and the length of the sequence that the LM sees.

    Args:
        case: one of [`CASES`].
        shape: one of [`SHAPES`].
        tiles: of a sample, thumbnail included.
        batch_size: samples of a step.
        steps: that are timed, after one that is not.
    """
    drop_ratio = CASES[case]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = build(shape, drop_ratio is not None).to(device).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image_size = SHAPES[shape]["vision"]["image_size"]
    tokens_per_tile = (image_size[0] // 28) ** 2
    batch = make_batch(tokens_per_tile, image_size, tiles, batch_size, drop_ratio)
    batch = {name: values.to(device) for name, values in batch.items()}
    times = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bf16()):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"times": times[1:], "peak": peak, "length": batch["input_ids"].shape[1]}
