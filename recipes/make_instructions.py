"""Convert annotated images to instruction data: Parquet with images and conversations, and a data set card.

    vitp make_instructions voc DIOR --split train --output_dir dior_instructions
    vitp make_instructions dota DOTA --window 1024 --overlap 200 --collages 1 --output_dir dota_instructions
    vitp make_instructions masks LoveDA --names loveda.json --output_dir loveda_instructions
    vitp make_instructions masks LoveDA --output_dir loveda_instructions --shard 3/8      then: --merge 8
    vitp make_instructions volumes Liver --names l.json --intensities -160 240 --output_dir liver_instructions

Layouts: `coco` (JSON), `voc` (XML), `dota` and `yolo` (text), `geojson` (GeoJSON or GeoPackage over GeoTIFFs),
`folders` (one per class), `masks` (image and mask of the same name), `volumes` (NIfTI or DICOM with masks), `changes`
(pairs with masks or captions). Only images of `--split` are used, according to the layout or the file `--split_list`.
Images whose file is also in the test split are skipped, and images of the validation split too unless `--split` names
it.
"""

import argparse
from pathlib import Path

import vitp_command
from modeling_vitp.training.arguments import not_negative, positive, shard, within
from modeling_vitp.training.command_line import load_plugins, parse_words


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="Layout of the annotated data set: one of those below, or of a plugin.")
    parser.add_argument("root", type=Path, help="Folder of the annotated data set.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Output folder.")
    parser.add_argument("--split", default="train", help="Split to use (train).")
    parser.add_argument("--split_list", type=Path, help="File with the names of the images to use, one per line.")
    parser.add_argument(
        "--annotations", type=Path, help="File or folder of the annotations, if the data set has several."
    )
    parser.add_argument("--names", type=Path, help="JSON file with a phrase for each class, null to skip the class.")
    parser.add_argument("--kinds", nargs="+", help="Kinds of questions. By default all that the annotations answer.")
    parser.add_argument("--turns", type=positive, default=5, help="Maximum number of questions per image (5).")
    parser.add_argument("--wordings", type=positive, help="Number of wordings of a kind of question. By default all.")
    parser.add_argument("--max_boxes", type=positive, default=20, help="Maximum number of boxes per answer (20).")
    parser.add_argument("--map_side", type=positive, default=7, help="Number of cells per side of a map (7).")
    parser.add_argument("--window", type=positive, help="Side of the windows of larger images in pixels.")
    parser.add_argument("--overlap", type=not_negative, default=0, help="Overlap of windows in pixels (0).")
    parser.add_argument(
        "--collages", type=within("[0, inf)", float), default=0, help="Number of collages per image or window (0)."
    )
    parser.add_argument(
        "--collage_grid",
        type=within("[2, 16]"),
        nargs="+",
        default=[7],
        help="Number of pieces per side of a collage (7).",
    )
    parser.add_argument("--collage_size", type=positive, default=448, help="Side of a collage in pixels (448).")
    parser.add_argument("--seed", type=int, default=0, help="Random seed (0).")
    parser.add_argument(
        "--on_error", choices=("raise", "skip"), default="raise", help="Behavior on bad annotations (raise)."
    )
    parser.add_argument("--license", help="License of images and annotations, for the card.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Hub id to upload the output folder to.")
    parser.add_argument(
        "--plane", choices=("axial", "coronal", "sagittal"), help="Plane of the slices of volumes (axial)."
    )
    parser.add_argument("--intensities", type=float, nargs=2, help="Intensities shown as black and white.")
    parser.add_argument(
        "--percentiles",
        type=within("[0, 100]", float),
        nargs=2,
        help="Percentiles of each volume shown as black and white.",
    )
    parser.add_argument(
        "--class_property",
        help="Property of GeoJSON or GeoPackage with the class (the first of class, label, category, name, type).",
    )
    parser.add_argument(
        "--plugins", nargs="+", default=[], help="Python files that register layouts, see tests/README.md."
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--shard", type=shard, metavar="I/N", help="Write only part I of N parts of the rows.")
    parts.add_argument("--merge", type=positive, metavar="N", help="Write the card of N finished shards.")
    args = parse_words(parser, argv)
    load_plugins(args.plugins)

    from modeling_vitp.data.layouts import LAYOUTS
    from modeling_vitp.instructions.from_annotations.pipeline import option_error
    from modeling_vitp.instructions.from_annotations.questions import PHRASINGS

    if error := option_error(args):
        parser.error(error)
    args.kinds = args.kinds or list(PHRASINGS[LAYOUTS[args.layout].subject])
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    from modeling_vitp.instructions.from_annotations.pipeline import build_instructions
    from modeling_vitp.instructions.from_annotations.storage import (
        check_shards,
        encode_rows,
        save_rows,
        stored_split,
        write_card,
    )
    from modeling_vitp.recipes import push_to_hub

    made, split = build_instructions(args), stored_split(args.split)
    rows = made.rows
    if args.shard:
        part = [rows[place] for place in args.shard.part(len(rows))]
        save_rows(encode_rows(part), args.output_dir, split, args.shard)
        print(f"Shard {args.shard}: {len(part)} of {len(rows)} rows in {args.output_dir}", end=". ")
        print(f"When all shards are finished, run the same command with --merge {args.shard.count} instead of --shard.")
        return 0
    if args.merge:
        check_shards(args.output_dir, split, args.merge, len(rows))
    else:
        save_rows(encode_rows(rows), args.output_dir, split)
    write_card(args, made)
    questions = sum(map(len, made.conversations))
    print(f"{len(rows)} rows and {questions} questions are in {args.output_dir}, see README.md there.")
    if args.push_to_hub:
        return push_to_hub.main([str(args.output_dir), args.push_to_hub, "--what", "dataset", "--private"])
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
