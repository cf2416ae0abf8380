"""Fine-tuning of a model from its data to its scores."""

import shlex
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..images.seen import report_images
from ..training.checkpointing import check_free, check_no_model
from ..training.results import RunResult, evaluate, finish, report, save_metrics, train
from .arguments import SplitArguments
from .base import FineTuningOptions, Task
from .trainer import FineTuningTrainer


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
        training_args.eval_strategy = IntervalStrategy.NO
        if args.test_split:
            args.eval_split = None
        scored_split = args.test_split or args.eval_split
        return [scored_split] if scored_split else []
    if args.test_split in {*args.train_splits, args.eval_split} - {None}:
        raise ValueError(f"Split {args.test_split!r} is the test_split: it may not be trained or selected on.")
    if training_args.eval_strategy != "no" and args.eval_split is None:
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} needs an eval_split: set it, or eval_strategy: no.")
    if training_args.load_best_model_at_end and args.eval_split in {*args.train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not in train_splits.")
    splits = list(dict.fromkeys(args.train_splits))
    for split in (args.eval_split, args.test_split):
        if split is not None and split not in splits:
            splits.append(split)
    return splits


def fine_tune(task: Task, options: FineTuningOptions, command: str | None = None) -> RunResult:
    """Fine-tune a model of a task, score it on the evaluation and the test split, and write the results.

    The output folder gets the model with its card, `metrics.json`, and pictures. If the folder has an unfinished run of
    the same options, it is resumed. Without `do_train`, the model is only scored.

    Args:
        task: object of `TASKS`.
        options: options of the run, see [`~modeling_vitp.tasks.options.make_options`].
        command: command that runs it again, for the card.

    Raises:
        ValueError: if the options, the data or the start are wrong.
    """
    args = options.data
    training_args = options.training
    task.check_start(options)
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    data = task.open_data(options)
    task.check_splits(data, check_splits(training_args, args), options)
    samples = {
        "train": task.training_samples(data, options) if training_args.do_train else None,
        "eval": task.open_split(data, args.eval_split, options) if args.eval_split else None,
        "test": task.open_split(data, args.test_split, options) if args.test_split else None,
    }
    counts = task.check_samples(data, samples, options)
    first_samples = samples["train"] or samples["test"] or samples["eval"]
    if PartialState().is_main_process and hasattr(first_samples, "source"):
        report_images(len(first_samples), first_samples.source, first_samples.spec)
    model = task.load_model(data, options, counts)
    trainer = task.create_trainer(model, data, samples, options)
    if training_args.do_train:
        trained_on, evaluated_on = data.describe(args.train_splits, args.eval_split, args.test_split)
        trainer.record(command, [options.start.model_name_or_path], trained_on, evaluated_on)

    metrics = train(trainer, **counts)
    evaluate(trainer, metrics, "eval", samples["eval"])
    evaluate(trainer, metrics, "test", samples["test"])
    describe_scores(trainer, metrics, args.resample_test)
    controls = task.score_controls(trainer, data, samples, options)
    if controls:
        metrics["test"].update(controls)
    if not trainer.is_world_process_zero():
        return RunResult(metrics)
    save_metrics(trainer, metrics)
    submit = None
    if getattr(args, "submission", None) is not None:

        def submit() -> None:
            task.write_submission(trainer, data, options)

    drawn_samples = samples["test"] or samples["eval"]
    status = finish(trainer, drawn_samples, args.num_pictures, submit)
    folder = shlex.quote(training_args.output_dir)
    next_commands = [
        f"vitp space {folder}",
        *task.next_commands(folder, data),
        f"vitp push_to_hub {folder} NAMESPACE/NAME --what model --dry_run",
    ]
    status |= report(metrics, Path(training_args.output_dir), trainer.model.config.model_type, next_commands)
    return RunResult(metrics, status)


def describe_scores(trainer: FineTuningTrainer, metrics: dict[str, Any], resample_test: bool) -> None:
    """Add the main score, what is known of it, and its resamples to the metrics.

    Args:
        trainer: trainer, after the splits are scored.
        metrics: content of `metrics.json`, which is changed.
        resample_test: whether to resample the cases of the test split.
    """
    if "eval" in metrics or "test" in metrics:
        metrics["main_score"] = trainer.main_score
        if trainer.main_score is not None:
            metrics["greater_is_better"] = trainer.greater_is_better(trainer.main_score)
            metrics["is_share"] = trainer.metric.is_share
    if resample_test:
        score = trainer.metric.score_images()
        metrics["test_resampled"] = score.resampled
        metrics["test_cases"] = score.cases
