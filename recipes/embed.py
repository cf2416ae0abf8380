"""Embed images, or the windows of large images, with a frozen backbone, and write Parquet or GeoParquet.

    vitp embed my_backbone folder_of_images --output embeddings.parquet
    vitp embed my_backbone scene.tif --output embeddings.parquet --window 224 --dtype float16

If an interrupted command is started again, the embedding resumes.
"""

import argparse

import vitp_command
from modeling_vitp.command.settings import NonNegativeInt, PositiveInt, option_type, read_mapping
from modeling_vitp.probing.arguments import POOLINGS
from modeling_vitp.training.arguments import shard
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="Folder or Hub id (also ID@REVISION) of an exported backbone, or of another model of AutoModel.")
    add("images", nargs="+", help="Image files, and folders with image files, also in subfolders.")
    add("--output", required=True, help="Output file (.parquet).")
    add(
        "--window",
        type=option_type(PositiveInt),
        help="Side in pixels of the windows that larger images are cut into: not cut.",
    )
    add("--stride", type=option_type(PositiveInt), help="Stride of the windows in pixels: the window.")
    add("--pooling", choices=POOLINGS, default="mean", help="Feature of an image: mean of the patch tokens.")
    add(
        "--image_size",
        type=option_type(PositiveInt),
        help="Side in pixels of the square that images and windows are resized to: as the image processor.",
    )
    add("--input_spec", help="Input spec of the images as JSON: by default that of the model.")
    add("--dtype", choices=("float32", "float16"), default="float32", help="Dtype of the embeddings: float32.")
    add(
        "--model_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="Dtype of the model: float32.",
    )
    add("--batch_size", type=option_type(PositiveInt), default=32, help="Number of images per batch: 32.")
    add(
        "--num_workers",
        type=option_type(NonNegativeInt),
        default=0,
        help="Number of processes that read images: the main process.",
    )
    add(
        "--bad_images",
        choices=("raise", "skip"),
        default="raise",
        help="Behavior on an image that cannot be read: 'raise' stops and names it, 'skip' logs it and leaves it out.",
    )
    add("--shard", type=shard, metavar="I/N", help="Embed only part I of N parts of the images.")
    add("--device", help="Device of the model: by default the accelerator, or cpu without one.")
    args = vars(parse_words(parser, argv))

    from modeling_vitp.probing.backbones import load_backbone
    from modeling_vitp.probing.embedding import embed_images
    from modeling_vitp.training.config import default_device

    if args["input_spec"] is not None:
        args["input_spec"] = read_mapping("input_spec", args["input_spec"])
    device = args.pop("device") or default_device()
    backbone = load_backbone(args.pop("model"), device, args.pop("model_dtype"))
    images, output = args.pop("images"), args.pop("output")
    number = embed_images(backbone, images, output, **args)
    if args["shard"] is None:
        print(f"{number} embeddings are in {output}")
    else:
        print(args["shard"].hint(f"{number} embeddings"))
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
