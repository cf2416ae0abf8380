"""Pretraining on the tree task: its gate, and its arguments."""

import json

import pytest
import yaml
from paths import AERIAL_TREES, TREES_BASE
from tiny_models import FROM_SCRATCH

from lab.trees import answers, evaluation, pretrain
from lab.trees.arguments import TreePretrainArguments


def run(folder, **settings) -> int:
    """Run a pretraining of a tiny model with a configuration file."""
    config = {
        "output_dir": str(folder / "run"),
        "dataset_name": str(AERIAL_TREES),
        "from_scratch": FROM_SCRATCH,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "bf16": False,
        "watch_samples": 0,
        **settings,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return pretrain.main(["--config", str(folder / "run.yaml")])


@pytest.fixture
def few_answers(monkeypatch, quick_probe):
    """Answer few questions on few views; `test_quickstart.py` runs the whole evaluation."""
    for module, name, number in (
        (answers, "NUM_SAMPLES", 3),
        (answers, "NUM_MAPS", 3),
        (answers, "VIEWS_PER_WINDOW", 2),
        (evaluation, "PROBE_VIEWS", 1),
    ):
        monkeypatch.setattr(module, name, number)


@pytest.mark.slow
def test_run_that_misses_gate_fails(tmp_path, capsys, few_answers):
    assert run(tmp_path, max_steps=1) == 1
    task = json.loads((tmp_path / "run" / "metrics.json").read_text())["task"]
    assert task["passed"] is False
    assert set(task["gate"]["error_ratios"]) == {"to_constant_median", "to_swapped_images"}
    assert {"correlation", "mean_error_swapped_images"} <= set(task["second_scene"]["count"])
    assert set(task["gate"]["least_gains"]) == {"linear", "nonlinear", "grounding"}
    assert {"mean_iou", "mean_iou_blind_constant"} <= set(task["test"]["grounding"])
    assert set(task["test"]["grounding_by_map"]) == set(task["test"]["grounding"])
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 10_000
    output = capsys.readouterr()
    assert "gate" in output.err
    assert 'AutoModel.from_pretrained("' in output.out


@pytest.mark.slow
def test_frozen_vit_misses_gate(tmp_path, few_answers):
    """The backbone of a frozen ViT is its start after any number of steps."""
    config = yaml.safe_load(TREES_BASE.read_text())
    config |= {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0}
    config |= {"dataloader_persistent_workers": False, "freeze": ["vision"]}
    assert run(tmp_path, **config | {"output_dir": str(tmp_path / "run"), "dataset_name": str(AERIAL_TREES)}) == 1
    task = json.loads((tmp_path / "run" / "metrics.json").read_text())["task"]
    assert not task["passed"] and task["gate"]["least_gains"]["linear"] <= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "bushes"}, "'trees'.*'bushes'"),
        ({"task_options": {"map_shar": 0.5}}, "'map_shar'.*map_share"),
        ({"task_options": 3}, "task_options"),
        ({"columns": {"image": "photo"}}, "columns"),
        ({"dry_run": True}, "dry_run"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TreePretrainArguments(**{"dataset_name": str(AERIAL_TREES), **settings})


def test_options_may_be_json():
    arguments = TreePretrainArguments(dataset_name=str(AERIAL_TREES), task_options='{"map_share": 0.5}')
    assert arguments.task_options == {"map_share": 0.5} and arguments.task == "trees"
