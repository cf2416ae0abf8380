"""Step time and peak memory of training: VRL at r = 0 and r = 0.75 beside plain transformers InternVL.

    python recipes/benchmark.py --shape small
    python recipes/benchmark.py --shape internvl2_5_1b --steps 3

Each case runs in a process of its own (so that its peak memory is its own), on the same synthetic samples: tiles of
noise, a prompt and an answer. A step is forward, backward and AdamW. Case by case in turn, `--rounds` times; the table
gives the median over all steps, and peak memory of the process (resident on CPU, allocated on GPU).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration
from modeling_vitp.training.run import has_fast_bf16
from modeling_vitp.vrl import draw_visual_tokens, keyed_generator

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


def run_case(args: argparse.Namespace) -> dict:
    """Times of the steps in seconds, peak memory in GiB and the length of the sequence that the LM sees."""
    drop_ratio = CASES[args.case]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = build(args.shape, drop_ratio is not None).to(device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image_size = SHAPES[args.shape]["vision"]["image_size"]
    tokens_per_tile = (image_size[0] // 28) ** 2
    batch = make_batch(tokens_per_tile, image_size, args.tiles, args.batch_size, drop_ratio)
    batch = {name: values.to(device) for name, values in batch.items()}
    times = []
    for _ in range(1 + args.steps):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tiles", type=int, default=7, help="tiles of a sample, thumbnail included (7)")
    parser.add_argument("--batch_size", type=int, default=1, help="samples of a batch (1)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process, after one that is not (5)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each case (3)")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args)))
        return

    results = {case: [] for case in CASES}
    for round_ in range(args.rounds):
        for case in CASES:
            print(f"round {round_ + 1} of {args.rounds}: {case}", file=sys.stderr)
            command = [sys.executable, *sys.argv, "--case", case]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[case].append(json.loads(process.stdout.splitlines()[-1]))
    precision = "bf16" if has_fast_bf16() else "fp32"
    print(f"{args.shape}: {args.batch_size} sample(s) of {args.tiles} tiles a step, {precision}")
    print("| case | tokens the LM sees | s / step | peak memory, GiB |")
    print("|---|---|---|---|")
    for case, runs in results.items():
        seconds = statistics.median(value for run in runs for value in run["times"])
        peak = statistics.median(run["peak"] for run in runs)
        print(f"| {case} | {runs[0]['length'] * args.batch_size} | {seconds:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
