"""What every fine-tuning does with its trainer: train, score, and write down what came of it."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer

from ..metrics.report import without_nan
from .outputs import write_whole


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


def save_metrics(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """`metrics.json`, written by one process."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_whole(path, json.dumps(without_nan(metrics), indent=2) + "\n")


def report(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Prints what a user needs next."""
    print(json.dumps(without_nan(metrics), indent=2))
    print(f"\nModel, image processor, metrics.json and pictures: {trainer.args.output_dir}")
