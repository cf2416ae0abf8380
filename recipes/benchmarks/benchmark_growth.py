"""How time and memory grow with the pixels of an image, the rows of a stream and the rows of an epoch.

    vitp benchmark_growth
    vitp benchmark_growth --sides 1000 2000 --rows --epochs

Each measurement has processes of its own, whose peak of resident memory is told, and is taken `--runs` times: times are
median, least and most. The backbone is tiny, with random weights, so that what grows is the handling: features of an
image that is brought to 224 pixels, as in `probe`, and windows of `predict_large`. Streams are read by one process and
by two, as in training, and by two of which each reads its part (`split_streams`); a row that is lost or comes twice is
an error. An epoch is that of the sampler of training, which skips batches to go on from a checkpoint, and that of a
mixture, whose rows are read.
"""

import argparse
import tempfile
from pathlib import Path

import vitp_command
from modeling_vitp.training.arguments import positive
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides, rows, epochs = [1000, 2000, 5000, 10000, 20000], [10000, 20000, 40000], [10**6, 10**7, 10**8]
    parser.add_argument("--sides", type=positive, nargs="*", default=sides, help="of images, in pixels; none for none")
    parser.add_argument("--rows", type=positive, nargs="*", default=rows, help="of streams")
    parser.add_argument("--epochs", type=positive, nargs="*", default=epochs, help="rows of epochs")
    parser.add_argument("--runs", type=positive, default=5, help="of each measurement")
    args = parse_words(parser, argv)

    from modeling_vitp.recipes.benchmarks import scaling

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
    vitp_command.run(main)
