"""What pretraining and fine-tuning do with a trainer: train, save, score, draw, share, and say what to do next.

Results are on the disk before anything is tried that may fail: weights, then the backbone, then each score.
"""

import copy
import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging as transformers_logging

from ..auto.registry import ModelEntry, find_model
from ..cards.model_card import headlines
from ..cards.record import copy_record
from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..hub.upload import write_model_card
from ..metrics.report import without_nan
from ..modeling_vitp import ViTPForConditionalGeneration
from .base_trainer import BaseTrainer
from .checkpointing import attempt, last_checkpoint, told_if_full, write_whole
from .vitp_trainer import ViTPTrainer

logger = logging.getLogger(__name__)
START = "backbone_at_start"


def check_eval_split(args: TrainingArguments, train_splits: Sequence[str], eval_split: str | None) -> None:
    """Raise a `ValueError` if evaluation while training, or the choice of a checkpoint by it, has no split for it."""
    if args.eval_strategy != "no" and eval_split is None:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} scores while training: give an eval_split, or eval_strategy: no.")
    if args.load_best_model_at_end and eval_split in {*train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not trained on.")


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


def keep_start(trainer: ViTPTrainer) -> None:
    """Export the backbone as it is before the first step to `backbone_at_start`, to compare the trained one with.

    A run that goes on keeps the one that it began with.
    """
    args = trainer.args
    folder = Path(args.output_dir) / START
    goes_on = folder.is_dir() and (args.resume_from_checkpoint or last_checkpoint(args.output_dir))
    if trainer.is_world_process_zero() and not goes_on:
        written = folder.with_suffix(".writing")
        shutil.rmtree(written, ignore_errors=True)
        with told_if_full(args.output_dir), no_library_bars():
            export_backbone(trainer.model, written, trainer.processing_class.image_processor)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(written, folder)


def train(trainer: BaseTrainer, **counted: Any) -> dict[str, Any]:
    """Train, or go on with a run, and save the weights; of a pretraining also the backbone, and LoRA in `adapter`.

    Without a `train_dataset` nothing is trained or saved.

    Args:
        counted: more about what is trained on, for the metrics.

    Returns:
        The metrics, in all processes.
    """
    metrics: dict[str, Any] = {"seed": trainer.args.seed}
    if trainer.train_dataset is None:
        return metrics
    with no_library_bars():
        metrics |= {"train": trainer.train_or_resume(), **counted}
    skipped = count_skipped(trainer)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped since this run began or went on, by source: %s", json.dumps(skipped))
    folder = Path(trainer.args.output_dir)
    with no_library_bars():
        trainer.save_model(folder / "adapter" if is_peft_model(trainer.model) else folder, _internal_call=True)
    trainer.keep_record()
    save_metrics(trainer, metrics)
    if isinstance(trainer, ViTPTrainer) and trainer.is_world_process_zero():
        with told_if_full(folder), no_library_bars():
            save_parts(trainer)
    return metrics


def count_skipped(trainer: BaseTrainer) -> dict[str, int]:
    """Return how many rows of each source were skipped, over all processes."""
    own = getattr(trainer.data_collator, "skipped", None)
    if own is None:
        return {}
    counts = [own] if PartialState().num_processes == 1 else gather_object([own])
    return dict(sum(map(Counter, counts), Counter()))


def save_parts(trainer: ViTPTrainer) -> None:
    """Save the merged model in the output folder and its backbone in `backbone`.

    The weights are read back, because FSDP and ZeRO leave each process a part of the trainer's model. LoRA is merged in
    a copy, so that what is evaluated next is what was trained.
    """
    output_dir, processor = Path(trainer.args.output_dir), trainer.processing_class
    if is_peft_model(trainer.model):
        merged = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).merge_and_unload()
        merged.save_pretrained(output_dir)
        open_like_folder(output_dir)
        processor.save_pretrained(output_dir)
        del merged
    model = ViTPForConditionalGeneration.from_pretrained(output_dir)
    export_backbone(model, output_dir / "backbone", processor.image_processor)


def evaluate(trainer: BaseTrainer, metrics: dict[str, Any], name: str, samples: Dataset | None) -> None:
    """Add the scores on a split, if there is one, to the metrics, and save them."""
    if samples is not None:
        metrics[name] = trainer.evaluate(samples, metric_key_prefix=name)
        save_metrics(trainer, metrics)


