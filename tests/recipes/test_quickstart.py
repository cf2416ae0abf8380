"""The quickstart as a user runs it, and its control: a ViT that does not learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_vitp.recipes.pretrain import main


@pytest.mark.slow
def test_quickstart_meets_its_requirements(tmp_path):
    vitp = Path(sys.executable).with_name("vitp")
    done = subprocess.run([vitp, "pretrain", "--config", "quickstart"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    metrics = json.loads((tmp_path / "outputs" / "quickstart" / "metrics.json").read_text())
    scores = metrics["probe"]["scores"]
    assert set(scores) == {"backbone", "at the start", "random weights", "pixels of a patch"}
    for probe in ("linear", "nonlinear"):
        areas = {name: of_name[probe]["patch_auc"] for name, of_name in scores.items()}
        assert areas.pop("backbone") > max(areas.values()) + 0.02
    errors = metrics["answers"]["count"]["mean_error"]
    assert errors["own"] <= 0.8 * min(errors["constant"], errors["other_images"])
    areas = metrics["answers"]["fine_map"]["largest_area_iou"]
    assert areas["own"] > max(areas["constant"], areas["other_images"])
    assert len(metrics["requirements"]) == 5 and all(found["passed"] for found in metrics["requirements"])
    assert (tmp_path / "outputs" / "quickstart" / "backbone" / "model.safetensors").is_file()


@pytest.mark.slow
def test_frozen_vit_fails_requirements(tmp_path, capsys):
    options = "--freeze vision --max_steps 4 --eval_strategy no --save_strategy no --watch_samples 0".split()
    options += ["--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"]
    assert main(["--config", "quickstart", "--output_dir", str(tmp_path / "run"), *options]) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    gains = metrics["probe"]["gains"]
    assert gains["linear"]["at the start"] == gains["nonlinear"]["at the start"] == 0
    assert "probe.least_gain.linear" in capsys.readouterr().err
