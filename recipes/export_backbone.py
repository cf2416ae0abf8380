"""Export the backbone of a checkpoint.

vitp export_backbone outputs/quickstart my_backbone
vitp export_backbone outputs/quickstart my_timm_backbone --format timm
"""

import argparse

import vitp_command
from modeling_vitp.command.paths import check_new
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub id of a trained ViTP model with its processor.")
    parser.add_argument("output_dir", help="Output folder, which must not exist.")
    parser.add_argument(
        "--format",
        choices=("transformers", "timm"),
        default="transformers",
        help="Library that opens the folder. timm also accepts an exported backbone as CHECKPOINT.",
    )
    args = parse_words(parser, argv)
    check_new(args.output_dir)

    from modeling_vitp import export_backbone, export_timm
    from modeling_vitp.hub.upload import write_model_card

    export = export_timm if args.format == "timm" else export_backbone
    folder = export(args.checkpoint, args.output_dir)
    write_model_card("backbone", folder)
    print(f"The backbone is in {folder}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
