"""Fine-tune a pretrained backbone for a task of a plugin.

    vitp finetune_NAME --plugins my_task.py --data_root my_data --model_name_or_path my_backbone

The Python file registers the task NAME. The configuration is a YAML file, and the command line overrides its fields. If
the command is started again with the same output folder, the run resumes from its last checkpoint.
"""

import argparse
import sys

import vitp_command
from modeling_vitp.command import errors
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.command import run_command
from modeling_vitp.training.command_line import load_plugins


def main(argv: list[str] | None = None) -> int:
    name, *words = sys.argv[1:] if argv is None else argv
    sys.argv = [f"vitp finetune_{name}", *words]  # by which help and errors name the command
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugins", nargs="+", default=[])
    plugins = parser.parse_known_args(words)[0].plugins
    load_plugins(plugins)  # first, because the task declares the other options
    if name not in TASKS:
        known_tasks = ", ".join(TASKS)
        errors.refuse(f"unknown task {name!r}. Tasks: {known_tasks}. Set --plugins to a file that registers it.")
    return run_command(name, words, __doc__)


if __name__ == "__main__":
    vitp_command.run(main)
