"""Stages of an adaptation without their trainings: resuming, early stop, time that is left."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_vitp.adaptation import pretraining, probing, runs
from modeling_vitp.adaptation.backbones import Start
from modeling_vitp.adaptation.pretraining import Pretraining, early_comparison, pretrain
from modeling_vitp.adaptation.probing import Prober, compare_with_start
from modeling_vitp.adaptation.report import untested
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.evaluation.comparison import Progress


@pytest.fixture
def trainings(monkeypatch):
    """Replace the pretraining, and return the list of the steps that it was stopped at."""
    stopped_at = []

    def run_pretraining(settings, output):
        stopped_at.append(settings.get("stop_at_step", settings["max_steps"]))
        if "stop_at_step" in settings:
            raise RunStopped("stopped", 0)
        return {"train": {"train_runtime": 1.0}}

    monkeypatch.setattr(runs, "run_pretraining", run_pretraining)
    monkeypatch.setattr(pretraining, "last_checkpoint", lambda output: "checkpoint")
    return stopped_at


def run_pretrain(folder: Path, steps: int = 20, is_worse: bool = False, force: bool = False) -> Progress:
    """Run or resume a pretraining."""
    progress = Progress(folder / "progress.json")
    settings = Pretraining(Start({}, None, "random"), {}, {}, "instructions", 0, folder / "plan")
    plan = {"steps": steps, "settings": {}}
    look = {"is_worse": is_worse, "text": "accuracy 0.2"}
    pretrain(settings, plan, folder / "pretraining", progress, lambda checkpoint: look, force)
    return progress


def test_pretraining_looks_early_and_is_run_once(tmp_path, trainings):
    progress = run_pretrain(tmp_path)
    assert list(progress.parts) == ["pretraining/early", "pretraining/look", "pretraining/run"]
    assert run_pretrain(tmp_path).parts == progress.parts and trainings == [2, 20]
    assert early_comparison(progress) == {"early": "accuracy 0.2"}
    (tmp_path / "short").mkdir()
    progress = run_pretrain(tmp_path / "short", steps=4)
    assert trainings[2:] == [4] and early_comparison(progress) == {}


def test_worse_backbone_stops_unless_forced(tmp_path, trainings):
    for _ in range(2):
        with pytest.raises(RunStopped, match="After 2 of 20 steps .*: accuracy 0.2.*--force"):
            run_pretrain(tmp_path, is_worse=True)
    assert trainings == [2]
    run_pretrain(tmp_path, force=True)
    assert trainings == [2, 20]


def test_failed_pretraining_is_not_a_finished_part(tmp_path, trainings, monkeypatch):
    def run_pretraining(settings, output):
        raise RunStopped("failed", 1)

    monkeypatch.setattr(runs, "run_pretraining", run_pretraining)
    with pytest.raises(RunStopped, match="failed"):
        run_pretrain(tmp_path)
    assert not Progress(tmp_path / "progress.json").parts


@pytest.mark.parametrize(("score", "is_worse"), [(0.2, True), (0.8, False)])
def test_backbone_is_compared_with_its_start(tmp_path, monkeypatch, score, is_worse):
    def score_both(self, backbones, split, output):
        noise = np.random.default_rng(0).standard_normal(1000) * 0.01
        entries = []
        for probe in ("20-NN", "linear"):
            for backbone, value in zip(backbones, (score, 0.5)):
                entry = {"backbone": backbone, "probe": probe, "score": value, "cases": 1000}
                entries.append(entry | {"resampled": (value + noise).tolist()})
        return entries

    monkeypatch.setattr(probing, "export_backbone", lambda checkpoint, folder: folder)
    monkeypatch.setattr(Prober, "score", score_both)
    prober = Prober(SimpleNamespace(task="segmentation"), 32, 0)
    (tmp_path / "early").mkdir()
    comparison = compare_with_start(prober, "checkpoint", "start", tmp_path / "early")
    assert comparison["is_worse"] == is_worse and not (tmp_path / "early").exists()
    assert comparison["text"].startswith(f"mIoU {score:.3f} instead of 0.500 (95% interval")


def test_missing_controls_are_noted():
    plan = {"seeds": [0]}
    assert len(untested(plan, {"answers": {}}, ["mae with seed 1 is left out"])) == 4
    assert len(untested({"seeds": [0, 1]}, {"answers": {"count": {}}}, [])) == 1
