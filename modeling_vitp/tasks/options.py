"""Options of a fine-tuning, from the command line or from a mapping."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..training.command_line import parse, read_settings
from .base import FineTuningOptions, Task

INHERITED = ("transformers.training_args",)  # module with the fields of transformers' training arguments


def parse_options(task: Task, argv: Sequence[str] | None, description: str) -> FineTuningOptions:
    """Parse the command line of a fine-tuning, see [`~modeling_vitp.training.command_line.parse`].

    Args:
        task: object of `TASKS`.
        argv: words of the command line, by default those of the process.
        description: docstring of the command.

    Raises:
        WrongArguments: if an option is unknown or has a wrong value.
    """
    recipe_classes = (task.arguments, task.settings, task.start)
    data, training, start = parse(argv, description, recipe_classes, classes_of(task), INHERITED)
    return FineTuningOptions(data, training, start)


def make_options(task: Task, settings: Mapping[str, Any]) -> FineTuningOptions:
    """Return the options of a fine-tuning from a mapping, which may be a configuration of the command.

    Args:
        task: object of `TASKS`.
        settings: fields of `task.arguments`, of the training arguments of the task, and of `task.start`.

    Raises:
        ValueError: if a field is unknown or has a wrong value.
    """
    data, training, start = read_settings(settings, classes_of(task))
    return FineTuningOptions(data, training, start)


def classes_of(task: Task) -> list[str]:
    """Return the full names of the classes of the options."""
    arguments = f"{task.arguments.__module__}.{task.arguments.__qualname__}"
    start = f"{task.start.__module__}.{task.start.__qualname__}"
    return [arguments, task.training_config, start]
