"""The base of the experiments: its run has every score that their plans measure."""

import json

import pytest
import yaml
from paths import PLANS, ROOT

from lab.experiments.variants import look_up
from lab.trees.pretrain import main


@pytest.mark.slow
def test_base_has_the_measures_of_the_plans(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = "--max_steps 2 --save_strategy no --eval_strategy no --watch_samples 0 --dataloader_num_workers 0".split()
    options += ["--dataloader_persistent_workers", "false", "--output_dir", str(tmp_path / "run")]
    assert main(["--config", "lab/trees/quickstart.yaml", *options]) == 1  # two steps do not pass its gate
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert not metrics["task"]["passed"]
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()
    for config in PLANS.glob("experiment_*.yaml"):
        for path in yaml.safe_load(config.read_text())["measures"].values():
            if path.startswith("task."):  # other measures need an experiment
                look_up(metrics, path)
