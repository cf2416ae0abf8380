"""Runs of the other commands in this process, with a function for each command.

Only this file builds command lines, writes configurations and imports recipes.
"""

import contextlib
import importlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from trl import ModelConfig

from ..command.errors import RunStopped, WrongArguments
from ..pretraining.arguments import SFT_MODULES, PretrainArguments, VRLArguments
from ..pretraining.config import ViTPTrainingConfig
from ..training.checkpointing import write_whole
from ..training.command_line import load_class, parse


def make_instructions(layout: str, root: Path, options: Mapping[str, Any], output: Path, seed: int) -> None:
    """Make instructions from labels by `vitp make_instructions`.

    Args:
        layout: layout of the labels.
        root: folder of the labels.
        options: further options. `names` is a dictionary, which is stored beside the output folder.
        output: output folder. The printed text is stored beside it.
        seed: seed of the questions.
    """
    words = [layout, str(root), "--output_dir", str(output), "--seed", str(seed)]
    for name, value in options.items():
        if name == "names":
            path = output.with_name("names.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(value))
            value = path
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    run_command("make_instructions", words, output.with_name(f"{output.name}.log"))


def parse_pretraining(
    settings: Mapping[str, Any], folder: Path
) -> tuple[PretrainArguments, ViTPTrainingConfig, ModelConfig]:
    """Return the arguments of `vitp pretrain` as the command parses them.

    Args:
        settings: configuration without `output_dir`.
        folder: folder for the configuration.

    Raises:
        ValueError: if a setting is wrong.
    """
    recipe = import_recipe("pretrain")
    path = folder / "pretrain.yaml"
    write_config(path, {**settings, "output_dir": str(folder)})
    own = PretrainArguments, VRLArguments, ModelConfig
    try:
        return parse(["--config", str(path)], recipe.__doc__, own, recipe.WHOLE, SFT_MODULES)
    except WrongArguments as error:
        raise ValueError(f"pretraining: {error} `vitp pretrain --help_all` lists the options.") from error


def run_pretraining(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run or resume `vitp pretrain`, and return its metrics, see [`run_recipe`]."""
    return run_recipe("pretrain", settings, output)


def check_fine_tuning(task: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise a `ValueError` if the command of a task does not accept a configuration.

    Args:
        task: name of the task.
        settings: configuration without steps and `output_dir`.
        folder: folder for the configuration.
    """
    name = f"finetune_{task}"
    recipe = import_recipe(name)
    path = folder / "fine_tune.yaml"
    write_config(path, {**settings, "max_steps": 1, "output_dir": str(folder)})
    own = [load_class(class_name) for class_name in recipe.WHOLE]
    try:
        parse(["--config", str(path)], recipe.__doc__, own, recipe.WHOLE)
    except WrongArguments as error:
        raise ValueError(f"fine_tuning: {error} `vitp {name} --help_all` lists the options.") from error


def estimate_fine_tuning(task: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Print the estimates of memory and time of a fine-tuning.

    Args:
        task: name of the task.
        settings: configuration without `output_dir`.
        folder: folder for the configuration.
    """
    path = folder / "fine_tune.yaml"
    write_config(path, {**settings, "output_dir": str(folder)})
    import_recipe(f"finetune_{task}").main(["--config", str(path), "--dry_run", "true"])


def run_fine_tuning(task: str, settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run or resume the fine-tuning of a task, and return its metrics, see [`run_recipe`]."""
    return run_recipe(f"finetune_{task}", settings, output)


def run_probe(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run `vitp probe`, and return its metrics, see [`run_recipe`]."""
    return run_recipe("probe", settings, output)


def run_vlm_evaluation(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run `vitp evaluate_vlm`, and return its metrics, see [`run_recipe`]."""
    return run_recipe("evaluate_vlm", settings, output)


def run_recipe(name: str, settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run or resume a command that writes `metrics.json`, and return the metrics.

    The configuration and the printed text of the command are kept beside its output folder.

    Args:
        name: module of the command in `recipes`.
        settings: configuration without `output_dir`.
        output: output folder.
    """
    path = output.with_name(f"{output.name}.yaml")
    write_config(path, {**settings, "output_dir": str(output)})
    run_command(name, ["--config", str(path)], output.with_name(f"{output.name}.log"))
    return json.loads((output / "metrics.json").read_text())


def run_command(name: str, words: Sequence[str], log: Path) -> None:
    """Run a command of this package in this process, and append its printed text to a file.

    Args:
        name: module of the command in `recipes`.
        words: arguments of the command.
        log: file of the printed text.

    Raises:
        RunStopped: if the exit status, such as that of a failed gate, is not 0.
    """
    command = import_recipe(name).main
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        print(f"\n$ vitp {name} {shlex.join(words)}")
        status = command(list(words))
    if status:
        raise RunStopped(f"vitp {name} failed, see the end of {log}.", status)


def import_recipe(name: str) -> ModuleType:
    return importlib.import_module(f"modeling_vitp.recipes.{name}")


def write_config(path: Path, settings: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def remove_weights(folder: Path) -> None:
    """Remove the weights of a fine-tuned model, which is not needed any more."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def describe_seconds(seconds: float) -> str:
    """Return a duration such as `2 h 10 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(minutes, 1)} min"
