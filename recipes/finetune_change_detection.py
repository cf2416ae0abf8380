"""Fine-tune a pretrained backbone for change detection on pairs of images of the same area.

    vitp finetune_change_detection --config levir_cd --model_name_or_path my_backbone

The options are those of finetune_segmentation. One backbone encodes both images, and the change class is scored.
"""

import vitp_command
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.options import parse_options
from modeling_vitp.training.command_line import load_plugins


def main(argv: list[str] | None = None) -> int:
    task = TASKS["change_detection"]
    options = parse_options(task, argv, __doc__)

    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks.fine_tuning import fine_tune
    from modeling_vitp.tasks.plan import print_cost

    load_plugins(options.data.plugins)
    if options.data.dry_run:
        print_cost(task, options)
        return 0
    return fine_tune(task, options, command_of("finetune_change_detection", argv)).status


if __name__ == "__main__":
    vitp_command.run(main)
