"""The quickstart as a user runs it. Its control, a frozen ViT, is run from the wheel in `test_command.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
