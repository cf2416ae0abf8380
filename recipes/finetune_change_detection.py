"""Fine-tune a pretrained backbone for change detection on pairs of images of the same area.

    vitp finetune_change_detection --config levir_cd --model_name_or_path my_backbone

The options are those of finetune_segmentation. One backbone encodes both images, and the change class is scored.
"""

import vitp_command
from modeling_vitp.tasks.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("change_detection", argv, __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
