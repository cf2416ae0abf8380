"""Takes the backbone out of a checkpoint.

python recipes/export_backbone.py outputs/quickstart my_backbone
"""

import argparse

from modeling_vitp import export_backbone
from modeling_vitp.cards.record import copy_record
from modeling_vitp.hub.contents import write_card


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a trained ViTP model with its processor")
    parser.add_argument("output_dir", help="folder to write the backbone and its image processor to")
    args = parser.parse_args()
    folder = export_backbone(args.checkpoint, args.output_dir)
    copy_record(args.checkpoint, folder)
    write_card("backbone", folder)
    print(f"The backbone is in {folder}")


if __name__ == "__main__":
    main()
