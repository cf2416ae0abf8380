"""Convert a checkpoint to another layout, exact to the bit.

    vitp convert OpenGVLab/InternVL2_5-1B my_model
    vitp convert ViTP_ViT.safetensors my_backbone
    vitp convert REPO my_backbone --file ckpts/ViTP_ViT_L_300M_rs.safetensors
    vitp convert my_model for_serving --to internvl
    vitp convert upernet_vit_adapter.safetensors my_segmentation
    vitp convert change_detector.safetensors my_change_detection --deformable_attention mmcv
    vitp convert cascade_rcnn.safetensors my_detector --benchmark dior

SOURCE is a Hub id, a folder or a safetensors file: a ViTP model, transformers' `internvl`, a checkpoint of InternVL's
own code (InternVL2.5, InternVL3), a ViT alone, a ViT-Adapter (ours or the original), or UPerNet or a two-stage detector
on one (ours or OpenMMLab's). The layout is recognized by the names of the tensors. Tensors are copied under new names,
one shard at a time, to a temporary folder that is moved into place at the end.
"""

import argparse
import json
import signal
import sys

from ..command import errors
from ..command.paths import check_paths
from .keys import BENCHMARK_NAMES, TARGETS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="vitp convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="Hub id, folder or safetensors file")
    parser.add_argument("target", help="folder to write, which must be new or empty")
    parser.add_argument("--to", choices=TARGETS, help="layout of the target; default: this package's, of all parts")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id; default: the main branch")
    parser.add_argument(
        "--file", help="safetensors file in a Hub repo of several checkpoints, such as ckpts/NAME.safetensors"
    )
    parser.add_argument("--license", help="license if the source states none, such as cc-by-nc-4.0")
    parser.add_argument(
        "--image_token_id",
        type=int,
        help="id of the image token, for an original checkpoint without tokenizer",
    )
    parser.add_argument(
        "--deformable_attention",
        choices=("native", "mmcv"),
        help="deformable attention in the training of an original ViT-Adapter; default: read from tensors and settings",
    )
    parser.add_argument(
        "--benchmark",
        choices=BENCHMARK_NAMES,
        help="benchmark of a published detector: sets its class names and the settings that its tensors do not show",
    )
    parser.add_argument(
        "--input_spec",
        type=json.loads,
        help="input spec of the image processor, as JSON; with band_names, weights for red, green and blue are spread",
    )
    parser.add_argument("--allow_nan", action="store_true", help="also convert weights that are NaN or infinite")
    args = errors.parse_arguments(parser, argv)
    check_paths([args])

    from .. import auto  # noqa: F401  (registered models are saved with their code)
    from .checkpoint import convert_checkpoint

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated, nothing was written."))
    target = convert_checkpoint(**vars(args))
    print(f"Converted {args.source} to {target}")


if __name__ == "__main__":
    errors.run_program(main)
