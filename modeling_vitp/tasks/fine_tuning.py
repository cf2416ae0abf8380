"""Fine-tuning of a model from its data to its scores."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..training.base_trainer import BaseTrainer
from ..training.checkpointing import check_no_model
from ..training.results import evaluate, finish, report, save_metrics, train
from .arguments import SplitArguments

logger = logging.getLogger(__name__)


def check_splits(training_args: TrainingArguments, args: SplitArguments) -> list[str]:
    """Return the names of the splits that a run opens.

    With `do_train` false, this is the test split, or else the evaluation split, and the other splits are not needed.

    Raises:
        ValueError: if the test split is trained or selected on, or if evaluation during training,
            `load_best_model_at_end` or `resample_test` has no suitable split.
    """
    if args.resample_test and args.test_split is None:
        raise ValueError("resample_test needs a test_split: set it, or remove resample_test.")
    if not training_args.do_train:
        check_no_model(training_args.output_dir)
        training_args.eval_strategy, args.eval_split = IntervalStrategy.NO, None if args.test_split else args.eval_split
        return [split for split in (args.eval_split, args.test_split) if split]
    if args.test_split in {*args.train_splits, args.eval_split} - {None}:
        raise ValueError(f"Split {args.test_split!r} is the test_split: it may not be trained or selected on.")
    if training_args.eval_strategy != "no" and args.eval_split is None:
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} needs an eval_split: set it, or eval_strategy: no.")
    if training_args.load_best_model_at_end and args.eval_split in {*args.train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not in train_splits.")
    return list(dict.fromkeys([*args.train_splits, *filter(None, (args.eval_split, args.test_split))]))


def fine_tune(
    trainer: BaseTrainer,
    eval_dataset: Dataset | None,
    test_dataset: Dataset | None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
    score_controls: Callable[[], dict[str, float]] | None = None,
    resample_test: bool = False,
    **counted: Any,
) -> int:
    """Train, score both splits, and finish the run, see [`train`], [`evaluate`], [`finish`] and [`report`].

    Args:
        num_pictures: number of samples in `predictions.png`.
        submit: function that writes the files for a benchmark's server.
        score_controls: function that returns further scores on the test split.
        resample_test: whether the metrics have the main score of each resample of the cases of the test split as
            `test_resampled`, and the number of cases as `test_cases`.
        counted: further entries of the metrics.

    Returns:
        The exit status.
    """
    metrics = train(trainer, **counted)
    evaluate(trainer, metrics, "eval", eval_dataset)
    evaluate(trainer, metrics, "test", test_dataset)
    if eval_dataset is not None or test_dataset is not None:
        metrics["main_score"] = trainer.main_score
        if trainer.main_score is not None:
            metrics["greater_is_better"] = trainer.greater_is_better(trainer.main_score)
    if resample_test:
        score = trainer.metric.score_images()
        metrics |= {"test_resampled": score.resampled, "test_cases": score.cases}
    if score_controls is not None:
        metrics["test"] |= score_controls()
    if not trainer.is_world_process_zero():
        return 0
    save_metrics(trainer, metrics)
    status = finish(trainer, test_dataset or eval_dataset, num_pictures, submit)
    return report(metrics, Path(trainer.args.output_dir), trainer.model.config.model_type) or status
