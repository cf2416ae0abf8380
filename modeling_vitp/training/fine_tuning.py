"""What every fine-tuning does with its trainer: train, score, draw, and write down what came of it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..metrics.report import without_nan
from .fine_tuner import FineTuner
from .outputs import attempt, write_whole
from .plots import draw_losses


def check_eval_split(args: TrainingArguments, train_splits: Sequence[str], eval_split: str | None) -> None:
    """Raises a `ValueError` if scores while training, or the choice of a checkpoint by them, have no split for it."""
    if args.eval_strategy != "no" and eval_split is None:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} scores while training: give an eval_split, or eval_strategy: no.")
    if args.load_best_model_at_end and eval_split in {*train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not trained on.")


def train(trainer: Trainer, **counted: Any) -> dict[str, Any]:
    """Trains, if there is anything to train on, and saves model and metrics; the metrics, in all processes.

    Args:
        trainer: a [`~modeling_vitp.training.run.Run`].
        counted: more about what is trained on, for the metrics.
    """
    metrics = {"seed": trainer.args.seed}
    if trainer.train_dataset is not None:
        metrics |= {"train": trainer.train_or_resume().metrics, **counted}
        trainer.save_model(trainer.args.output_dir, _internal_call=True)
        trainer.keep_record()
        save_metrics(trainer, metrics)
    return metrics


def evaluate(trainer: Trainer, metrics: dict[str, Any], name: str, samples: Dataset | None) -> None:
    """Adds the scores on a split, if there is one, and saves them."""
    if samples is not None:
        metrics[name] = trainer.evaluate(samples, metric_key_prefix=name)
        save_metrics(trainer, metrics)


def finish(trainer: FineTuner, samples: Dataset | None, number: int, submit: Callable[[], None] | None = None) -> int:
    """Pictures, what goes to a benchmark's server, the card and the push; the exit status, 1 if any of them failed.

    Args:
        samples: of which `number`, spread over them, are drawn with what the model says of them.
        submit: writes the files for the server.
    """
    output_dir = trainer.args.output_dir
    status = attempt(output_dir, "a picture", draw, trainer, samples, number)
    if submit is not None:
        status |= attempt(output_dir, "the submission", submit)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw(trainer: FineTuner, samples: Dataset | None, number: int) -> None:
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    number = min(number, len(samples or ()))
    if number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        trainer.draw_results(shown, output_dir / "predictions.png")


def save_metrics(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """`metrics.json`, written by one process."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_whole(path, json.dumps(without_nan(metrics), indent=2) + "\n")


def report(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Prints what a user needs next."""
    print(json.dumps(without_nan(metrics), indent=2))
    print(f"\nModel, image processor, metrics.json and pictures: {trainer.args.output_dir}")
