r"""Fine-tune a pretrained backbone for image classification with one or several labels per image.

    vitp finetune_classification --data_root my_images --test_split test --model_name_or_path my_backbone \
        --output_dir outputs/my_classes

A folder has the images of each split and class, such as my_images/train/forest/1.png; a data set on the Hub has columns
`image` and `label`. The configuration is a YAML file, and the command line overrides its fields. If the command is
started again with the same output folder, the run resumes from its last checkpoint.
"""

import vitp_command
from modeling_vitp.tasks.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("classification", argv, __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
