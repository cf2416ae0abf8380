"""Recipe `pretrain` on labeled images of the user: outputs by layout, and errors."""

import json

import numpy as np
import pytest
import yaml
from annotated_images import LAYOUTS, NAMES
from pictures import picture
from PIL import Image
from tiny_models import FROM_SCRATCH

from modeling_vitp.evaluation import pretraining
from modeling_vitp.instructions.from_annotations import labeled_views, source
from modeling_vitp.recipes import pretrain

SETTINGS = {
    "from_scratch": FROM_SCRATCH,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "watch_samples": 0,
}


def write_config(folder, **settings):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(folder / "run"), **settings}))
    return str(file)


def write_masks(root, split, names):
    for name in names:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        numbers = np.random.default_rng(int(name)).integers(0, 3, (4, 5)).repeat(30, 0).repeat(30, 1)
        picture(150, 120, int(name)).save(root / split / "images" / f"{name}.png")
        Image.fromarray(numbers.astype(np.uint8)).save(root / split / "masks" / f"{name}.png")


def write_folders(root, split, names):
    for name in names:
        folder = root / split / ("forest", "AnnualCrop")[int(name) % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(70, 60, int(name) + 1000 * (split == "test")).save(folder / f"{name}.png")


WRITERS = {"coco": LAYOUTS["coco"][0], "dota": LAYOUTS["dota"][0], "masks": write_masks, "folders": write_folders}


def labels_of(folder, layout, splits=("train", "test")):
    root = folder / "MINE"
    root.mkdir()
    for split in splits:
        WRITERS[layout](root, split, NAMES[split][:6])
    return root


def files_in(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def quick_scores(monkeypatch, quick_probe):
    """Score few views and sample few answers."""
    monkeypatch.setattr(pretraining, "SAMPLES", {"count": 3, "fine_map": 2})
    monkeypatch.setattr(pretraining, "MOST_QUESTIONS", 4)
    monkeypatch.setattr(pretraining, "MOST_NEW_TOKENS", 3)
    monkeypatch.setattr(source, "MOST_WINDOWS", 6)
    monkeypatch.setattr(labeled_views, "MOST_VIEWS", 6)


@pytest.mark.parametrize(
    "layout", ["folders", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dota", "masks"))]
)
def test_quickstart_trains_on_labels_of_any_layout(tmp_path, quick_scores, layout):
    root = labels_of(tmp_path, layout)
    before = files_in(root)
    words = ["--config", "quickstart", "--annotations", str(root), "--from_scratch", json.dumps(FROM_SCRATCH)]
    words += "--max_steps 2 --eval_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0".split()
    words += "--dataloader_persistent_workers false --save_strategy no --watch_samples 0 --bf16 false".split()
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    assert files_in(root) == before
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["train_loss"] > 0 and metrics["eval"]["eval_loss"] > 0
    assert set(metrics["probe"]["least_gain"]) >= {"linear"}
    for of_kind in metrics["answers"].values():
        for score in of_kind.values():
            assert {"own", "other_images", "constant", "least_gain", "difference", "questions"} <= set(score)
    kinds = {"folders": {"vqa"}, "masks": {"fine_map"}}.get(layout, {"vqa", "fine_map", "count"})
    assert kinds <= set(metrics["answers"])
    assert metrics["requirements"] == []
    assert (tmp_path / "run" / "backbone" / "config.json").is_file()


def test_labels_without_test_split_are_not_scored(tmp_path, monkeypatch):
    root = labels_of(tmp_path, "coco", ["train"])
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["--config", write_config(tmp_path, annotations=root.name)]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert not {"probe", "answers", "eval"} & set(metrics)


def test_missed_requirement_is_exit_status(tmp_path, quick_scores, capsys):
    root = labels_of(tmp_path, "folders")
    require = {"probe.least_gain.linear": "> 2", "train.train_loss": "> 0"}
    assert pretrain.main(["--config", write_config(tmp_path, annotations=str(root), require=require)]) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [found["passed"] for found in metrics["requirements"]] == [False, True]
    assert "probe.least_gain.linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"annotation_options": {"mosaic": 0.5}}, ["annotation_options", "mosaic", "mosaics"]),
        ({"annotation_options": {"kinds": ["maps"]}}, ["kinds", "maps", "fine_map"]),
        ({"annotation_options": {"scale": [1.2, 0.8]}}, ["scale"]),
        ({"annotation_options": {"percentiles": [1, 99]}}, ["percentiles", "volumes", "coco"]),
        ({"annotation_options": {"split": "trainig"}}, ["trainig", "train"]),
        ({"annotation_options": {"names": {"tank": "storage tank"}}}, ["tank", "plane"]),
        ({"dataset_name": "elsewhere"}, ["dataset_name", "annotations"]),
        ({"eval_strategy": "steps", "eval_steps": 1}, ["test", "eval_strategy"]),
        ({"dataset_test_split": "unseen"}, ["unseen", "train"]),
        ({"annotations": "elsewhere/missing"}, ["annotations", "elsewhere/missing"]),
        ({"annotations": "images"}, ["images"]),
        ({"annotations": None, "dataset_name": "x", "annotation_options": {"turns": 2}}, ["annotation_options"]),
        ({"require": {"probe.least_gain.linear": "high"}}, ["require", "probe.least_gain.linear"]),
    ],
)
def test_wrong_settings_are_named(tmp_path, monkeypatch, settings, names):
    root = labels_of(tmp_path, "coco", ["train"])
    (tmp_path / "images").mkdir()
    picture(60, 60).save(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as error:
        pretrain.main(["--config", write_config(tmp_path, **{"annotations": str(root), **settings})])
    assert all(name in str(error.value) for name in names), error.value
    assert not (tmp_path / "run" / "metrics.json").exists()
