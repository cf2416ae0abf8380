"""Runs of the library's functions, each with its settings and its printed text in files beside its output folder."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..command.errors import RunStopped
from ..evaluation.arguments import VLMArguments
from ..evaluation.pretraining import score_run
from ..evaluation.vlm import evaluate_vlm
from ..instructions.arguments import AnnotationOptions
from ..instructions.making import make_instructions
from ..pretraining.options import PretrainingOptions
from ..pretraining.options import make_options as make_pretraining_options
from ..pretraining.run import pretrain
from ..probing.arguments import ProbeArguments
from ..tasks import TASKS, FineTuningOptions
from ..tasks.fine_tuning import fine_tune
from ..tasks.options import make_options
from ..tasks.plan import print_cost
from ..tasks.probing import probe
from ..training.checkpointing import write_whole
from ..training.results import RunResult


def store_instructions(root: Path, options: Mapping[str, Any], output: Path, seed: int) -> None:
    """Make instructions about labels, see [`~modeling_vitp.instructions.making.make_instructions`].

    Args:
        root: folder of the labels.
        options: fields of [`~modeling_vitp.instructions.arguments.AnnotationOptions`].
        output: output folder.
        seed: seed of the questions.
    """
    with logged(output):
        annotation_options = AnnotationOptions(**options)
        make_instructions(root, output, annotation_options, seed)


def pretraining_options(settings: Mapping[str, Any], folder: Path) -> PretrainingOptions:
    """Return the options of a pretraining.

    Args:
        settings: configuration without `output_dir`.
        folder: output folder.

    Raises:
        ValueError: if a setting is wrong.
    """
    try:
        return make_pretraining_options({**settings, "output_dir": str(folder)})
    except ValueError as error:
        raise ValueError(f"pretraining: {error} `vitp pretrain --help_all` lists the options.") from error


def run_pretraining(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run or resume a pretraining, and return its metrics."""
    command = f"vitp pretrain --config {output.name}.yaml"
    with recorded(output, settings):
        options = pretraining_options(settings, output)
        result = pretrain(options, score_run, command)
    check_status(result, output)
    return read_metrics(output)


def fine_tuning_options(task: str, settings: Mapping[str, Any], folder: Path) -> FineTuningOptions:
    """Return the options of a fine-tuning.

    Args:
        task: name of the task.
        settings: configuration without `output_dir`.
        folder: output folder.

    Raises:
        ValueError: if a setting is wrong.
    """
    try:
        return make_options(TASKS[task], {**settings, "output_dir": str(folder)})
    except ValueError as error:
        raise ValueError(f"fine_tuning: {error} `vitp finetune_{task} --help_all` lists the options.") from error


def estimate_fine_tuning(task: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Print the estimates of memory and time of a fine-tuning."""
    options = fine_tuning_options(task, {**settings, "dry_run": True}, folder)
    print_cost(TASKS[task], options)


def run_fine_tuning(task: str, settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Run or resume the fine-tuning of a task, and return its metrics."""
    command = f"vitp finetune_{task} --config {output.name}.yaml"
    with recorded(output, settings):
        options = fine_tuning_options(task, settings, output)
        result = fine_tune(TASKS[task], options, command)
    check_status(result, output)
    return read_metrics(output)


def run_probe(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Probe frozen backbones, and return the metrics."""
    with recorded(output, settings):
        args = ProbeArguments(**settings, output_dir=str(output))
        probe(args)
    return read_metrics(output)


def run_vlm_evaluation(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Score the answers of a vision-language model, and return the metrics."""
    with recorded(output, settings):
        args = VLMArguments(**settings, output_dir=str(output))
        evaluate_vlm(args)
    return read_metrics(output)


@contextlib.contextmanager
def recorded(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Write the settings of a run beside its output folder, as its command reads them, and append what it prints."""
    output.parent.mkdir(parents=True, exist_ok=True)
    configuration = {**settings, "output_dir": str(output)}
    text = yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)
    write_whole(output.with_name(f"{output.name}.yaml"), text)
    with logged(output):
        yield


@contextlib.contextmanager
def logged(output: Path) -> Iterator[None]:
    """Append what is printed to a file beside an output folder."""
    path = output.with_name(f"{output.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, contextlib.redirect_stdout(log):
        yield


def check_status(result: RunResult, output: Path) -> None:
    """Raise a [`RunStopped`] if a run ended with another exit status than 0, such as that of a missed requirement."""
    if result.status:
        raise RunStopped(f"The run in {output} failed, see the end of {output}.log.", result.status)


def read_metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def remove_weights(folder: Path) -> None:
    """Remove the weights of a fine-tuned model, which is not needed any more."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def describe_seconds(seconds: float) -> str:
    """Return a duration such as `2 h 10 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{max(minutes, 1)} min"
