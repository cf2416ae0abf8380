"""Rows for a mixture from a public data set as it is downloaded; the sets of the paper's mixtures are known.

    vitp make_public_set                                      the sets, with rows, license and page
    vitp make_public_set dior_rsvg                            what is read of one, and where it can be had
    vitp make_public_set dior_rsvg data/remote_sensing/dior_rsvg

The last writes `data/remote_sensing/dior_rsvg.jsonl`, which `--config remote_sensing_paper` reads from there, and
`dior_rsvg.yaml`, a mixture of it alone. Images stay where they are.

A set of your own is a file of Python: `vitp make_public_set my_set.py DATA_DIR`.
"""

import argparse
from pathlib import Path

import vitp_command
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the set; without it all are listed")
    parser.add_argument("data_dir", nargs="?", type=Path, help="the folder that it was downloaded to")
    parser.add_argument("--output_dir", type=Path, help="for NAME.jsonl (the folder that DATA_DIR is in)")
    parser.add_argument("--keep_shared", action="store_true", help="also use images that are in a test split, too")
    args = parse_words(parser, argv)

    from modeling_vitp.recipes.datasets.public_set import (
        load_public_set,
        make_rows,
        print_result,
        print_set,
        print_sets,
    )

    if args.name is None:
        print_sets()
        return 0
    kind = load_public_set(args.name)
    if args.data_dir is None:
        print_set(kind, args.name)
        return 0
    if not args.data_dir.is_dir():
        parser.error(f"DATA_DIR {args.data_dir} is not a folder; {kind.title} can be had from {kind.obtain}.")
    print_result(kind, make_rows(kind(args.data_dir), args.output_dir or args.data_dir.parent, args.keep_shared))
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
