"""Fine-tune a pretrained backbone for detection of horizontal boxes, oriented boxes, or instances.

    vitp finetune_detection --data_root my_ships --model_name_or_path my_backbone --output_dir outputs/ships
    vitp finetune_detection --config dior_r --model_name_or_path my_backbone

A folder with COCO, VOC, DOTA, YOLO, GeoJSON or GeoPackage annotations needs no configuration. The configuration is a
YAML file, and the command line overrides its fields. If the command is started again with the same output folder, the
run resumes from its last checkpoint.
"""

import vitp_command
from modeling_vitp.tasks.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("detection", argv, __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
