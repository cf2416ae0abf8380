"""Time and peak memory of a training step with VRL and with InternVL of transformers, on synthetic samples."""

import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import compile_regions
from transformers import InternVLConfig, InternVLForConditionalGeneration

from lab.benchmarks.measuring import most_resident, now
from modeling_vitp.configuration_vitp import ViTPConfig
from modeling_vitp.modeling_vitp import ViTPForConditionalGeneration
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.pretraining.plan import INTERNVL2_5_1B, PARTS, BatchShape, step_cost
from modeling_vitp.training.config import default_device, has_fast_bf16
from modeling_vitp.vrl import draw_visible_tokens, draw_visual_tokens, flat_indices, keyed_generator

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
    "internvl2_5_1b": {"vision": INTERNVL2_5_1B["vision_config"], "text": INTERNVL2_5_1B["text_config"]},
}
# Drop ratios of VRL and of patches.
CASES = {
    "transformers InternVL": None,
    "ViTP, r = 0": (0.0, 0.0),
    "ViTP, r = 0.75": (0.75, 0.0),
    "ViTP, r = 0.75, half of the patches": (0.75, 0.5),
    "ViTP, r = 0.75, a quarter of the patches": (0.75, 0.75),
}


def options_of(shape: str) -> dict:
    vision = SHAPES[shape]["vision"] | {"patch_size": [14, 14], "attention_bias": True}
    text = SHAPES[shape]["text"] | {"model_type": "qwen2", "tie_word_embeddings": False}
    return {"vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN_ID}


def build_vlm(shape: str, is_vitp: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    if is_vitp:
        return ViTPForConditionalGeneration(ViTPConfig(**options_of(shape)))
    return InternVLForConditionalGeneration(InternVLConfig(**options_of(shape), tie_word_embeddings=False))


def make_batch(
    tokens_per_tile: int,
    image_size: list[int],
    tiles: int,
    batch_size: int,
    drop_ratio: float,
    patch_drop_ratio: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return a batch of samples with `tiles` tiles. A drop ratio shortens the sequence as the processor does."""
    full, kept, rows, visible = tiles * tokens_per_tile, [], [], []
    for sample in range(batch_size):
        generator = keyed_generator(0, sample, 0, "patches")
        visible.append(draw_visible_tokens(tiles, tokens_per_tile, patch_drop_ratio, generator))
        chosen = flat_indices(visible[-1], tokens_per_tile)
        if drop_ratio:
            chosen = draw_visual_tokens(
                full, drop_ratio, generator=keyed_generator(0, sample, 0), visible_indices=chosen
            )
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
    if drop_ratio or patch_drop_ratio:
        batch |= {"position_ids": positions, "visual_token_indices": torch.cat(kept)}
    if patch_drop_ratio:
        batch["visible_token_indices"] = torch.cat(visible)
    return batch


@contextmanager
def beside_busy(number: int) -> Iterator[None]:
    """Keep `number` cores busy with other processes of the same priority."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def time_steps(
    case: str,
    shape: str,
    tiles: int,
    batch_size: int,
    steps: int,
    checkpoint_every: int = 0,
    torch_compile: bool = False,
    attn_implementation: str = "sdpa",
    adamw: str = "fused",
) -> dict:
    """Measure training steps of one case.

    Args:
        case: a key of [`CASES`].
        shape: a key of [`SHAPES`].
        tiles: tiles of a sample, including the thumbnail.
        batch_size: samples of a step.
        steps: timed steps, after one warm-up step.
        checkpoint_every: as for [`step_cost`].
        torch_compile: whether to compile each layer, as in training.
        attn_implementation: "sdpa" or "eager".
        adamw: "fused" (the default of the trainer), "foreach" or "loop".

    Returns:
        A dictionary with `times` of the steps in seconds and their `forward` and `backward` times; the time of the
        `first` step, which includes compilation; `parts`, the seconds of each part of the model in another forward
        pass; `peak` memory in GiB; `length` of the sequence; floating-point `operations` of a step without
        recomputation; `dtype` of the matrix products; and `gemm`, the operations a second of a matrix product in each
        fast dtype.
    """
    is_vitp = CASES[case] is not None
    ratios = CASES[case] or (0.0, 0.0)
    device = default_device()
    model = build_vlm(shape, is_vitp).to(device).train()
    if not is_vitp:
        from trl.trainer.utils import add_fused_lm_head  # since TRL 1.15

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # the same as in TRL's trainer
    if checkpoint_every:
        checkpoint_activations(model, checkpoint_every)
    model.set_attn_implementation(attn_implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=adamw == "fused", foreach=adamw == "foreach")
    image_size = SHAPES[shape]["vision"]["image_size"]
    tokens_per_tile = (image_size[0] // 28) ** 2
    batch = make_batch(tokens_per_tile, image_size, tiles, batch_size, *ratios)
    batch = {name: values.to(device) for name, values in batch.items()}
    if is_vitp:
        batch["answer_labels"] = batch.pop("labels")
    else:
        batch["fused_lm_head"] = True
    if torch_compile:
        model = compile_regions(model, backend="inductor", dynamic=True)
    bf16, clock = has_fast_bf16(), []

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return -model(**batch).log_probs.sum() / (batch_size * ANSWER_TOKENS)

    for _ in range(1 + steps):
        marks = [now()]
        loss = forward()
        marks.append(now())
        loss.backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad()
        clock.append([*marks, now()])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = most_resident()
    scored = ANSWER_TOKENS if is_vitp or device.type == "cuda" else batch["input_ids"].shape[1] - 1
    samples = BatchShape(batch_size, tiles, TEXT_TOKENS, ratios[0], scored, patch_drop_ratio=ratios[1])
    config = ViTPConfig(**options_of(shape))
    rows = batch["pixel_values"].shape[0] * (1 + 4 * tokens_per_tile)
    return {
        "first": clock[0][3] - clock[0][0],
        "times": [marks[3] - marks[0] for marks in clock[1:]],
        "forward": [marks[1] - marks[0] for marks in clock[1:]],
        "backward": [marks[2] - marks[1] for marks in clock[1:]],
        "parts": seconds_of_parts(model, forward),
        "peak": peak,
        "length": batch["input_ids"].shape[1],
        "operations": step_cost(config, samples).operations,
        "dtype": "bfloat16" if bf16 else "float32",
        "gemm": {
            name: gemm_peak(config, rows, getattr(torch, name), device)
            for name in ("float32", *(["bfloat16"] if bf16 else []))
        },
    }


def seconds_of_parts(model: torch.nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of ViT, projector, language model, and the rest (head, loss, merging) of one forward pass."""
    seconds, handles = dict.fromkeys(PARTS, 0.0), []
    for part, name in PARTS.items():

        def begin(*_, part=part) -> None:
            seconds[part] -= now()

        def end(*_, part=part) -> None:
            seconds[part] += now()

        module = model.get_submodule(name)
        first, last = module, module
        if part == "ViT":  # The ViT itself is not called if patches are dropped.
            first, last = module.embeddings, module.layernorm
        handles += [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    start = now()
    forward()
    whole = now() - start
    for handle in handles:
        handle.remove()
    return {**seconds, "head and loss": whole - sum(seconds.values())}


def summary_row(runs: list[dict], batch_size: int) -> list[str]:
    """Return the table row of a case from the results of [`time_steps`] in several processes."""
    every = {name: [value for run in runs for value in run[name]] for name in ("times", "forward", "backward")}
    median = statistics.median(every["times"])
    shares = [statistics.median(every[name]) / median for name in ("forward", "backward")]
    speed = runs[0]["operations"] / median / statistics.median(run["gemm"][run["dtype"]] for run in runs)
    return [
        str(runs[0]["length"] * batch_size),
        *(f"{value:.2f}" for value in (min(every["times"]), median, max(every["times"]))),
        *(f"{share:.0%}" for share in (*shares, 1 - sum(shares))),
        f"{statistics.median(run['peak'] for run in runs):.1f}",
        f"{runs[0]['operations'] / 1e12:.3g}",
        f"{speed:.0%}",
    ]


def gemm_peak(config: ViTPConfig, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second of the largest matrix products in ViT and language model, the faster of both.

    This speed is an upper limit for a training step. Each of the two products is repeated for about a second.

    Args:
        rows: number of tokens in one product.
    """
    best = 0.0
    for part in (config.vision_config, config.text_config):
        left = torch.randn(rows, part.hidden_size, device=device).to(dtype)
        right = torch.randn(part.hidden_size, part.intermediate_size, device=device).to(dtype)
        left @ right
        start, runs = now(), 0
        while now() - start < 1:
            for _ in range(math.ceil(1e9 / (2 * rows * right.numel()))):
                left @ right
                runs += 1
        best = max(best, 2 * runs * rows * right.numel() / (now() - start))
    return best
