"""Step time and peak memory of training: VRL at r = 0 and r = 0.75 beside plain transformers InternVL.

    vitp benchmark --shape small
    vitp benchmark --shape internvl2_5_1b --steps 3

Each case runs in a process of its own (so that its peak memory is its own), on the same synthetic samples: tiles of
noise, a prompt and an answer. A step is forward, backward and AdamW. Case by case in turn, `--rounds` times; the table
has all steps, the shares of a step's time, peak memory of the process (resident on CPU, allocated on GPU), and the
operations a second of the model beside those of bare matrix products on the same machine (MFU).
"""

import argparse
import json
import statistics
import subprocess
import sys

import vitp_command
from modeling_vitp.training.arguments import not_negative, positive
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("small", "internvl2_5_1b"), default="small")
    parser.add_argument("--tiles", type=positive, default=7, help="tiles of a sample, thumbnail included (7)")
    parser.add_argument("--batch_size", type=positive, default=1, help="samples of a batch (1)")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of a process, after one that is not (5)")
    parser.add_argument("--rounds", type=positive, default=3, help="processes of each case (3)")
    parser.add_argument(
        "--checkpoint_every",
        type=not_negative,
        default=0,
        help="one layer of so many computes its activations again in the backward pass (0: none)",
    )
    parser.add_argument("--attn_implementation", choices=("sdpa", "eager"), default="sdpa", help="(sdpa)")
    parser.add_argument(
        "--adamw", choices=("fused", "foreach", "loop"), default="fused", help="how AdamW goes over the weights (fused)"
    )
    parser.add_argument("--torch_compile", action="store_true", help="layer by layer, as in training")
    parser.add_argument("--busy", type=not_negative, default=0, help="other processes that keep a core busy (0)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parse_words(parser, argv)

    from modeling_vitp.cards.sections import table
    from modeling_vitp.recipes.benchmarks.step_time import CASES, beside_busy, summary_row, time_steps

    settings = {name: value for name, value in vars(args).items() if name not in ("rounds", "busy")}
    if args.case:
        print(json.dumps(time_steps(**settings)))
        return 0

    words = sys.argv[1:] if argv is None else argv
    results = {case: [] for case in CASES}
    for round_ in range(args.rounds):
        for case in CASES:
            print(f"round {round_ + 1} of {args.rounds}: {case}", file=sys.stderr)
            command = [sys.executable, "-m", "modeling_vitp.recipes.benchmarks.benchmark", *words, "--case", case]
            with beside_busy(args.busy):
                process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[case].append(json.loads(process.stdout.splitlines()[-1]))
    every = [run for runs in results.values() for run in runs]
    print(f"{args.shape}: {args.batch_size} sample(s) of {args.tiles} tiles a step, {every[0]['dtype']}")
    gemm = {name: statistics.median(run["gemm"][name] for run in every) / 1e12 for name in every[0]["gemm"]}
    told = ", ".join(f"{name} {speed:.3g} TFLOP/s" for name, speed in gemm.items())
    print(f"matrix products of the model's shapes, alone: {told}")
    if args.torch_compile:
        first = {case: statistics.median(run["first"] for run in runs) for case, runs in results.items()}
        print("first step, in which layers are compiled:", ", ".join(f"{case} {s:.0f} s" for case, s in first.items()))
    for case, runs in results.items():
        parts = {name: statistics.median(run["parts"][name] for run in runs) for name in runs[0]["parts"]}
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        print(f"forward pass of {case}: {shares}")
    rows = [[case, *summary_row(runs, args.batch_size)] for case, runs in results.items()]
    header = "case, tokens the LM sees, s / step: min, median, max, forward, backward, optimizer, peak memory in GiB"
    print(table(f"{header}, TFLOP, of the matrix products' speed".split(", "), rows))
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
