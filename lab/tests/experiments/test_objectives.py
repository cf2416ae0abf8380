"""Controls that read no instructions: the start, random weights, and a masked autoencoder of equal operations."""

import json

import pytest
import torch
import yaml
from classification_data import write_folders
from transformers import AutoModel
from vision_families import save_language_model, save_vit

from lab.experiments import objectives
from modeling_vitp.modeling_vitp_backbone import open_vit, resize_backbone
from modeling_vitp.pretraining.masked_autoencoder import MaskedAutoencoder
from modeling_vitp.training.costs import count_operations

SIDE = 28


@pytest.fixture
def settings(tmp_path):
    """Configuration of a tiny pretraining at a smaller size than that of the ViT."""
    save_vit(tmp_path / "vit", "dinov2")
    save_language_model(tmp_path / "lm")
    write_folders(tmp_path / "images", {"train": 8}, ("field", "forest"))
    return {
        "vision_model": str(tmp_path / "vit"),
        "language_model": str(tmp_path / "lm"),
        "annotations": str(tmp_path / "images"),
        "dataset_test_split": "",
        "vision_image_size": SIDE,
        "max_patches": 1,
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "bf16": False,
        "seed": 0,
    }


def make(settings: dict, tmp_path, objective: str, seed: int = 0) -> tuple[dict, torch.nn.Module]:
    """Run an objective by its command, and return its metrics and its ViT."""
    folder = tmp_path / f"{objective}_{seed}"
    config = tmp_path / f"{objective}_{seed}.yaml"
    config.write_text(yaml.safe_dump(settings | {"objective": objective, "seed": seed, "output_dir": str(folder)}))
    assert objectives.main(["--config", str(config)]) == 0
    return json.loads((folder / "metrics.json").read_text()), AutoModel.from_pretrained(folder / "backbone")


def weights_of(vit: torch.nn.Module) -> torch.Tensor:
    """Return the matrices of all layers: norms and biases begin at ones and zeros for every seed."""
    return torch.nn.utils.parameters_to_vector(weight for weight in vit.encoder.parameters() if weight.ndim == 2)


def test_start_is_kept_and_random_weights_follow_the_seed(settings, tmp_path):
    start = resize_backbone(open_vit(settings["vision_model"]), image_size=SIDE)
    _, kept = make(settings, tmp_path, "none")
    assert torch.equal(weights_of(kept), weights_of(start))
    _, first = make(settings, tmp_path, "random", seed=0)
    _, second = make(settings, tmp_path, "random", seed=1)
    assert first.config.image_size == second.config.image_size == SIDE
    assert not torch.equal(weights_of(first), weights_of(second))
    for vit in (first, second):
        assert abs(torch.corrcoef(torch.stack([weights_of(vit), weights_of(start)]))[0, 1]) < 0.2


def test_masked_autoencoder_takes_as_many_operations(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "BATCH", 4)
    metrics, vit = make(settings, tmp_path, "mae")
    start = resize_backbone(open_vit(settings["vision_model"]), image_size=SIDE)
    assert not torch.equal(weights_of(vit), weights_of(start))
    counter = count_operations()
    with counter:
        MaskedAutoencoder(start).train()(torch.rand(4, 3, SIDE, SIDE)).loss.backward()
    step = counter.get_total_flops()
    mae = metrics["mae"]
    assert abs(mae["steps"] * step - mae["operations"]) <= step / 2

    # The pretraining reads 4 images of 4 patches and their text: its ViT alone takes more than 12 autoencoded patches.
    counter = count_operations()
    with counter:
        start.train()(torch.rand(4, 3, SIDE, SIDE)).last_hidden_state.sum().backward()
    assert mae["operations"] / settings["max_steps"] > counter.get_total_flops()
