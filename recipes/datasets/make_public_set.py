"""Convert a downloaded public data set to rows for a mixture. The data sets of the paper's mixtures are included.

    vitp make_public_set                                            list the sets with title, license and page
    vitp make_public_set dior_rsvg                                  show the expected files and the download page
    vitp make_public_set dior_rsvg data/remote_sensing/dior_rsvg    convert

The last command writes `data/remote_sensing/dior_rsvg.jsonl`, which `--config remote_sensing_paper` reads, and
`dior_rsvg.yaml`, a mixture of this set alone. Images are not copied.

A data set of your own is a Python file: `vitp make_public_set my_set.py DATA_DIR`.
"""

import argparse
from pathlib import Path

import vitp_command
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="Name of the set. Default: list all sets.")
    parser.add_argument("data_dir", nargs="?", type=Path, help="Folder of the downloaded files.")
    parser.add_argument("--output_dir", type=Path, help="Folder for NAME.jsonl. Default: the parent of DATA_DIR.")
    parser.add_argument("--keep_shared", action="store_true", help="Keep rows on images that are also in a test split.")
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
        parser.error(f"DATA_DIR {args.data_dir} is not a folder. Download {kind.title} from {kind.obtain}.")
    output_dir = args.output_dir or args.data_dir.parent
    conversion = make_rows(kind(args.data_dir), output_dir, args.keep_shared)
    print_result(kind, conversion)
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