def fine_tune(
    trainer: BaseTrainer,
    eval_dataset: Dataset | None,
    test_dataset: Dataset | None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
    score_controls: Callable[[], dict[str, float]] | None = None,
    **counted: Any,
) -> int:
    """Train, score both splits, and finish the run, see [`train`], [`evaluate`], [`finish`] and [`report`].

    Args:
        score_controls: further scores on the test split.

    Returns:
        The exit status.
    """
    metrics = train(trainer, **counted)
    evaluate(trainer, metrics, "eval", eval_dataset)
    evaluate(trainer, metrics, "test", test_dataset)
    if score_controls is not None:
        metrics["test"] |= score_controls()
    if not trainer.is_world_process_zero():
        return 0
    status = finish(trainer, test_dataset or eval_dataset, num_pictures, submit)
    save_metrics(trainer, metrics)
    return report(metrics, Path(trainer.args.output_dir), trainer.model.config.model_type) or status


def save_metrics(trainer: BaseTrainer, metrics: dict[str, Any]) -> None:
    """Write `metrics.json`, in one process."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_whole(path, json.dumps(without_nan(metrics), indent=2) + "\n")


def finish(
    trainer: BaseTrainer,
    samples: Dataset | None = None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
) -> int:
    """Draw pictures, write the files for a benchmark's server and the cards, and push.

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
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw_pictures(trainer: BaseTrainer, samples: Dataset | None, number: int) -> None:
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    number = min(number, len(samples or ()))
    if number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        trainer.draw_results(shown, output_dir / "predictions.png")


def draw_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and evaluation loss over the steps, from a trainer's log."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for key, label in (("loss", "training (under VRL)"), ("eval_loss", "evaluation (every visual token)")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None)
    axis.set(xlabel="step", ylabel="loss on the answers", yscale="log")
    if axis.lines:  # a run may end before it logs
        axis.legend()
    figure.savefig(path, dpi=110)


def write_part_card(part: str, output_dir: Path) -> None:
    copy_record(output_dir, output_dir / part)
    write_model_card(part, output_dir / part)


def report(metrics: dict[str, Any], output_dir: Path, model_type: str) -> int:
    """Print the headline metrics, the gate of a pretraining's task, and the next commands.

    Args:
        model_type: key of `MODELS`, whose declaration names the headline metrics.

    Returns:
        The exit status: 1 if the score of a pretraining's task failed, or its gate was not passed.
    """
    entry, backbone, task = find_model(model_type), output_dir / "backbone", metrics.get("task", {})
    rows = [("train", "Loss", metrics["train"]["train_loss"])] if "train_loss" in metrics.get("train", {}) else []
    rows += [(split, title, value) for split, _, title, value in headlines(entry, without_nan(metrics), {})]
    print(f"\nMetrics (all of them: {output_dir / 'metrics.json'})")
    for split, title, value in rows:
        print(f"    {split:<14}{title:<44}{value:.4g}")
    for check in task.get("checks", ()):
        result = "passed" if check["passed"] else "failed"
        print(f"{result}: {check['name']}: {check['reached']:.3f} (required: {check['required']})")
    print(f"\nModel, processor and pictures: {output_dir}")
    if backbone.is_dir():
        print(f'The backbone on its own: transformers.AutoModel.from_pretrained("{backbone}")')
    if backbone.is_dir() or "train" in metrics:
        print("\nNext:", *next_commands(entry, output_dir), sep="\n    ")
    if task.get("passed", True):
        return 1 if task.get("failed") else 0
    print(f"The task's gate was NOT passed: {task['gate']}", file=sys.stderr)
    return 1


def next_commands(entry: ModelEntry, output_dir: Path) -> list[str]:
    """Return three commands that go on from a run, with placeholders in capitals."""
    folder, backbone = shlex.quote(str(output_dir)), shlex.quote(str(output_dir / "backbone"))
    if (output_dir / "backbone").is_dir():
        return [
            f"vitp finetune_segmentation --config YOUR_MAPS.yaml --model_name_or_path {backbone}",
            f"vitp pretrain --model_name_or_path {folder} --dataset_name YOUR_DATA --output_dir NEW_FOLDER",
            f"vitp push_to_hub {folder} NAMESPACE/NAME --what backbone --dry_run",
        ]
    images = " ".join(["IMAGE.tif"] * getattr(entry.model_class, "images_per_sample", 1))
    predict = {"image-segmentation": "CLASSES.tif", "object-detection": "OBJECTS.geojson"}
    commands = [f"vitp space {folder}"]
    if entry.pipeline_tag in predict:
        commands.append(f"vitp predict_large {folder} {images} --output {predict[entry.pipeline_tag]}")
    else:
        commands.append(f"vitp evaluate_robustness --models {folder}")
    return [*commands, f"vitp push_to_hub {folder} NAMESPACE/NAME --what model --dry_run"]
