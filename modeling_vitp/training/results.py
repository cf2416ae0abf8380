"""Steps of pretraining and fine-tuning runs: train, save, score, draw, push, and print the results.

Results are saved before the next step that may fail: weights, then the backbone, then each score.
"""

import copy
import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..cards.record import copy_record
from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..hub.upload import write_model_card
from ..metrics.report import without_nan
from ..modeling_vitp import ViTPForConditionalGeneration
from .base_trainer import BaseTrainer
from .checkpointing import attempt, last_checkpoint, stop_on_full_disk, write_whole
from .vitp_trainer import ViTPTrainer

logger = logging.getLogger(__name__)
START = "backbone_at_start"


def check_eval_split(args: TrainingArguments, train_splits: Sequence[str], eval_split: str | None) -> None:
    """Raise a `ValueError` if evaluation during training or `load_best_model_at_end` has no suitable split."""
    if args.eval_strategy != "no" and eval_split is None:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} needs an eval_split: set it, or eval_strategy: no.")
    if args.load_best_model_at_end and eval_split in {*train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not in train_splits.")


def keep_start(trainer: ViTPTrainer) -> None:
    """Export the backbone before the first step to `backbone_at_start`, for comparison with the trained backbone.

    A resumed run keeps the existing export.
    """
    args = trainer.args
    folder = Path(args.output_dir) / START
    is_resumed = folder.is_dir() and (args.resume_from_checkpoint or last_checkpoint(args.output_dir))
    if trainer.is_world_process_zero() and not is_resumed:
        written = folder.with_suffix(".writing")
        shutil.rmtree(written, ignore_errors=True)
        with stop_on_full_disk(args.output_dir):
            export_backbone(trainer.model, written, trainer.processing_class.image_processor)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(written, folder)


def train(trainer: BaseTrainer, **counted: Any) -> dict[str, Any]:
    """Train or resume a run, and save the weights; for pretraining also the backbone, and LoRA in `adapter`.

    Without a `train_dataset`, nothing is trained or saved.

    Args:
        trainer: trainer of the run.
        counted: further entries of the metrics, such as numbers of training samples.

    Returns:
        The metrics, in all processes.
    """
    metrics: dict[str, Any] = {"seed": trainer.args.seed}
    if trainer.train_dataset is None:
        return metrics
    metrics |= {"train": trainer.train_or_resume(), **counted}
    skipped = count_skipped(trainer)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped since the run was started or resumed, by source: %s", json.dumps(skipped))
    folder = Path(trainer.args.output_dir)
    trainer.save_model(folder / "adapter" if is_peft_model(trainer.model) else folder, _internal_call=True)
    trainer.keep_record()
    save_metrics(trainer, metrics)
    if isinstance(trainer, ViTPTrainer) and trainer.is_world_process_zero():
        with stop_on_full_disk(folder):
            save_parts(trainer)
    return metrics


def count_skipped(trainer: BaseTrainer) -> dict[str, int]:
    """Return the number of skipped rows of each source over all processes."""
    own = getattr(trainer.data_collator, "skipped", None)
    if own is None:
        return {}
    counts = [own] if PartialState().num_processes == 1 else gather_object([own])
    return dict(sum(map(Counter, counts), Counter()))


def save_parts(trainer: ViTPTrainer) -> None:
    """Save the merged model in the output folder and its backbone in `backbone`.

    The weights are read from the disk, because each process has only a part of the trainer's model under FSDP and ZeRO.
    LoRA is merged in a copy, so that the trained model is evaluated next.
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
    """Score a split, if it is given, add the scores to the metrics, and save them."""
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
        trainer: trainer of the run.
        eval_dataset: samples of the evaluation split, if any.
        test_dataset: samples of the test split, if any.
        num_pictures: number of samples in `predictions.png`.
        submit: function that writes the files for a benchmark's server.
        score_controls: function that returns further scores on the test split.
        counted: further entries of the metrics.

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
    return report(metrics, Path(trainer.args.output_dir)) or status


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


def report(metrics: dict[str, Any], output_dir: Path) -> int:
    """Print the metrics and what to do next.

    Returns:
        The exit status: 1 if the score of a pretraining's task failed, or its gate was not passed.
    """
    print(json.dumps(without_nan(metrics), indent=2))
    backbone, folder = output_dir / "backbone", shlex.quote(str(output_dir))
    if not backbone.is_dir():
        print(f"\nModel, image processor, metrics.json and pictures: {output_dir}")
        return 0
    print(f"""
Model, processor, metrics.json and pictures: {output_dir}
The backbone, on its own:                    {backbone}

    from transformers import AutoImageProcessor, AutoModel
    backbone = AutoModel.from_pretrained("{backbone}")
    image_processor = AutoImageProcessor.from_pretrained("{backbone}")

Train on from here with your own data:
    vitp pretrain --model_name_or_path {folder} --dataset_name YOUR_DATA --output_dir NEW_FOLDER

Share the backbone on the Hub (--dry_run shows what would go):
    vitp push_to_hub {folder} NAMESPACE/NAME --what backbone --dry_run
""")
    task = metrics.get("task", {})
    if task.get("passed", True):
        return 1 if task.get("failed") else 0
    print(f"The task's gate was NOT passed: {task['gate']}", file=sys.stderr)
    return 1
