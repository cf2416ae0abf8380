"""Steps of pretraining and fine-tuning runs: train, save, score, draw, push, and print the results.

Results are saved before the next step that may fail: weights, then the backbone, then each score.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch.utils.data import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from ..auto.registry import find_model
from ..cards.model_card import headlines
from ..cards.record import copy_record
from ..hub.upload import write_model_card
from ..metrics.report import without_nan
from .base_trainer import BaseTrainer
from .checkpointing import attempt, stop_on_full_disk, write_whole
from .freezing import lora_rank

logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """Result of a finished run.

    Args:
        metrics: content of `metrics.json`.
        status: exit status of the command: 1 if a requirement is not met, or a picture, a card or a push failed.
    """

    metrics: dict[str, Any]
    status: int = 0


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets, so that only one bar moves at a time."""
    shown = [library for library in (transformers_logging, datasets) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def train(trainer: BaseTrainer, **counted: Any) -> dict[str, Any]:
    """Train or resume a run, and save the weights; for pretraining also the backbone, and LoRA in `adapter`.

    Without a `train_dataset`, nothing is trained or saved.

    Args:
        counted: further entries of the metrics, such as numbers of training samples.

    Returns:
        The metrics, in all processes.

    Raises:
        ValueError: if LoRA would be trained under FSDP or ZeRO-3.
    """
    metrics: dict[str, Any] = {"seed": trainer.args.seed}
    if trainer.train_dataset is None:
        return metrics
    if (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()) and lora_rank(trainer.model) is not None:
        raise ValueError("LoRA cannot be trained under FSDP and ZeRO-3, which shard the weights to merge. Use DDP.")
    with no_library_bars():
        metrics |= {"train": trainer.train_or_resume(), **counted}
    skipped = count_skipped(trainer)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped since the run was started or resumed, by source: %s", json.dumps(skipped))
    folder = Path(trainer.args.output_dir)
    with no_library_bars():
        trainer.save_model(folder / "adapter" if is_peft_model(trainer.model) else folder, _internal_call=True)
    trainer.keep_record()
    save_metrics(trainer, metrics)
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # This process alone loads models from here on: ZeRO-3 would wait for the others.
    if trainer.is_world_process_zero():
        with stop_on_full_disk(folder), no_library_bars():
            trainer.save_parts()
    return metrics


def count_skipped(trainer: BaseTrainer) -> dict[str, int]:
    """Return the number of skipped rows of each source over all processes."""
    own = getattr(trainer.data_collator, "skipped", None)
    if own is None:
        return {}
    counts = [own] if PartialState().num_processes == 1 else gather_object([own])
    return dict(sum(map(Counter, counts), Counter()))


def evaluate(trainer: BaseTrainer, metrics: dict[str, Any], name: str, samples: Dataset | None) -> None:
    """Score a split, if it is given, add the scores to the metrics, and save them."""
    if samples is not None:
        logger.info("Scoring the %s split.", name)
        metrics[name] = trainer.evaluate(samples, metric_key_prefix=name)
        save_metrics(trainer, metrics)


def save_metrics(trainer: BaseTrainer, metrics: dict[str, Any]) -> None:
    """Write `metrics.json` in the main process."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_whole(path, json.dumps(without_nan(metrics), indent=2) + "\n")


def finish(
    trainer: BaseTrainer,
    samples: Dataset | None = None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
) -> int:
    """Draw pictures and a summary of a pretraining, write the files for a benchmark's server and the cards, and push.

    Args:
        samples: of which `num_pictures`, spread over them, are drawn with the model's predictions.
        submit: writes the files for the server.

    Returns:
        The exit status: 1 if any of these steps failed.
    """
    output_dir = Path(trainer.args.output_dir)
    status = attempt(output_dir, "a picture", draw_pictures, trainer, samples, num_pictures)
    if submit is not None:
        status |= attempt(output_dir, "the submission", submit)
    for part in ("backbone", "adapter"):
        if (output_dir / part).is_dir():
            status |= attempt(output_dir, f"the card of {part}", write_part_card, part, output_dir)
    if trainer.train_dataset is not None and trainer.args.watch_samples:
        with no_library_bars():
            status |= attempt(output_dir, "the summary picture", trainer.draw_summary)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw_pictures(trainer: BaseTrainer, samples: Dataset | None, number: int) -> None:
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png", trainer.trains_on_answers)
    number = min(number, len(samples or ()))
    if number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        trainer.draw(shown, output_dir / "predictions.png", is_test=True)


def draw_losses(log_history: list[dict], path: Path, of_answers: bool = True) -> None:
    """Draw training and evaluation loss over the steps of a trainer's log, those of a pretraining if `of_answers`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    labels = ("training (under VRL)", "evaluation (every visual token)") if of_answers else ("training", "evaluation")
    for key, label in zip(("loss", "eval_loss"), labels):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None)
    axis.set(xlabel="step", ylabel="loss on the answers" if of_answers else "loss", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(StrMethodFormatter("{x:.3g}"))
    if axis.lines:  # a run may end before it logs
        axis.legend()
    figure.savefig(path, dpi=110)


def write_part_card(part: str, output_dir: Path) -> None:
    copy_record(output_dir, output_dir / part)
    write_model_card(part, output_dir / part)


def report(metrics: dict[str, Any], output_dir: Path, model_type: str, next_commands: Sequence[str]) -> int:
    """Print the headline metrics, the requirements of a pretraining, and the next commands.

    Args:
        metrics: content of `metrics.json`.
        output_dir: folder of the run.
        model_type: key of `MODELS`, whose declaration names the headline metrics.
        next_commands: commands that go on from the run, with placeholders in capitals.

    Returns:
        The exit status: 1 if a requirement is not met.
    """
    print(f"\nMetrics (all of them: {output_dir / 'metrics.json'})")
    training_metrics = metrics.get("train", {})
    if "train_loss" in training_metrics:
        print_metric("train", "Loss", training_metrics["train_loss"])
    for split, _, title, value in headlines(find_model(model_type), without_nan(metrics), {}):
        print_metric(split, title, value)
    missed_scores = []
    for requirement in metrics.get("requirements", []):
        if requirement["passed"]:
            result = "passed"
        else:
            result = "failed"
            missed_scores.append(requirement["score"])
        reached = requirement["missing"] if requirement["reached"] is None else f"{requirement['reached']:.3f}"
        print(f"{result}: {requirement['score']} {requirement['relation']} {requirement['bound']:g}: {reached}")
    print(f"\nModel, processor and pictures: {output_dir}")
    if (output_dir / "summary.png").is_file():
        print(f"The run in one picture: {output_dir / 'summary.png'}")
    backbone = output_dir / "backbone"
    has_backbone = backbone.is_dir()
    if has_backbone:
        print(f'The backbone on its own: transformers.AutoModel.from_pretrained("{backbone}")')
    if has_backbone or "train" in metrics:
        print("\nNext:", *next_commands, sep="\n    ")
    if missed_scores:
        print(f"Requirements NOT met: {', '.join(missed_scores)}. The outputs are kept.", file=sys.stderr)
    return 1 if missed_scores else 0


def print_metric(split: str, title: str, value: float) -> None:
    print(f"    {split:<14}{title:<44}{value:.4g}")
