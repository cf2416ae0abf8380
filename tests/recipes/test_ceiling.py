"""Supervision on the sample's crowns, for a few steps."""

import json

import torch
import yaml
from paths import AERIAL_TREES, CONFIGS
from transformers import AutoModel

from modeling_vitp.recipes.tasks.trees import ceiling


def test_a_few_steps_leave_two_backbones_and_what_is_read_from_them(tmp_path, monkeypatch, capsys):
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text()) | {"dataset_name": str(AERIAL_TREES)}
    settings["per_device_train_batch_size"] = 2
    settings["from_scratch"]["vision_config"] |= {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(ceiling, "find_config", lambda name: tmp_path / "small.yaml")
    monkeypatch.setattr("modeling_vitp.recipes.tasks.trees.probe_data.VIEWS_PER_WINDOW", 1)
    assert ceiling.main(["--output_dir", str(tmp_path), "--max_steps", "3"]) == 0
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured.keys() == {"test", "second_scene"}
    assert "| backbone |" in capsys.readouterr().out
    start, end = (AutoModel.from_pretrained(tmp_path / name) for name in ("backbone_at_start", "backbone"))
    assert not torch.equal(start.encoder.layer[0].mlp.fc1.weight, end.encoder.layer[0].mlp.fc1.weight)
