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

import vitp_command
from modeling_vitp.command.settings import DropRate, NonNegativeInt, PositiveInt, option_type, read_mapping
from modeling_vitp.training.arguments import shard
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
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
    args = parse_words(parser, argv)

    from modeling_vitp import ViTPImageProcessor
    from modeling_vitp.cards.sections import set_section
    from modeling_vitp.instructions.answer_prior import check_answer_priors
    from modeling_vitp.instructions.mixture import load_sources
    from modeling_vitp.instructions.overlap import load_test_images
    from modeling_vitp.instructions.rows import SourceSettings
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
    own = {name: value for name, value in vars(args).items() if name not in ("shard", "merge") and value is not None}
    settings = {name: str(value) for name, value in own.items()}
    if args.merge:
        reports = merge_shards(mixture, args.merge, settings, args.output_dir / "shards")
    else:
        options = {name: getattr(args, name) for name in ("max_length", "vrl_drop_ratio", "max_patches")}
        options |= {"num_workers": args.num_workers, "processor": processor}
        image_processor = processor.image_processor if processor else ViTPImageProcessor()
        if args.input_spec:
            options["input_spec"] = read_mapping("input_spec", args.input_spec)
            image_processor = image_processor.with_input_spec(options["input_spec"])
        if args.against:
            spec = SourceSettings().spec_for(image_processor)
            options["test_images"] = load_test_images(args.against, args.against_split, args.num_workers, spec)
        if args.shard:
            output = {"settings": settings, "folder": args.output_dir / "shards"}
            print_reports(validate_shard(mixture, shard=args.shard, **output, **options))
            print(f"Shard {args.shard}. When all are finished, run the same with --merge {args.shard.count} instead.")
            return 0
        reports = validate(mixture, **options)

    priors = ""
    if args.answer_prior:
        tokenizer = processor.tokenizer if processor else None
        priors = check_answer_priors(mixture.sources, reports, tokenizer, args.seed, args.answer_prior_seconds)

    passed = save_reports(reports, settings, args.output_dir / "report.json")
    draw_histograms(reports, args.max_length if args.processor else None, args.output_dir / "histograms.png")
    print_reports(reports)
    print(priors)
    if args.card:
        set_section(args.card, "Validation", "\n\n".join(filter(None, [card_text(reports, args.against), priors])))
    print(f"{'Passed' if passed else 'FAILED'}: {args.output_dir / 'report.json'}, histograms.png in the same folder")
    return 0 if passed else 1


if __name__ == "__main__":
    vitp_command.run(main)
