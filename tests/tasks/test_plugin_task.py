"""Task of a plugin, `docs/examples/regression.py`, in all commands that know tasks."""

import json
import runpy
import sys

import numpy as np
import pytest
from dense_data import TINY, tiny_backbone
from paths import ROOT
from PIL import Image
from tiny_models import FROM_SCRATCH
from transformers import AutoModelForImageClassification

from modeling_vitp import ViTPImageProcessor, adapt, export_backbone
from modeling_vitp.recipes import finetune, probe

pytestmark = pytest.mark.usefixtures("forget_plugins")

PLUGIN = str(ROOT / "docs" / "examples" / "regression.py")
TRAINING = "--dataloader_num_workers 0 --report_to none --bf16 false --save_strategy no --watch_samples 0"
SIDE = 32


def write_numbers(root, num_images) -> dict[str, float]:
    """Write gray images of which the number is the brightness between 0 and 10, and return the numbers by file name."""
    rng = np.random.default_rng(0)
    numbers = {}
    for split, number in num_images.items():
        (root / split).mkdir(parents=True)
        for index in range(number):
            brightness = rng.integers(20, 235)
            pixels = brightness + rng.integers(-20, 20, (SIDE, SIDE, 3))
            file_name = f"{split}/{index:03}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / file_name)
            numbers[file_name] = brightness / 25.5
    lines = [f"{file_name},{number}" for file_name, number in numbers.items()]
    (root / "numbers.csv").write_text("\n".join(["file_name,number", *lines]) + "\n")
    return numbers


@pytest.mark.slow
def test_task_of_plugin_is_fine_tuned(tmp_path, monkeypatch):
    numbers = write_numbers(tmp_path / "data", {"train": 48, "test": 16})
    words = f"--plugins {PLUGIN} --data_root {tmp_path / 'data'} --test_split test --output_dir {tmp_path / 'tuned'}"
    words += f" --image_size {SIDE} --max_steps 50 --per_device_train_batch_size 16 --learning_rate 2e-2 {TRAINING}"
    words = [*words.split(), "--from_scratch", json.dumps(TINY), "--eval_strategy", "no"]
    monkeypatch.setattr(sys, "argv", [])  # which the command replaces
    assert finetune.main(["regression", *words]) == 0

    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    assert metrics["main_score"] == "rmse" and metrics["greater_is_better"] is False
    scored = np.array([number for name, number in numbers.items() if name.startswith("test")])
    trained = np.array([number for name, number in numbers.items() if name.startswith("train")])
    constant_error = np.sqrt(np.mean((scored - trained.mean()) ** 2))
    assert metrics["test"]["test_rmse"] < 0.7 * constant_error
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert f"| test | rmse | {metrics['test']['test_rmse']:.4g} |" in card and "finetune_regression" in card
    assert (tmp_path / "tuned" / "predictions.png").is_file()


def test_unknown_task_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vitp", "finetune_counting", "--data_root", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_module("modeling_vitp", run_name="__main__", alter_sys=False)
    assert "'counting'" in capsys.readouterr().err


def test_probe_of_plugin_matches_scikit_learn(tmp_path):
    write_numbers(tmp_path / "data", {"train": 24, "test": 12})
    backbone = export_backbone(tiny_backbone(initializer_range=0.2), tmp_path / "backbone", ViTPImageProcessor())
    words = ["--plugins", PLUGIN, "--task", "regression", "--data_root", str(tmp_path / "data"), "--l2", "0.1"]
    words += ["--backbones", str(backbone), "--output_dir", str(tmp_path / "probed"), "--image_size", str(SIDE)]
    assert probe.main(words) == 0
    (result,) = json.loads((tmp_path / "probed" / "metrics.json").read_text())["results"]
    features = {}
    for path in (tmp_path / "probed" / "features").glob("*.npy"):
        array = np.load(path)
        features["train" if len(array) == 24 else "test"] = array
    assert features["train"].shape[0] == 24 and features["test"].shape[0] == 12
    with pytest.raises(ValueError, match="num_neighbours"):
        probe.main([*words, "--num_neighbours", "3"])

    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    table = (tmp_path / "data" / "numbers.csv").read_text().splitlines()[1:]
    numbers = np.array([float(line.split(",")[1]) for line in table])
    scaler = StandardScaler().fit(features["train"])
    ridge = Ridge(alpha=0.1 * 24).fit(scaler.transform(features["train"]), numbers[:24])
    predicted = ridge.predict(scaler.transform(features["test"]))
    deviations = np.sum((numbers[24:] - numbers[:24].mean()) ** 2)
    expected = 1 - np.sum((numbers[24:] - predicted) ** 2) / deviations
    assert np.isclose(result["scores"]["r2"]["mean"], expected, atol=1e-3)


@pytest.mark.slow
def test_adapt_compares_backbones_on_task_of_plugin(tmp_path):
    write_numbers(tmp_path / "data", {"train": 24, "val": 12, "test": 12})
    (tmp_path / "rows" / "images").mkdir(parents=True)
    rows = []
    for index in range(16):
        name = f"images/{index}.png"
        level = 15 * index
        Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(tmp_path / "rows" / name)
        question = {"role": "user", "content": "<image>\nIs the image bright?"}
        answer = {"role": "assistant", "content": "Yes" if level > 120 else "No"}
        rows.append(json.dumps({"images": [name], "messages": [question, answer]}))
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows) + "\n")
    report = adapt(
        tmp_path / "data",
        task="regression",
        instructions=str(tmp_path / "rows"),
        baselines=["random"],
        output_dir=tmp_path / "adapted",
        plugins=[PLUGIN],
        pretraining={"from_scratch": FROM_SCRATCH, "bf16": False, "watch_samples": 0},
        fine_tuning={"bf16": False, "image_size": 28},
        steps=4,
        fine_tuning_steps=4,
        seeds=[0],
        learning_rates=[1e-3],
        force=True,
    )
    assert report.task == "regression"
    assert report.metric == "rmse" and not report.greater_is_better
    assert {entry["model"] for entry in report.fine_tuned} == {"adapted", "random"}
    assert {entry["model"] for entry in report.frozen} == {"adapted", "random"}
    page = (tmp_path / "adapted" / "bundle" / "README.md").read_text()
    assert "A lower rmse is better." in page and "points of rmse" not in page
