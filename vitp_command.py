"""The command `vitp`, and what each recipe imports first.

`import modeling_vitp` imports the models and registers them with transformers' Auto classes, which takes seconds. In a
process that has imported this module first, a command, both are left until its arguments are right (see
[`~modeling_vitp.training.command_line.parse`]), so that `--help` and mistakes are answered at once.
"""

import importlib
from collections.abc import Callable
from typing import NoReturn


def main() -> None:
    """Run the command `vitp` with the arguments of the process."""
    from modeling_vitp.__main__ import main as dispatch

    dispatch()


def run(recipe: Callable[[], int | None]) -> NoReturn:
    """Run a recipe as a program, see [`~modeling_vitp.training.command_line.run`]."""
    from modeling_vitp.training.command_line import run as run_program

    run_program(recipe)


if __name__ == "__main__":  # under its own name it would not be known as imported
    importlib.import_module("vitp_command").main()
