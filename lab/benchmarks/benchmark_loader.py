"""Measure images a second of the data loader, compared with bare decode and resize, and with TRL's collator.

    python -m lab.benchmarks.benchmark_loader --workers 2
    python -m lab.benchmarks.benchmark_loader --mixture my_mixture.yaml --processor outputs/my_run

The collators use the same data loader with the same workers, in turn, `--rounds` times. The bare collator decodes an
image and resizes it to the canvas of its tiles and to the thumbnail, the pixels that the model sees. TRL's collator
uses transformers' InternVL processor with the same tiles. Ours is that of training, where the device normalizes tiles.
Without a mixture, the images are JPEG files of noise and gradients, with one size or several from 600 x 400 to
1024 x 768.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from lab.command import run
from modeling_vitp.command.settings import DropRate, NonNegativeInt, PositiveInt, option_type
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--mixture", help="Mixture file of local sources. Default: synthetic images.")
    data.add_argument(
        "--side", type=option_type(PositiveInt), help="Side of the synthetic images in pixels. Default: several sizes."
    )
    parser.add_argument("--processor", help="Folder or Hub id of a ViTPProcessor. Default: 448 pixels, 12 tiles.")
    parser.add_argument("--rows", type=option_type(PositiveInt), default=160, help="Rows of a pass (160).")
    parser.add_argument(
        "--workers", type=option_type(NonNegativeInt), default=2, help="Worker processes of the data loader (2)."
    )
    parser.add_argument("--batch_size", type=option_type(PositiveInt), default=4, help="Rows of a batch (4).")
    parser.add_argument("--vrl_drop_ratio", type=option_type(DropRate), default=0.75, help="Drop ratio of VRL (0.75).")
    parser.add_argument("--rounds", type=option_type(PositiveInt), default=3, help="Passes of each collator (3).")
    args = parse_words(parser, argv)

    from lab.benchmarks.loading_speed import (
        bare_collator,
        images_per_second,
        seconds_by_part,
        stock_collator,
        synthetic_mixture,
    )
    from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
    from modeling_vitp.instructions.mixture import load_mixture, open_mixture
    from modeling_vitp.pretraining.loading import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        mixture = load_mixture(args.mixture or synthetic_mixture(Path(folder), args.rows, args.side))
        dataset = open_mixture(mixture, seed=0)
        dataset = [dataset[index] for index in range(min(args.rows, len(dataset)))]
        num_images = sum(len(row["images"]) for row in dataset)
        if args.processor:
            processor = ViTPProcessor.from_pretrained(args.processor)
        else:
            tokenizer = build_tokenizer(["How many ships are in the harbor? There are 4 ships."], vocab_size=400)
            processor = ViTPProcessor(ViTPImageProcessor(), tokenizer)
        settings = {source.name: source for source in mixture.sources}
        ours = ViTPDataCollator(processor, vrl_drop_ratio=args.vrl_drop_ratio, source_settings=settings)
        collators = {
            "decode and resize": bare_collator(processor),
            "TRL's collator, transformers' InternVL processor": stock_collator(processor),
            "ViTP": ours.with_raw_tiles(),
        }
        rates, loading = {name: [] for name in collators}, (args.batch_size, args.workers)
        for _ in range(args.rounds):
            for name, collator in collators.items():
                rates[name].append(images_per_second(dataset, collator, *loading, num_images))
        seconds = seconds_by_part(ours, dataset, args.batch_size)
    print(f"{num_images} images, {args.workers} workers, batches of {args.batch_size}, {args.rounds} passes")
    print("| images / s | min | median | max | of decode and resize |\n|---|---|---|---|---|")
    bare = statistics.median(rates["decode and resize"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {min(values):.1f} | {median:.1f} | {max(values):.1f} | {median / bare:.2f} |")
    print("\n| part, of ViTP in one process | ms an image |\n|---|---|")
    for name, total in seconds.items():
        print(f"| {name} | {1000 * total / num_images:.2f} |")
    return 0


if __name__ == "__main__":
    run(main)
