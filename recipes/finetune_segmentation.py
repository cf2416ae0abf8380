"""Fine-tune a pretrained backbone for semantic segmentation.

    vitp finetune_segmentation --data_root my_fields --model_name_or_path my_backbone --output_dir outputs/fields
    vitp finetune_segmentation --config loveda --model_name_or_path my_backbone

A folder with images and masks of the same names needs no configuration. The configuration is a YAML file, and the
command line overrides its fields. If the command is started again with the same output folder, the run resumes from its
last checkpoint.
"""

import vitp_command
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.options import parse_options
from modeling_vitp.training.command_line import load_plugins


def main(argv: list[str] | None = None) -> int:
    task = TASKS["segmentation"]
    options = parse_options(task, argv, __doc__)

    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks.fine_tuning import fine_tune
    from modeling_vitp.tasks.plan import print_cost

    load_plugins(options.data.plugins)
    if options.data.dry_run:
        print_cost(task, options)
        return 0
    return fine_tune(task, options, command_of("finetune_segmentation", argv)).status


if __name__ == "__main__":
    vitp_command.run(main)
