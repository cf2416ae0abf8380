"""Export the backbone of a checkpoint.

vitp export_backbone outputs/quickstart my_backbone
vitp export_backbone outputs/quickstart my_timm_backbone --format timm
vitp export_backbone llava-hf/llava-1.5-7b-hf my_eye
vitp export_backbone outputs/quickstart half_way --start outputs/quickstart/backbone_at_start --interpolation_alpha 0.5
"""

import argparse

import vitp_command
from modeling_vitp.command.paths import check_new
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        help="Folder or Hub id of a trained ViTP model with its processor, or of another vision-language model.",
    )
    parser.add_argument("output_dir", help="Output folder, which must not exist.")
    parser.add_argument(
        "--format",
        choices=("transformers", "timm"),
        default="transformers",
        help="Library that opens the folder. timm also accepts an exported backbone as CHECKPOINT.",
    )
    parser.add_argument("--start", help="Folder or Hub id of the ViT before the training, for --interpolation_alpha.")
    parser.add_argument(
        "--interpolation_alpha",
        type=float,
        metavar="ALPHA",
        help="Share of the way of the weights from the start (0) to the trained ViT (1), arXiv 2109.01903.",
    )
    args = parse_words(parser, argv)
    if (args.start is None) != (args.interpolation_alpha is None):
        parser.error("--start and --interpolation_alpha need each other.")
    if args.start is not None and args.format == "timm":
        parser.error("--start needs the format transformers. Export its folder for timm then.")
    check_new(args.output_dir)

    from modeling_vitp import export_backbone, export_timm
    from modeling_vitp.hub.upload import write_model_card

    if args.format == "timm":
        folder = export_timm(args.checkpoint, args.output_dir)
    elif args.start is not None:
        alpha = args.interpolation_alpha
        folder = export_backbone(args.checkpoint, args.output_dir, start=args.start, interpolation_alpha=alpha)
    else:
        folder = export_backbone(args.checkpoint, args.output_dir)
    write_model_card("backbone", folder)
    print(f"The backbone is in {folder}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
