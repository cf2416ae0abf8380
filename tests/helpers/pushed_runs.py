"""Pushes of the recipes, called as from the command line, and the resulting repo."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from modeling_vitp.recipes import pretrain, push_to_hub


def train(folder: Path, **settings) -> int:
    """Run `pretrain.main` with a configuration file."""
    config = {"output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False}
    config |= {"gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "save_steps": 1}
    config |= {"watch_samples": 0, **settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return pretrain.main(["--config", str(folder / "recipe.yaml")])


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def push(*words) -> int:
    """Run `push_to_hub.main` as from the command line."""
    return push_to_hub.main(list(map(str, words)))


def in_repo(hub, *args, **kwargs) -> dict[str, bytes]:
    """Return paths and contents, except for files that the Hub adds."""
    files = hub.files(*args, **kwargs)
    del files[".gitattributes"]
    return files
