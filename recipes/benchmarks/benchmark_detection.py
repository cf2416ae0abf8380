"""Time of the operators of detection and of training steps of detectors, beside torchvision's and transformers'.

    vitp benchmark_detection
    vitp benchmark_detection --shapes vit_s vit_l --steps 5

The operators work on rotated boxes in one scene, torchvision's on upright ones of the same sides. A step is forward,
backward and AdamW on one image of noise, with random weights. All of it runs in one process, one after another.
"""

import argparse
import platform
import statistics
import sys

import vitp_command
from modeling_vitp.training.arguments import not_negative, positive
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=not_negative, default=5, help="timed calls of each operator; 0 for none (5)")
    parser.add_argument("--shapes", nargs="*", choices=("vit_s", "vit_l"), default=["vit_s"], help="of ViTs (vit_s)")
    parser.add_argument("--image_size", type=positive, default=800, help="side of the image of a step (800)")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of each detector, after another one (5)")
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch on the CPU (1)")
    args = parse_words(parser, argv)
    if args.image_size % 32:
        parser.error(f"argument --image_size: {args.image_size} is no multiple of 32")

    import torch

    from modeling_vitp.recipes.benchmarks.detection_speed import (
        DETECTORS,
        device_here,
        operators,
        time_calls,
        training_step,
    )
    from modeling_vitp.training.vitp_config import has_fast_bf16

    torch.set_num_threads(args.threads)
    device = device_here()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} thread(s), {platform.machine()}"
    precision = "bf16 autocast" if has_fast_bf16() else "float32"
    print(f"{device.type}, {where}; PyTorch {torch.__version__}; operators in float32, steps in {precision}")
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
    vitp_command.run(main)
