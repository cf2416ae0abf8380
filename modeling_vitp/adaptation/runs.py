"""Runs of commands in this process."""

import contextlib
import importlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..command.errors import RunStopped
from ..training.checkpointing import write_whole


def run_command(name: str, words: Sequence[str], log: Path, check: bool = True) -> None:
    """Run a command of this package in this process, and append what it prints to a file.

    Args:
        name: module of the command in `recipes`.
        words: arguments of the command.
        log: file of the output.
        check: whether an exit status other than 0, such as that of a failed gate, is an error.

    Raises:
        RunStopped: if the exit status is not 0 and `check` is true.
    """
    command = importlib.import_module(f"modeling_vitp.recipes.{name}").main
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        print(f"\n$ vitp {name} {shlex.join(words)}")
        status = command(list(words))
    if status and check:
        raise RunStopped(f"vitp {name} failed, see the end of {log}.", status)


def run_recipe(name: str, settings: dict[str, Any], output: Path, check: bool = True) -> dict[str, Any]:
    """Run or resume a command that writes `metrics.json`, and return the metrics.

    The configuration and the output of the command are kept beside its output folder.

    Args:
        name, check: as for [`run_command`].
        settings: configuration without `output_dir`.
        output: output folder.
    """
    path = config_of(output)
    write_config(path, settings | {"output_dir": str(output)})
    run_command(name, ["--config", str(path)], output.with_name(f"{output.name}.log"), check)
    return json.loads((output / "metrics.json").read_text())


def config_of(output: Path) -> Path:
    """Return the configuration file of [`run_recipe`]."""
    return output.with_name(f"{output.name}.yaml")


def write_config(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def remove_weights(folder: Path) -> None:
    """Remove the weights of a fine-tuned model, which is not needed any more."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def describe_seconds(seconds: float) -> str:
    """Return a duration such as `2 h 10 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(minutes, 1)} min"
