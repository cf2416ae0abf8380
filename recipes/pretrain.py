"""Pretrain on visual instructions, from a vision-language model, a ViT with a language model, or random weights.

    vitp pretrain --config quickstart
    accelerate launch -m modeling_vitp.recipes.pretrain --config my_recipe.yaml --learning_rate 1e-5

The configuration is a YAML file, and the command line overrides its fields. If the command is started again with the
same output folder, the run resumes from its last checkpoint.
"""

import vitp_command
from modeling_vitp.pretraining.options import parse_options
from modeling_vitp.training.command_line import load_plugins


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv, __doc__)
    load_plugins(options.data.plugins)
    if options.data.dry_run:  # without the imports of a training, which take seconds
        from modeling_vitp.pretraining.plan import print_run

        print_run(options)
        return 0

    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.evaluation.pretraining import check_probe_data, score_run
    from modeling_vitp.pretraining.run import pretrain

    check_probe_data(options.data)  # an error after the training would be late
    return pretrain(options, score_run, command_of("pretrain", argv)).status


if __name__ == "__main__":
    vitp_command.run(main)
