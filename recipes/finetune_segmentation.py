"""Fine-tune a pretrained backbone for semantic segmentation.

    vitp finetune_segmentation --data_root my_fields --model_name_or_path my_backbone --output_dir outputs/fields
    vitp finetune_segmentation --config loveda --model_name_or_path my_backbone

A folder with images and masks of the same names needs no configuration. The configuration is a YAML file, and the
command line overrides its fields. If the command is started again with the same output folder, the run resumes from its
last checkpoint.
"""

import vitp_command
from modeling_vitp.tasks.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("segmentation", argv, __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
