"""Measure step time and peak memory of training: VRL, dropped patches, and InternVL of transformers.

    python -m lab.benchmarks.benchmark --shape small
    python -m lab.benchmarks.benchmark --shape internvl2_5_1b --steps 3

Each case runs in a separate process, so that peak memory is measured per case, on the same synthetic samples: tiles of
noise, a prompt and an answer. A step is forward, backward and AdamW. The cases take turns, `--rounds` times. The table
shows the step times, the shares of forward, backward and optimizer, the peak memory of the process (resident on CPU,
allocated on GPU), and the operations a second relative to bare matrix products on the same machine (MFU).
"""

import argparse
import json
import statistics
import subprocess
import sys

from lab.command import run
from modeling_vitp.command.settings import NonNegativeInt, PositiveInt, option_type
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("small", "internvl2_5_1b"), default="small")
    parser.add_argument(
        "--tiles", type=option_type(PositiveInt), default=7, help="Tiles of a sample, including the thumbnail (7)."
    )
    parser.add_argument("--batch_size", type=option_type(PositiveInt), default=1, help="Samples of a batch (1).")
    parser.add_argument(
        "--steps",
        type=option_type(PositiveInt),
        default=5,
        help="Timed steps of a process, after one warm-up step (5).",
    )
    parser.add_argument("--rounds", type=option_type(PositiveInt), default=3, help="Processes of each case (3).")
    parser.add_argument(
        "--checkpoint_every",
        type=option_type(NonNegativeInt),
        default=0,
        help="Recompute the activations of every n-th layer in the backward pass (0: none).",
    )
    parser.add_argument(
        "--attn_implementation", choices=("sdpa", "eager"), default="sdpa", help="Attention implementation (sdpa)."
    )
    parser.add_argument(
        "--adamw", choices=("fused", "foreach", "loop"), default="fused", help="Implementation of AdamW (fused)."
    )
    parser.add_argument("--torch_compile", action="store_true", help="Compile each layer, as in training.")
    parser.add_argument(
        "--busy",
        type=option_type(NonNegativeInt),
        default=0,
        help="Number of other processes that keep a core busy (0).",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parse_words(parser, argv)

    from lab.benchmarks.step_time import CASES, beside_busy, summary_row, time_steps
    from modeling_vitp.cards.sections import table

    settings = {name: value for name, value in vars(args).items() if name not in ("rounds", "busy")}
    if args.case:
        print(json.dumps(time_steps(**settings)))
        return 0

    words = sys.argv[1:] if argv is None else argv
    results = {case: [] for case in CASES}
    for round_ in range(args.rounds):
        for case in CASES:
            print(f"round {round_ + 1} of {args.rounds}: {case}", file=sys.stderr)
            command = [sys.executable, "-m", "lab.benchmarks.benchmark", *words, "--case", case]
            with beside_busy(args.busy):
                process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[case].append(json.loads(process.stdout.splitlines()[-1]))
    every = [run for runs in results.values() for run in runs]
    print(f"{args.shape}: {args.batch_size} sample(s) of {args.tiles} tiles a step, {every[0]['dtype']}")
    gemm = {name: statistics.median(run["gemm"][name] for run in every) / 1e12 for name in every[0]["gemm"]}
    speeds = ", ".join(f"{name} {speed:.3g} TFLOP/s" for name, speed in gemm.items())
    print(f"bare matrix products of the model's shapes: {speeds}")
    if args.torch_compile:
        first = {case: statistics.median(run["first"] for run in runs) for case, runs in results.items()}
        print("first step, including compilation:", ", ".join(f"{case} {s:.0f} s" for case, s in first.items()))
    for case, runs in results.items():
        parts = {name: statistics.median(run["parts"][name] for run in runs) for name in runs[0]["parts"]}
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        print(f"forward pass of {case}: {shares}")
    rows = [[case, *summary_row(runs, args.batch_size)] for case, runs in results.items()]
    header = "case, tokens the LM sees, s / step: min, median, max, forward, backward, optimizer, peak memory in GiB"
    print(table(f"{header}, TFLOP, of the matrix products' speed".split(", "), rows))
    return 0


if __name__ == "__main__":
    run(main)
