"""Convert annotated images to instruction data: Parquet with images and conversations, and a data set card.

    vitp make_instructions voc DIOR --split train --output_dir dior_instructions
    vitp make_instructions dota DOTA --window 1024 --overlap 200 --collages 1 --output_dir dota_instructions
    vitp make_instructions masks LoveDA --output_dir loveda_instructions
    vitp make_instructions masks LoveDA --names loveda.json --output_dir loveda_instructions
    vitp make_instructions masks LoveDA --output_dir loveda_instructions --shard 3/8      then: --merge 8
    vitp make_instructions volumes Liver --names l.json --intensities -160 240 --output_dir liver_instructions

Layouts: `coco` (JSON), `voc` (XML), `dota` and `yolo` (text), `geojson` (GeoJSON or GeoPackage over GeoTIFFs),
`folders` (one per class), `table` (CSV, TSV or Parquet of classes), `masks` (image and mask of the same name),
`volumes` (NIfTI or DICOM with masks), `changes` (pairs with masks or captions). Only images of `--split` are used,
according to the layout or the file `--split_list`. Images whose file is also in the test split are skipped, and images
of the validation split too unless `--split` names it.
"""

import argparse
from pathlib import Path

import vitp_command
from modeling_vitp.command.settings import PositiveInt, add_options, option_type, read_mapping
from modeling_vitp.instructions.arguments import AnnotationOptions
from modeling_vitp.training.arguments import shard
from modeling_vitp.training.command_line import load_plugins, parse_words

# Options that questions drawn while training have too.
OPTIONS = (
    "split",
    "kinds",
    "turns",
    "wordings",
    "max_boxes",
    "map_side",
    "window",
    "overlap",
    "collages",
    "collage_grid",
    "collage_size",
    "on_error",
    "plane",
    "intensities",
    "percentiles",
    "class_property",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="Layout of the annotated data set: one of those below, or of a plugin.")
    parser.add_argument("root", type=Path, help="Folder of the annotated data set.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Output folder.")
    parser.add_argument("--split_list", type=Path, help="File with the names of the images to use, one per line.")
    parser.add_argument(
        "--annotations", type=Path, help="File or folder of the annotations, if the data set has several."
    )
    parser.add_argument(
        "--names",
        help="JSON, or a JSON file, with a phrase for each class, null to skip the class. Default: the name of the "
        "class in the annotation; for masks `class 1` …, and 0 or black is the background.",
    )
    add_options(parser, AnnotationOptions, OPTIONS)
    parser.add_argument("--seed", type=int, default=0, help="Random seed. Default: 0.")
    parser.add_argument("--license", help="License of images and annotations, for the card.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Hub id to upload the output folder to.")
    parser.add_argument(
        "--plugins", nargs="+", default=[], help="Python files that register layouts, see docs/extending.md."
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--shard", type=shard, metavar="I/N", help="Write only part I of N parts of the rows.")
    parts.add_argument(
        "--merge", type=option_type(PositiveInt), metavar="N", help="Write the card of N finished shards."
    )
    args = parse_words(parser, argv)
    load_plugins(args.plugins)
    try:
        AnnotationOptions(**{name: getattr(args, name) for name in OPTIONS})
    except ValueError as error:
        parser.error(str(error))
    return args


def options_of(args: argparse.Namespace) -> AnnotationOptions:
    """Return the options of the questions."""
    from modeling_vitp.data.annotation_files import read_annotation

    options = {name: getattr(args, name) for name in OPTIONS}
    options["layout"] = args.layout
    if args.split_list is not None:
        options["split_list"] = str(args.split_list)
    if args.annotations is not None:
        options["files"] = str(args.annotations)
    if args.names is not None:
        is_json = args.names.startswith("{")
        options["names"] = read_mapping("names", args.names) if is_json else read_annotation(Path(args.names))
    return AnnotationOptions(**options)


def command_of(args: argparse.Namespace) -> str:
    """Return the command that makes the instructions, with all options."""
    from modeling_vitp.cards.sections import portable_command

    options = vars(args).copy()
    words = [options.pop("layout"), str(options.pop("root"))]
    # These two do not change the rows.
    del options["push_to_hub"]
    del options["merge"]
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        else:
            words.append(str(value))
    return portable_command("make_instructions", words)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    from modeling_vitp.instructions.making import make_instructions
    from modeling_vitp.recipes import push_to_hub

    make_instructions(
        args.root,
        args.output_dir,
        options_of(args),
        seed=args.seed,
        license=args.license,
        shard=args.shard,
        merge=args.merge,
        command=command_of(args),
    )
    if args.push_to_hub and args.shard is None:
        return push_to_hub.main([str(args.output_dir), args.push_to_hub, "--what", "dataset", "--private"])
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
