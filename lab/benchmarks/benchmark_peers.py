"""Compare speed with other libraries: features, large images, a fine-tuning step, conversion.

    python -m lab.benchmarks.benchmark_peers
    python -m lab.benchmarks.benchmark_peers --compare features conversion --shape vit_l --dtype bfloat16

In each comparison, all libraries compute the same result with the same random weights, which is checked before they are
timed; then they take turns, `--runs` times. The row of a library that is not installed names the package to install.
Times are wall-clock time and CPU time of this process, which depends less on other jobs on the machine.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from lab.command import run
from modeling_vitp.command.settings import PositiveInt, option_type
from modeling_vitp.training.command_line import parse_words

NAMES = ("features", "windows", "step", "conversion")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs="+", choices=NAMES, default=NAMES, help="Comparisons to run (all).")
    parser.add_argument("--shape", choices=("vit_s", "vit_l"), default="vit_s", help="Shape of the ViT (vit_s).")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="Dtype of the model (float32)."
    )
    parser.add_argument(
        "--runs", type=option_type(PositiveInt), default=5, help="Timed turns, after one warm-up turn (5)."
    )
    parser.add_argument(
        "--threads", type=option_type(PositiveInt), default=1, help="Threads of PyTorch on the CPU (1)."
    )
    args = parse_words(parser, argv)

    import torch

    from lab.benchmarks.comparison import (
        HEADER,
        compare_conversion,
        compare_features,
        compare_training_step,
        compare_windows,
        rows_of,
        take_turns,
    )
    from lab.benchmarks.measuring import describe_device
    from modeling_vitp.cards.sections import table
    from modeling_vitp.training.config import default_device

    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(f"{describe_device(default_device())}; {args.shape}, {args.dtype}")
    makers = dict(zip(NAMES, (compare_features, compare_windows, compare_training_step, compare_conversion)))
    for name in args.compare:
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            options = {"folder": Path(folder)} if name in ("windows", "conversion") else {}
            comparison = makers[name](args.shape, dtype, **options)
            rows = rows_of(comparison, take_turns(comparison, args.runs))
        print(f"\n{comparison.what}\n\n{table(HEADER, rows)}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
