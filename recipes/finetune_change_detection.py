"""Change detection from a pretrained backbone, on pairs of images of the same ground.

    vitp finetune_change_detection --config levir_cd --model_name_or_path my_backbone

As finetune_segmentation, with one backbone for both images of a pair and the scores of the change class.
"""

import vitp_command
from modeling_vitp.recipes import finetune_segmentation


def main(argv: list[str] | None = None) -> int:
    return finetune_segmentation.main(argv, "vitp_change_detection", __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
