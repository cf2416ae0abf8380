"""Read all data of a mixture or a data set once, and report errors.

    vitp validate_data my_data
    vitp validate_data my_mixture.yaml --processor OpenGVLab/InternVL3-1B-hf
    vitp validate_data my_mixture.yaml --against path/to/test_images --card my_data/README.md
    vitp validate_data my_mixture.yaml --shard 3/8      one of eight processes or jobs; when all are finished:
    vitp validate_data my_mixture.yaml --merge 8

Writes `report.json` and `histograms.png` to `--output_dir` and prints a table. The exit status is 1 if a source cannot
be read or a row has an error: missing or unreadable images, a number of images that differs from that of the image
placeholders in the messages, empty answers, boxes outside the grid of 0 to 1000 or without area, more tokens than
`--max_length`, or, with `--against`, an image that is also in the test set.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitp_command
from modeling_vitp.command.settings import DropRate, NonNegativeInt, PositiveInt, option_type, read_mapping
from modeling_vitp.training.arguments import shard
from modeling_vitp.training.command_line import parse_words

if TYPE_CHECKING:
    from modeling_vitp import ViTPProcessor


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", help="Mixture file, recipe, or data set (folder, JSON or Hub id).")
    parser.add_argument(
        "--processor", help="Checkpoint whose tokenizer counts tokens. By default tokens are not counted."
    )
    parser.add_argument(
        "--max_length", type=option_type(PositiveInt), default=4096, help="Maximum sequence length in tokens (4096)."
    )
    parser.add_argument("--vrl_drop_ratio", type=option_type(DropRate), default=0.75, help="VRL drop ratio (0.75).")
    parser.add_argument(
        "--max_patches", type=option_type(PositiveInt), help="Default tiles per sample (that of the processor, or 12)."
    )
    parser.add_argument("--input_spec", help="Default input spec of sources as JSON (that of the processor).")
    parser.add_argument("--against", help="Test images: a folder, or a data set with the split --against_split.")
    parser.add_argument("--against_split", help="Split of the data set in --against (test).")
    parser.add_argument(
        "--answer_prior", action="store_true", help="Measure how well answers are guessed without images."
    )
    parser.add_argument(
        "--answer_prior_seconds",
        type=option_type(PositiveInt),
        default=120,
        help="Seconds of training per source for --answer_prior (120).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of --answer_prior (0).")
    parser.add_argument(
        "--num_workers",
        type=option_type(NonNegativeInt),
        default=os.cpu_count(),
        help="Number of processes (one per core).",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--shard", type=shard, metavar="I/N", help="Validate only part I of N parts of the rows.")
    parts.add_argument(
        "--merge", type=option_type(PositiveInt), metavar="N", help="Write the report of N finished shards."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/validation"), help="Output folder (%(default)s)."
    )
    parser.add_argument("--card", type=Path, help="Data set card that gets the result as a section.")
    return parse_words(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    from modeling_vitp.cards.sections import set_section
    from modeling_vitp.instructions.answer_prior import check_answer_priors
    from modeling_vitp.instructions.mixture import load_sources
    from modeling_vitp.instructions.validation import (
        card_text,
        draw_histograms,
        load_processor,
        merge_shards,
        print_reports,
        save_reports,
        validate,
        validate_shard,
    )

    mixture = load_sources(args.mixture)
    processor = load_processor(args.processor) if args.processor else None
    settings = settings_of(args)
    shard_folder = args.output_dir / "shards"
    if args.merge:
        reports = merge_shards(mixture, args.merge, settings, shard_folder)
    elif args.shard:
        reports = validate_shard(
            mixture,
            shard=args.shard,
            settings=settings,
            folder=shard_folder,
            **validation_options(args, processor),
        )
        print_reports(reports)
        print(f"Shard {args.shard}. When all are finished, run the same with --merge {args.shard.count} instead.")
        return 0
    else:
        reports = validate(mixture, **validation_options(args, processor))

    priors = ""
    if args.answer_prior:
        tokenizer = processor.tokenizer if processor else None
        priors = check_answer_priors(mixture.sources, reports, tokenizer, args.seed, args.answer_prior_seconds)

    passed = save_reports(reports, settings, args.output_dir / "report.json")
    max_length = args.max_length if args.processor else None
    draw_histograms(reports, max_length, args.output_dir / "histograms.png")
    print_reports(reports)
    print(priors)
    if args.card:
        section = card_text(reports, args.against)
        if priors:
            section += f"\n\n{priors}"
        set_section(args.card, "Validation", section)
    verdict = "Passed" if passed else "FAILED"
    print(f"{verdict}: {args.output_dir / 'report.json'}, histograms.png in the same folder")
    return 0 if passed else 1


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that are set, as texts for the report."""
    settings = {}
    for name, value in vars(args).items():
        is_part = name in ("shard", "merge")  # The reports of all shards have the same settings.
        if value is not None and not is_part:
            settings[name] = str(value)
    return settings


def validation_options(args: argparse.Namespace, processor: "ViTPProcessor | None") -> dict[str, Any]:
    """Return the arguments of `validate`, with the test images if there are any."""
    from modeling_vitp import ViTPImageProcessor
    from modeling_vitp.instructions.overlap import load_test_images
    from modeling_vitp.instructions.rows import SourceSettings

    options = {
        "max_length": args.max_length,
        "vrl_drop_ratio": args.vrl_drop_ratio,
        "max_patches": args.max_patches,
        "num_workers": args.num_workers,
        "processor": processor,
    }
    image_processor = processor.image_processor if processor else ViTPImageProcessor()
    if args.input_spec:
        input_spec = read_mapping("input_spec", args.input_spec)
        options["input_spec"] = input_spec
        image_processor = image_processor.with_input_spec(input_spec)
    if args.against:
        spec = SourceSettings().spec_for(image_processor)
        options["test_images"] = load_test_images(args.against, args.against_split, args.num_workers, spec)
    return options


if __name__ == "__main__":
    vitp_command.run(main)
