"""Command line of the fine-tunings."""

from collections.abc import Sequence

from ..training.command_line import load_plugins
from .base import TASKS
from .options import parse_options


def run_command(name: str, argv: Sequence[str] | None, description: str) -> int:
    """Parse the command line of a fine-tuning, and run it or print its estimated cost.

    Args:
        name: key of `TASKS`.
        argv: words of the command line, by default those of the process.
        description: docstring of the command.

    Returns:
        The exit status.
    """
    task = TASKS[name]
    options = parse_options(task, argv, description)

    # These import torch and transformers, which help and errors of the options do not need.
    from ..cards.sections import command_of
    from .fine_tuning import fine_tune
    from .plan import print_cost

    load_plugins(options.data.plugins)
    if options.data.dry_run:
        print_cost(task, options)
        return 0
    return fine_tune(task, options, command_of(f"finetune_{name}", argv)).status
