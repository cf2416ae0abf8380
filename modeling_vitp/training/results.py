"""What a pretraining leaves: metrics, the model in one piece, its backbone, cards, and what to do next."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from ..cards.record import copy_record
from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..hub.contents import write_card
from ..modeling_vitp import ViTPForConditionalGeneration
from .plots import draw_losses
from .pretraining import ViTPTrainer, count_skipped

logger = logging.getLogger(__name__)


def train(trainer: ViTPTrainer) -> dict[str, Any]:
    """Trains, and goes on where the run was; the metrics, in all processes."""
    result = trainer.train_or_resume()
    metrics = {"seed": trainer.args.seed, "train": result.metrics | mean_loss(trainer.state.log_history)}
    skipped = count_skipped(trainer.data_collator)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped in this run, by source: %s", json.dumps(skipped))
    if trainer.eval_dataset is not None:
        metrics["eval"] = trainer.evaluate()
    return metrics


def mean_loss(log_history: list[dict]) -> dict[str, float]:
    """Over the whole run; the Trainer's divides the losses of all steps by the number of those since it was resumed."""
    losses = [logs["loss"] for logs in log_history if "loss" in logs]
    return {"train_loss": sum(losses) / len(losses)} if losses else {}


def save_parts(trainer: ViTPTrainer) -> ViTPForConditionalGeneration:
    """The model, merged and in one piece in the output folder, with its backbone in `backbone`. For one process.

    Not the trainer's model, of which FSDP and ZeRO leave each process a part.
    """
    output_dir, processor = Path(trainer.args.output_dir), trainer.processing_class
    if is_peft_model(trainer.model):
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(output_dir)
        open_like_folder(output_dir)
        processor.save_pretrained(output_dir)
    model = ViTPForConditionalGeneration.from_pretrained(output_dir).to(trainer.args.device)
    export_backbone(model, output_dir / "backbone", processor.image_processor)
    draw_losses(trainer.state.log_history, output_dir / "loss.png")
    return model


def save_metrics(trainer: ViTPTrainer, metrics: dict[str, Any]) -> None:
    """`metrics.json`, and the cards of the parts, which tell of it."""
    output_dir = Path(trainer.args.output_dir)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for part in ("backbone", "adapter"):
        if (output_dir / part).is_dir():
            copy_record(output_dir, output_dir / part)
            write_card(part, output_dir / part)


def report(metrics: dict[str, Any], output_dir: Path) -> int:
    """Prints what a user needs next; the exit status says whether the task's gate was passed."""
    backbone = output_dir / "backbone"
    print(json.dumps(metrics, indent=2))
    print(f"""
Model, processor, metrics.json and pictures: {output_dir}
The backbone, on its own:                    {backbone}

    from transformers import AutoImageProcessor, AutoModel
    backbone = AutoModel.from_pretrained("{backbone}")
    image_processor = AutoImageProcessor.from_pretrained("{backbone}")

Train on from here with your own data:
    vitp pretrain --model_name_or_path {output_dir} --dataset_name YOUR_DATA --output_dir NEW_FOLDER

Share the backbone on the Hub (--dry_run shows what would go):
    vitp push_to_hub {output_dir} NAMESPACE/NAME --what backbone --dry_run
""")
    if metrics.get("task", {}).get("passed", True):
        return 0
    print(f"The task's gate was NOT passed: {metrics['task']['gate']}", file=sys.stderr)
    return 1
