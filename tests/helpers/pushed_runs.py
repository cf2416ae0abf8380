"""Training that pushes, and the cards that are there afterwards."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from modeling_vitp.recipes import pretrain


def train(folder: Path, **settings) -> int:
    """`pretrain.main` on a configuration file."""
    config = {"output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False}
    config |= {"gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "save_steps": 1, **settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return pretrain.main(["--config", str(folder / "recipe.yaml")])


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())
