"""Choice of the backbone between the start and the pretrained ViT."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modeling_vitp import ViTPVisionModel
from modeling_vitp.adaptation.adapt import interpolate_backbone
from modeling_vitp.adaptation.interpolation import ALPHAS, choose_alpha
from modeling_vitp.adaptation.probing import Prober
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.evaluation.comparison import Progress


def scores_of(values, spread: float = 0.01) -> list[dict]:
    """Return scores whose differences have the standard deviation `spread` over resamples, up to a factor of sqrt 2."""
    generator = np.random.default_rng(0)
    common = generator.standard_normal(2000)
    scores = []
    for alpha, value in zip(ALPHAS, values):
        noise = generator.standard_normal(2000) * spread / np.sqrt(2)
        resampled = value + common + noise
        scores.append({"alpha": alpha, "score": value, "resampled": resampled.tolist(), "cases": 100})
    return scores


@pytest.mark.parametrize(
    ("values", "alpha"),
    [
        ([0.70, 0.70, 0.70, 0.70, 0.70], 0.0),
        ([0.70, 0.76, 0.78, 0.74, 0.70], 0.5),
        ([0.70, 0.775, 0.78, 0.74, 0.70], 0.25),  # within one standard error of the best
        ([0.70, 0.72, 0.74, 0.76, 0.78], 1.0),
        ([0.78, 0.76, 0.74, 0.72, 0.70], 0.0),
        ([0.70, 0.705, 0.70, 0.70, 0.70], 0.0),
    ],
)
def test_smallest_alpha_within_one_standard_error(values, alpha):
    """The resampled scores share noise that is a hundred times their difference, and only the rest counts."""
    assert choose_alpha(scores_of(values)) == alpha


@pytest.fixture
def folder(model_and_processor, tmp_path) -> Path:
    """Folder of an adaptation with a pretrained model and its backbone, and the start beside it."""
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "out" / "pretraining")
    processor.save_pretrained(tmp_path / "out" / "pretraining")
    ViTPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "start")
    return tmp_path / "out"


def interpolate(folder: Path, values, monkeypatch, force: bool = False) -> Progress:
    """Choose the backbone by given scores."""

    def score(self, backbones, split, output):
        assert split == "val"
        entries = []
        for backbone, entry in zip(backbones, scores_of(values)):
            for probe in ("20-NN", "linear"):
                value = entry["score"] if probe == "linear" else 1 - entry["score"]
                entries.append({**entry, "backbone": backbone, "probe": probe, "score": value})
        return entries

    monkeypatch.setattr(Prober, "score", score)
    progress = Progress(folder / "progress.json")
    start = SimpleNamespace(vit=str(folder.parent / "start"), name="start")
    args = SimpleNamespace(force=force)
    backbones = SimpleNamespace(folder=folder, progress=progress, start=start, args=args)
    interpolate_backbone(Prober(SimpleNamespace(task="segmentation"), 32, 0), backbones)
    return progress


def test_backbone_is_replaced_by_the_chosen_one(folder, model_and_processor, monkeypatch):
    progress = interpolate(folder, [0.70, 0.76, 0.78, 0.74, 0.70], monkeypatch)
    assert progress.parts["interpolation/backbone"]["result"].startswith("0.5 of the way")
    start = AutoModel.from_pretrained(folder.parent / "start").state_dict()
    trained = model_and_processor[0].model.vision_tower.state_dict()
    backbone = AutoModel.from_pretrained(folder / "pretraining" / "backbone").state_dict()
    for name, weight in backbone.items():
        torch.testing.assert_close(weight, torch.lerp(start[name], trained[name], 0.5))
    assert sorted(path.name for path in folder.iterdir()) == ["pretraining", "progress.json"]


def test_interrupted_choice_begins_anew(folder, monkeypatch):
    (folder / "between" / "alpha_0").mkdir(parents=True)
    (folder / "between" / "alpha_0" / "half_written").touch()
    progress = interpolate(folder, [0.70, 0.72, 0.74, 0.76, 0.78], monkeypatch)
    assert progress.parts["interpolation/backbone"]["result"].startswith("1 of the way")
    assert not (folder / "between").exists()


def test_start_is_kept_unless_forced(folder, monkeypatch):
    values = [0.78, 0.76, 0.74, 0.72, 0.70]
    for _ in range(2):
        with pytest.raises(RunStopped, match="Keep start: .*0.780 at 0.*--force"):
            interpolate(folder, values, monkeypatch)
    progress = interpolate(folder, values, monkeypatch, force=True)
    assert progress.parts["interpolation/backbone"]["result"].startswith("0.25 of the way")
