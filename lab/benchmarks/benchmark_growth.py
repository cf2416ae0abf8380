"""Measure how time and memory grow with the size of an image, of a stream and of an epoch.

    python -m lab.benchmarks.benchmark_growth
    python -m lab.benchmarks.benchmark_growth --sides 1000 2000 --rows --epochs

Each measurement runs in separate processes, `--runs` times. Times are median, minimum and maximum; memory is the peak
resident memory. The backbone is tiny, with random weights, so that image handling dominates: features of an image that
is resized to 224 pixels, as in `probe`, and windows of `predict_large`. Streams are read by one process, by two
processes, and by two processes with `split_streams`; a lost or repeated row is an error. Epochs are measured for the
sampler of training, which skips batches on resume, and for a mixture, whose rows are read.
"""

import argparse
import tempfile
from pathlib import Path

from lab.command import run
from modeling_vitp.command.settings import PositiveInt, option_type
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides, rows, epochs = [1000, 2000, 5000, 10000, 20000], [10000, 20000, 40000], [10**6, 10**7, 10**8]
    parser.add_argument(
        "--sides",
        type=option_type(PositiveInt),
        nargs="*",
        default=sides,
        help="Sides of the images in pixels; empty for none.",
    )
    parser.add_argument(
        "--rows", type=option_type(PositiveInt), nargs="*", default=rows, help="Rows of the streams; empty for none."
    )
    parser.add_argument(
        "--epochs", type=option_type(PositiveInt), nargs="*", default=epochs, help="Rows of the epochs; empty for none."
    )
    parser.add_argument("--runs", type=option_type(PositiveInt), default=5, help="Runs of each measurement (5).")
    args = parse_words(parser, argv)

    from lab.benchmarks import scaling

    def show(header: str, found) -> None:
        columns = header.split(", ")
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for cells in found:
            print(f"| {' | '.join(map(str, cells))} |", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.sides:
            show(
                "what, image, s of CPU a megapixel, peak memory in GiB",
                scaling.over_pixels(folder, args.sides, args.runs),
            )
        if args.rows:
            header = "what, rows, processes, µs of CPU a row, rows a second, peak memory in GiB"
            show(header, scaling.over_rows(folder, args.rows, args.runs))
        if args.epochs:
            header = "what, rows of an epoch, s of CPU to its first batch, for 1000 more, to go on from the middle, GiB"
            show(header, scaling.over_epochs(folder, args.epochs, args.runs))
    return 0


if __name__ == "__main__":
    run(main)
