"""The base of the experiments. `test_pretrain.py` runs its control, a ViT that does not learn."""

import json
import subprocess
import sys

import pytest
import yaml
from paths import PLANS, ROOT

from lab.experiments.variants import look_up


@pytest.mark.slow
def test_quickstart_learns_to_see(tmp_path):
    command = [sys.executable, "-m", "lab.trees.pretrain", "--config", "lab/trees/quickstart.yaml"]
    done = subprocess.run([*command, "--output_dir", tmp_path / "quickstart"], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    metrics = json.loads((tmp_path / "quickstart" / "metrics.json").read_text())
    scores = metrics["task"]["test"]
    count = scores["count"]
    assert count["mean_error"] <= 0.8 * count["mean_error_constant_median"]
    assert count["mean_error"] <= 0.8 * count["mean_error_swapped_images"]
    boxes = scores["grounding_by_map"]
    assert boxes["mean_iou"] > max(boxes["mean_iou_blind_constant"], boxes["mean_iou_swapped_images"])
    areas = {name: probes["linear"]["patch_auc"] for name, probes in scores["backbone"]["scores"].items()}
    assert areas.pop("backbone") > max(areas.values()) + 0.02
    assert scores["teacher_forcing"]["map"]["loss"] < scores["teacher_forcing"]["map"]["loss_swapped_images"]
    assert (tmp_path / "quickstart" / "backbone" / "model.safetensors").is_file()
    for config in PLANS.glob("experiment_*.yaml"):
        for path in yaml.safe_load(config.read_text())["measures"].values():
            if path.startswith("task."):  # other measures need an experiment
                look_up(metrics, path)
