"""Train the ViT of a pretraining with another objective on the same views, as a control for instructions.

    python -m lab.experiments.controls --config lab/trees/quickstart.yaml --objective masks

Initialization, views, batches and learning rates are those of `lab.trees.pretrain` with the same configuration. The
output has the same form: `backbone`, `backbone_at_start`, and the probe results in `metrics.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, set_seed
from transformers.data import default_data_collator
from transformers.modeling_outputs import TokenClassifierOutput
from trl import ModelConfig

from lab.command import run
from lab.experiments.arguments import OBJECTIVES
from lab.trees.arguments import TreePretrainArguments
from lab.trees.evaluation import probe_backbone
from lab.trees.instructions import TreeInstructions, cell_means, prepare
from modeling_vitp import ViTPImageProcessor, export_backbone
from modeling_vitp.command.settings import Settings
from modeling_vitp.evaluation.gains import gains_table
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.sources import base_of, load_rows, take
from modeling_vitp.modeling_vitp import ViTPVisionModel
from modeling_vitp.pretraining.arguments import SFT_MODULES, VRLArguments
from modeling_vitp.pretraining.config import ViTPTrainingConfig
from modeling_vitp.pretraining.loading import load_start
from modeling_vitp.pretraining.masked_autoencoder import MaskedAutoencoder
from modeling_vitp.pretraining.results import START
from modeling_vitp.training.base_trainer import BaseTrainer
from modeling_vitp.training.checkpointing import check_free, write_whole
from modeling_vitp.training.command_line import parse
from modeling_vitp.training.resuming import free_settings, optimizer_settings
from modeling_vitp.vrl import keyed_generator

WHOLE = (
    "lab.experiments.controls.ControlArguments",
    "lab.trees.arguments.TreePretrainArguments",
    "modeling_vitp.pretraining.config.ViTPTrainingConfig",
    "trl.ModelConfig",
)


@dataclass
class ControlArguments(Settings):
    """Arguments for the objective of the ViT."""

    objective: Literal[OBJECTIVES] = field(
        metadata={
            "help": "mae: reconstruct masked patches; masks: classify each patch as tree or ground; none: do not train."
        }
    )


class PatchClassifier(nn.Module):
    """ViT with a linear layer that classifies each patch. The ViT is trained in place."""

    def __init__(self, vit: ViTPVisionModel, num_classes: int):
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.config.hidden_size, num_classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> TokenClassifierOutput:
        """Classify the patches and compute the cross-entropy loss.

        Args:
            pixel_values: float32 of shape `(batch, channels, height, width)`.
            labels: classes, int64 of shape `(batch, patches)`, row by row; -100 for a patch without a label.
        """
        logits = self.head(self.vit(pixel_values=pixel_values).last_hidden_state[:, 1:])
        return TokenClassifierOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


class Views(Dataset):
    """Views that [`TreeInstructions`] draws, as inputs of a ViT, with pairs of epoch and row as indices.

    The views are those of the pretraining: they depend only on seed, row id and epoch.

    Args:
        rows: rows with an `id`.
        transform: instructions that draw the view.
        image_processor: image processor of the ViT.
        grid: patches a side, to add a label for each patch (1 for tree); `None` for no labels.
        seed: seed of the views.
    """

    def __init__(
        self,
        rows: Dataset,
        transform: TreeInstructions,
        image_processor: ViTPImageProcessor,
        grid: int | None,
        seed: int,
    ):
        self.rows, self.transform, self.image_processor = prepare_rows(rows), transform, image_processor
        self.grid, self.seed = grid, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, position = index
        row = self.rows[position]
        view, _ = self.transform.draw(row, keyed_generator(self.seed, row["id"], epoch, "transform"))
        pixels = self.image_processor([view.image], return_tensors="pt")["pixel_values"][0]
        inputs = {"pixel_values": pixels, "id": row["id"]}
        if self.grid is not None:
            inputs["labels"] = torch.from_numpy(cell_means(view.crowns, self.grid).ravel() > 0.5).long()
        return inputs


class ViewTrainer(BaseTrainer, Trainer):
    """Trainer with the settings, batches and views of [`~modeling_vitp.ViTPTrainer`] for a model that returns a `loss`.

    Args:
        model: model to train.
        args: training arguments.
        views: training data.
    """

    def __init__(self, model: nn.Module, args: ViTPTrainingConfig, views: Views):
        super().__init__(model, args, train_dataset=views, data_collator=default_data_collator)
        self.model_accepts_loss_kwargs = False

    def training_data(self) -> Any:
        return self.train_dataset.rows

    def run_settings(self) -> dict[str, dict[str, Any]]:
        names = "seed dataloader_drop_last per_device_train_batch_size gradient_accumulation_steps"
        objective = type(self.accelerator.unwrap_model(self.model)).__name__
        fixed = {name: getattr(self.args, name) for name in names.split()}
        fixed |= {"data_seed": self.data_seed, "objective": objective} | optimizer_settings(self.args)
        free = free_settings(self.args)
        return {"fixed": fixed, "free": {name: value for name, value in free.items() if name not in fixed}}


def main(argv: list[str] | None = None) -> int:
    own = ControlArguments, TreePretrainArguments, VRLArguments, ModelConfig
    control, args, training_args, model_args = parse(argv, __doc__, own, WHOLE, SFT_MODULES)
    output_dir = Path(training_args.output_dir)
    check_free(output_dir)
    # The same seed as in `lab.trees.pretrain` gives the same ViT. The language model is built too, but not used.
    set_seed(training_args.seed)
    splits = load_rows(args)
    splits["train"] = take(splits[base_of(args.dataset_train_split)], args.dataset_train_split)
    rows, _ = prepare(splits)
    transform = TreeInstructions(splits["train"], **(args.task_options or {}))
    model, processor = load_start(args, model_args, [])
    vit, image_processor = model.model.vision_tower, processor.image_processor
    export_backbone(vit, output_dir / START, image_processor)

    metrics = {"seed": training_args.seed, "objective": control.objective}
    if control.objective != "none":
        is_labeled = control.objective == "masks"
        grid = vit.config.image_size[0] // vit.config.patch_size[0] if is_labeled else None
        training_args.eval_strategy = "no"
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        views = Views(rows, transform, image_processor, grid, seed)
        trained = PatchClassifier(vit, num_classes=2) if is_labeled else MaskedAutoencoder(vit)
        metrics["train"] = ViewTrainer(trained, training_args, views).train_or_resume()
    export_backbone(vit, output_dir / "backbone", image_processor)
    measured = probe_backbone(splits, output_dir, training_args.seed, training_args.device)
    metrics["task"] = {split: {"backbone": found} for split, found in measured.items()}
    write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for split, found in measured.items():
        print(f"\n{split}\n\n{gains_table(found)}")
    return 0


if __name__ == "__main__":
    run(main)
