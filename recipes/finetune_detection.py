"""Fine-tune a pretrained backbone for detection of horizontal boxes, oriented boxes, or instances.

    vitp finetune_detection --data_root my_ships --model_name_or_path my_backbone --output_dir outputs/ships
    vitp finetune_detection --config dior_r --model_name_or_path my_backbone

A folder with COCO, VOC, DOTA, YOLO, GeoJSON or GeoPackage annotations needs no configuration. The configuration is a
YAML file, and the command line overrides its fields. If the command is started again with the same output folder, the
run resumes from its last checkpoint.
"""

import vitp_command
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.options import parse_options
from modeling_vitp.training.command_line import load_plugins


def main(argv: list[str] | None = None) -> int:
    task = TASKS["detection"]
    options = parse_options(task, argv, __doc__)

    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks.fine_tuning import fine_tune
    from modeling_vitp.tasks.plan import print_cost

    load_plugins(options.data.plugins)
    if options.data.dry_run:
        print_cost(task, options)
        return 0
    return fine_tune(task, options, command_of("finetune_detection", argv)).status


if __name__ == "__main__":
    vitp_command.run(main)
