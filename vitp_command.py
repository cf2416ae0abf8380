"""Entry point of the command `vitp`, which each recipe imports first.

`import modeling_vitp` imports the models and registers them with transformers' Auto classes, which takes seconds. In a
process that imported this module first (a command), both are done only after the arguments are checked (see
[`~modeling_vitp.training.command_line.parse`]), so that `--help` and errors are shown immediately.
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


if __name__ == "__main__":  # sys.modules would have it as `__main__` only
    importlib.import_module("vitp_command").main()
