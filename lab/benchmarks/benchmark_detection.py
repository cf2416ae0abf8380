"""Measure detection operators and training steps of detectors, compared with torchvision and transformers.

    python -m lab.benchmarks.benchmark_detection
    python -m lab.benchmarks.benchmark_detection --shapes vit_s vit_l --steps 5

The operators work on rotated boxes in one scene, those of torchvision on upright boxes with the same sides. A step is
forward, backward and AdamW on one image of noise, with random weights. All measurements run in one process, in turn.
"""

import argparse
import statistics
import sys

from lab.command import run
from modeling_vitp.command.settings import NonNegativeInt, PositiveInt, option_type
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=option_type(NonNegativeInt), default=5, help="Timed calls of each operator; 0 for none (5)."
    )
    parser.add_argument(
        "--shapes", nargs="*", choices=("vit_s", "vit_l"), default=["vit_s"], help="Shapes of the ViT (vit_s)."
    )
    parser.add_argument(
        "--image_size",
        type=option_type(PositiveInt),
        default=800,
        help="Side of the image in pixels, a multiple of 32 (800).",
    )
    parser.add_argument(
        "--steps",
        type=option_type(PositiveInt),
        default=5,
        help="Timed steps of each detector, after one warm-up step (5).",
    )
    parser.add_argument(
        "--threads", type=option_type(PositiveInt), default=1, help="Threads of PyTorch on the CPU (1)."
    )
    args = parse_words(parser, argv)
    if args.image_size % 32:
        parser.error(f"argument --image_size: expected a multiple of 32, got {args.image_size}")

    import torch

    from lab.benchmarks.detection_speed import DETECTORS, operators, time_calls, training_step
    from lab.benchmarks.measuring import describe_device
    from modeling_vitp.training.config import default_device, has_fast_bf16

    torch.set_num_threads(args.threads)
    device = default_device()
    precision = "bf16 autocast" if has_fast_bf16() else "float32"
    print(f"{describe_device(device)}; operators in float32, steps in {precision}")
    print("| what | runs | min, s | median, s | max, s |")
    print("|---|---|---|---|---|")

    def show(name: str, times: list[float]) -> None:
        numbers = " | ".join(f"{of(times):.3g}" for of in (min, statistics.median, max))
        print(f"| {name} | {len(times)} | {numbers} |", flush=True)

    if args.runs:
        for name, call in operators(device).items():
            show(name, time_calls(call, args.runs))
    for shape in args.shapes:
        for detector in DETECTORS:
            print(f"{shape}: {detector}", file=sys.stderr)
            times = time_calls(training_step(detector, shape, args.image_size, device), args.steps)
            show(f"step at {args.image_size}², {shape}, {detector}", times)
    return 0


if __name__ == "__main__":
    run(main)
