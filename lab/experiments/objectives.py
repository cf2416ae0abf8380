"""Make the ViT of a control that reads no instructions: untrained, of random weights, or a masked autoencoder.

    python -m lab.experiments.objectives --config CONFIG

The configuration is one of `vitp pretrain` with `vision_model`, `vision_image_size` and `annotations`, and an
`objective`. The output folder gets the ViT in `backbone`, and `metrics.json`. Pretraining tasks with their own views
have `lab.experiments.controls` instead.
"""

import argparse
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from lab.command import run
from modeling_vitp import export_backbone
from modeling_vitp.command.paths import read_yaml
from modeling_vitp.convert.export import image_processor_of
from modeling_vitp.modeling_vitp import build_vit
from modeling_vitp.modeling_vitp_backbone import open_vit, resize_backbone
from modeling_vitp.pretraining.data import open_data
from modeling_vitp.pretraining.masked_autoencoder import MaskedAutoencoderConfig, mae_steps, train_masked_autoencoder
from modeling_vitp.pretraining.options import PretrainingOptions, make_options
from modeling_vitp.pretraining.run import make_trainer
from modeling_vitp.training.checkpointing import write_whole
from modeling_vitp.training.costs import count_operations

BATCH = 64  # images in a step of the masked autoencoder
COUNTED_STEPS = 4  # steps of the pretraining whose operations are counted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    settings = read_yaml(parser.parse_args(argv).config)
    make_control(settings)
    return 0


def make_control(settings: Mapping[str, Any]) -> None:
    """Write the ViT of a control and its `metrics.json` to the output folder.

    Args:
        settings: configuration of `vitp pretrain` and `objective`: `none` keeps the start, `random` gives it random
            weights of the seed, and `mae` trains it as a masked autoencoder on the training images, with as many
            operations as the pretraining has without VRL.
    """
    pretraining_settings = dict(settings)
    objective = pretraining_settings.pop("objective")
    options = make_options(pretraining_settings)
    output_dir = Path(options.training.output_dir)
    set_seed(options.training.seed)
    start = resize_backbone(open_vit(options.data.vision_model), image_size=options.data.vision_image_size)
    metrics = {"seed": options.training.seed, "objective": objective}
    if objective == "mae":
        if not (output_dir / "start").exists():  # An interrupted training resumes.
            write_vit(start, options, output_dir / "start")
        metrics["mae"] = train_autoencoder(options, output_dir)
        (output_dir / "mae" / "backbone").rename(output_dir / "backbone")
    else:
        vit = build_vit(start.config) if objective == "random" else start
        write_vit(vit, options, output_dir / "backbone")
    write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def write_vit(vit: PreTrainedModel, options: PretrainingOptions, folder: Path) -> None:
    """Export a ViT with the image processor of the start."""
    side = options.data.vision_image_size
    export_backbone(vit, folder, image_processor_of(options.data.vision_model, (side, side)))


def train_autoencoder(options: PretrainingOptions, output_dir: Path) -> dict[str, Any]:
    """Train the ViT in `start` as a masked autoencoder, and return its metrics and its number of operations."""
    training_args = options.training
    operations = training_args.max_steps * operations_of_step(options)
    steps = mae_steps(open_vit(output_dir / "start").config, BATCH, operations)
    config = MaskedAutoencoderConfig(
        str(output_dir / "mae"),
        learning_rate=training_args.learning_rate,
        lr_scheduler_type=training_args.lr_scheduler_type,
        warmup_steps=training_args.warmup_steps,
        weight_decay=training_args.weight_decay,
        bf16=training_args.bf16,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        save_steps=max(steps // 2, 1),
        save_total_limit=1,
        seed=training_args.seed,
        report_to="none",
    )
    images = Path(options.data.annotations) / options.data.dataset_train_split
    metrics = train_masked_autoencoder(output_dir / "start", [images], config)
    return {"steps": steps, "operations": operations, **metrics}


def operations_of_step(options: PretrainingOptions) -> float:
    """Return the mean number of operations, forward and backward, of the first steps of a pretraining."""
    data = open_data(options.data, None, options.training.seed, evaluates=False)
    trainer = make_trainer(options, data)
    batches = trainer.get_train_dataloader()
    with count_operations() as counter:
        for batch in itertools.islice(batches, COUNTED_STEPS):
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
    return counter.get_total_flops() / COUNTED_STEPS


if __name__ == "__main__":
    run(main)
