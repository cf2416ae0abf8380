"""What else the ViT of a pretraining could be trained by, on the very views: what instructions are compared with.

    python -m modeling_vitp.recipes.experiments.controls --config quickstart --objective masks

Start, views, batches and rates are those of `vitp pretrain` with the same configuration. What is left has its form too:
`backbone`, `backbone_at_start`, and in `metrics.json` what is read from them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed
from trl import ModelConfig

from modeling_vitp import ViTPImageProcessor, export_backbone
from modeling_vitp.instructions.sources import base_of, load_rows, take
from modeling_vitp.probing.gains import gains_table
from modeling_vitp.recipes.experiments.objectives import MaskedAutoencoder, PatchClassifier
from modeling_vitp.recipes.experiments.view_trainer import ViewTrainer
from modeling_vitp.recipes.tasks.trees.evaluation import probe_backbone
from modeling_vitp.recipes.tasks.trees.instructions import TreeInstructions, cell_means, prepare
from modeling_vitp.training.arguments import SFT_MODULES, Arguments, PretrainArguments, VRLArguments
from modeling_vitp.training.checkpointing import check_free, write_whole
from modeling_vitp.training.command_line import parse, run
from modeling_vitp.training.loading import load_start
from modeling_vitp.training.results import START

WHOLE = (
    "modeling_vitp.recipes.experiments.controls.ControlArguments",
    "modeling_vitp.training.arguments.PretrainArguments",
    "modeling_vitp.training.vitp_config.ViTPTrainingConfig",
    "trl.ModelConfig",
)


@dataclass
class ControlArguments(Arguments):
    """What the ViT is trained by."""

    choices = {"objective": ("none", "mae", "masks")}

    objective: str = field(
        metadata={"help": "mae: pixels of masked patches; masks: of each patch, whether it is tree; none: nothing."}
    )


@dataclass
class Encoding:
    """From a row, the view of it that [`TreeInstructions`] draws, as a ViT takes it.

    Args:
        grid: patches along each side of the view, of which it is told whether they are tree; `None` to tell nothing.
    """

    transform: TreeInstructions
    image_processor: ViTPImageProcessor
    grid: int | None

    def __call__(self, row: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
        view, _ = self.transform.draw(row, generator)
        inputs = {"pixel_values": self.image_processor([view.image], return_tensors="pt")["pixel_values"][0]}
        if self.grid is not None:
            inputs["labels"] = torch.from_numpy(cell_means(view.crowns, self.grid).ravel() > 0.5).long()
        return inputs


def main(argv: list[str] | None = None) -> int:
    own = ControlArguments, PretrainArguments, VRLArguments, ModelConfig
    control, args, training_args, model_args = parse(argv, __doc__, own, WHOLE, SFT_MODULES)
    output_dir = Path(training_args.output_dir)
    check_free(output_dir)
    # As in `vitp pretrain`, so that the ViT has the same weights; the language model, made after it, is not used.
    set_seed(training_args.seed)
    splits = load_rows(args)
    splits["train"] = take(splits[base_of(args.dataset_train_split)], args.dataset_train_split)
    rows, _ = prepare(splits)
    transform = TreeInstructions(splits["train"], **(args.task_options or {}))
    model, processor = load_start(model_args, args.from_scratch, [], args.drop_path_rate)
    vit, image_processor = model.model.vision_tower, processor.image_processor
    export_backbone(vit, output_dir / START, image_processor)

    metrics = {"seed": training_args.seed, "objective": control.objective}
    if control.objective != "none":
        is_labelled = control.objective == "masks"
        grid = vit.config.image_size[0] // vit.config.patch_size[0] if is_labelled else None
        training_args.eval_strategy = "no"
        trainer = ViewTrainer(
            PatchClassifier(vit, num_classes=2) if is_labelled else MaskedAutoencoder(vit),
            training_args,
            rows,
            Encoding(transform, image_processor, grid),
        )
        metrics["train"] = trainer.train_or_resume()
    export_backbone(vit, output_dir / "backbone", image_processor)
    measured = probe_backbone(splits, output_dir, training_args.seed, training_args.device)
    metrics["task"] = {split: {"backbone": found} for split, found in measured.items()}
    write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for split, found in measured.items():
        print(f"\n{split}\n\n{gains_table(found)}")
    return 0


if __name__ == "__main__":
    run(main)
