"""What a pretraining leaves: metrics, the model in one piece, its backbone, cards, and what to do next.

What a run has is on the disk before anything is tried that may fail: weights, then the backbone, then each score.
"""

import copy
import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from transformers import Trainer

from ..cards.record import copy_record
from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..hub.contents import write_card
from ..instructions.collator import ViTPDataCollator
from ..modeling_vitp import ViTPForConditionalGeneration
from .checkpointing import last_checkpoint
from .disk import told_if_full
from .outputs import attempt, write_whole
from .plots import draw_losses
from .pretraining import ViTPTrainer

logger = logging.getLogger(__name__)
START = "backbone_at_start"


def train(trainer: ViTPTrainer) -> dict[str, Any]:
    """Trains, and goes on where the run was; the metrics, in all processes."""
    result = trainer.train_or_resume()
    metrics = {"seed": trainer.args.seed, "train": result.metrics | mean_loss(trainer)}
    skipped = count_skipped(trainer.data_collator)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped since this run began or went on, by source: %s", json.dumps(skipped))
    return metrics


def count_skipped(collator: ViTPDataCollator) -> dict[str, int]:
    """How many rows of each source were skipped, over all processes."""
    counts = [collator.skipped] if PartialState().num_processes == 1 else gather_object([collator.skipped])
    return dict(sum(map(Counter, counts), Counter()))


def keep_start(trainer: ViTPTrainer) -> None:
    """The backbone as it is before the first step, in `backbone_at_start`, for what is learned to be held against.

    A run that goes on keeps the one that it began with.
    """
    args = trainer.args
    folder = Path(args.output_dir) / START
    goes_on = folder.is_dir() and (args.resume_from_checkpoint or last_checkpoint(args.output_dir))
    if trainer.is_world_process_zero() and not goes_on:
        written = folder.with_suffix(".writing")
        shutil.rmtree(written, ignore_errors=True)
        with told_if_full(args.output_dir):
            export_backbone(trainer.model, written, trainer.processing_class.image_processor)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(written, folder)


def save_model(trainer: ViTPTrainer, metrics: dict[str, Any]) -> None:
    """The weights, of LoRA in `adapter`; in one process also the model in one piece, its backbone and the metrics."""
    folder = Path(trainer.args.output_dir) / ("adapter" if is_peft_model(trainer.model) else "")
    trainer.save_model(folder, _internal_call=True)
    trainer.keep_record()
    if trainer.is_world_process_zero():
        with told_if_full(trainer.args.output_dir):
            save_metrics(trainer, metrics)
            save_parts(trainer)


def evaluate(trainer: ViTPTrainer, metrics: dict[str, Any]) -> None:
    """Adds the loss on the rows to evaluate on, if there are any."""
    if trainer.eval_dataset is not None:
        metrics["eval"] = trainer.evaluate()
        save_metrics(trainer, metrics)


def evaluate_task(trainer: ViTPTrainer, metrics: dict[str, Any], score: Callable[..., dict], splits: Any) -> None:
    """Adds the scores of a task, by its function, see `tests/README.md`; for one process."""
    args = trainer.args
    model = ViTPForConditionalGeneration.from_pretrained(args.output_dir).to(args.device)
    metrics["task"] = score(model, trainer.processing_class, splits, Path(args.output_dir), args.seed)
    save_metrics(trainer, metrics)


def mean_loss(trainer: Trainer) -> dict[str, float]:
    """Over all steps of a run that has ended; the Trainer's is of the steps since it was resumed."""
    total, last = trainer._tr_loss.item(), 0  # of the steps since the last log, and then of all
    for logs in trainer.state.log_history:
        if "loss" in logs:
            total += logs["loss"] * (logs["step"] - last)
            last = logs["step"]
    num_steps = last + trainer.state.global_step - trainer._globalstep_last_logged
    return {"train_loss": total / num_steps} if num_steps else {}


def save_parts(trainer: ViTPTrainer) -> None:
    """The model, merged and in one piece in the output folder, with its backbone in `backbone`.

    Not the trainer's model, of which FSDP and ZeRO leave each process a part. LoRA is merged in a copy, so that what is
    evaluated next is what was trained.
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


def save_metrics(trainer: ViTPTrainer, metrics: dict[str, Any]) -> None:
    """`metrics.json`, written by one process."""
    if trainer.is_world_process_zero():
        write_whole(Path(trainer.args.output_dir) / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def finish(trainer: ViTPTrainer) -> int:
    """The picture of the losses, the cards and the push; the exit status, 1 if any of them failed."""
    output_dir = Path(trainer.args.output_dir)
    status = attempt(output_dir, "the plot", draw_losses, trainer.state.log_history, output_dir / "loss.png")
    for part in ("backbone", "adapter"):
        if (output_dir / part).is_dir():
            status |= attempt(output_dir, f"the card of {part}", write_part_card, part, output_dir)
    return trainer.share() | status


def write_part_card(part: str, output_dir: Path) -> None:
    copy_record(output_dir, output_dir / part)
    write_card(part, output_dir / part)


def report(metrics: dict[str, Any], output_dir: Path) -> int:
    """Prints what a user needs next; the exit status says whether the task's gate was passed."""
    backbone, folder = output_dir / "backbone", shlex.quote(str(output_dir))
    print(json.dumps(metrics, indent=2))
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
    if metrics.get("task", {}).get("passed", True):
        return 1 if metrics.get("task", {}).get("failed") else 0
    print(f"The task's gate was NOT passed: {metrics['task']['gate']}", file=sys.stderr)
    return 1
