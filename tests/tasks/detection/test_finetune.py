"""Tests of the detection recipe on small data sets of rectangles."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detection_data import NAMES, write_coco, write_dota
from detection_run import run
from launching import launch
from pictures import write_bands
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from modeling_vitp import (
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPVisionConfig,
    ViTPVisionModel,
    detect_large,
    export_backbone,
)
from modeling_vitp.recipes.finetune_detection import main

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TINY |= {"image_size": [64, 64], "patch_size": [16, 16], "attention_bias": True}
HEAD = {"neck_channels": 16, "head_hidden_size": 32, "anchor_scale": 4, "rpn_candidates_train": 60}
HEAD |= {"rpn_proposals_train": 30, "rpn_candidates_eval": 30, "rpn_proposals_eval": 20, "roi_samples": 32}
TRAIN_IMAGES = ["a_001", "a_002", "a_003", "empty_004", "a_005"]
ROTATION = {"rotation": 0.5, "vertical_flip": 0.25, "diagonal_flip": 0.25, "horizontal_flip": 0.25}
MODELS = {
    "horizontal": ViTPForObjectDetection,
    "oriented": ViTPForOrientedObjectDetection,
    "instances": ViTPForInstanceSegmentation,
}


def configure(folder: Path, task: str, **more) -> list[str]:
    """Write a data set and its configuration, and return the command-line arguments."""
    write, form, annotations = write_coco, "coco", "instances.json"
    if task == "oriented":
        write, form, annotations = write_dota, "dota", "annfiles"
    splits = {}
    for split, names in (("train", TRAIN_IMAGES), ("test", ["b_101", "b_102"])):
        write(folder / split, names)
        splits[split] = {"images": f"{split}/images", "annotations": f"{split}/{annotations}"}
    splits["server"] = splits["test"] | {"tile": {"size": 64, "overlap": 16}}
    settings = {
        "output_dir": str(folder / "out"),
        "task": task,
        "test_split": "test",
        "image_size": 64,
        "from_scratch": TINY,
        "neck": "pyramid",
        "backbone": {"pyramid_channels": 16},
        "head": HEAD,
        "max_steps": 4,
        "lr_milestones": [1.0],
        "warmup_steps": 2,
        "warmup_start": 0.5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "layer_decay": 1.0,
        "save_steps": 2,
        "logging_steps": 1,
        "num_pictures": 1,
        "watch_samples": 0,
        "bf16": False,
        "report_to": "none",
        "data": {"root": str(folder), "format": form, "classes": NAMES, "splits": splits},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | more))
    return ["--config", str(folder / "config.yaml")]


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def oriented_run(tmp_path_factory):
    """Return the folder of a run of an oriented detector with random augmentation."""
    folder = tmp_path_factory.mktemp("oriented")
    reports = {"blind_controls": True, "watch_samples": 1, "submission": {"split": "server"}}
    assert main(configure(folder, "oriented", **ROTATION, **reports)) == 0
    return folder


SCORES = {
    "horizontal": ["test_map_50", "test_map_small"],
    "oriented": ["test_map", "test_ap_50/ship"],
    "instances": ["test_box_map", "test_mask_map_75"],
}


def check_run(folder, task):
    out = folder / "out"
    assert [path.name for path in sorted((out / "watch").glob("*.png"))] == [f"step-{n:06d}.png" for n in (0, 2, 4)]
    for name in ("predictions.png", "loss.png", "README.md", "preprocessor_config.json"):
        assert (out / name).is_file()
    metrics = read_metrics(folder)
    assert metrics["train_images"] == 4  # The image without objects is left out.
    assert sum(metrics["train_objects"].values()) > 0 and set(metrics["train_objects"]) == set(NAMES)
    for name in SCORES[task]:
        for prefix in ("test_", "swapped_", "constant_"):
            assert name.replace("test_", prefix) in metrics["test"]
    model, report = MODELS[task].from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(NAMES))
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    # Two warmup steps from one half. An epoch has two steps, after which the rate is one tenth.
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-4, 1e-4])


def test_run_saves_model_scores_and_figures(oriented_run):
    check_run(oriented_run, "oriented")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["horizontal", "instances"])
def test_run_on_boxes_or_outlines_saves_model_scores_and_figures(tmp_path, task):
    assert main(configure(tmp_path, task, blind_controls=True, watch_samples=1)) == 0
    check_run(tmp_path, task)


def test_dota_submission_has_merged_windows(oriented_run):
    out = oriented_run / "out"
    assert {path.name for path in (out / "Task1").iterdir()} == {f"Task1_{name}.txt" for name in NAMES}
    assert (out / "Task1.zip").is_file()


def test_data_root_is_enough(tmp_path):
    write_coco(tmp_path / "ships", [f"a_{number:03}" for number in range(12)])
    settings = {"data_root": str(tmp_path / "ships"), "data": None, "test_split": None, "max_steps": 1}
    words = configure(tmp_path, "horizontal", **settings)
    assert main(words) == 0
    assert "test_map_50" in read_metrics(tmp_path)["test"]
    saved = tmp_path / "out" / "data.yaml"
    configuration = yaml.safe_load(saved.read_text())
    assert configuration["test_split"] == "test" and configuration["data"]["format"] == "coco"

    edited = yaml.safe_load((tmp_path / "config.yaml").read_text()) | configuration
    edited["output_dir"] = str(tmp_path / "b")
    edited.pop("data_root")
    edited["data"]["classes"] = ["ship", "plane"]
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(edited))
    assert main(["--config", str(tmp_path / "edited.yaml"), "--num_pictures", "0"]) == 0
    assert not (tmp_path / "b" / "data.yaml").exists()

    saved.write_text(saved.read_text().replace("plane", "airplane"))
    with pytest.raises(ValueError, match="data.yaml"):
        main(words)


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(tmp_path, oriented_run):
    words = configure(tmp_path, "oriented", **ROTATION)
    assert main([*words, "--max_steps", "2", "--test_split", "", "--num_pictures", "0"]) in (0, 1)
    assert main(words) == 0
    whole, resumed = (load_file(folder / "out" / "model.safetensors") for folder in (oriented_run, tmp_path))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert read_metrics(oriented_run)["test"]["test_map"] == read_metrics(tmp_path)["test"]["test_map"]
    labels = tmp_path / "train" / "annfiles" / "a_002.txt"
    labels.write_text(labels.read_text().replace("ship", "plane"))
    with pytest.raises(ValueError, match="objects.*checkpoint-4"):
        main(words)


KILLS = {
    "oriented": [("step", 1), ("optimizer", 2), ("state", 3), ("step", 3), ("before the record", 4)],
    "instances": [("step", 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", KILLS)
def test_killed_run_equals_uninterrupted_run(tmp_path, task):
    """Check a run with random proposals and dropped blocks."""
    more = {"head": HEAD | {"roi_samples": 8, "rpn_samples": 16}, "drop_path_rate": 0.2, "vertical_flip": 0.25}
    more |= {"max_steps": 5, "save_steps": 1, "empty_share": 0.2}
    assert run(configure(tmp_path / "whole", task, **more)) == 0
    words = configure(tmp_path / "killed", task, **more)
    for kill in KILLS[task]:
        assert run(words, kill) == -signal.SIGKILL
    assert run(words) == 0
    whole, killed = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
    whole, killed = (read_metrics(tmp_path / name)["test"] for name in ("whole", "killed"))
    for name in ("test_map", "test_box_map", "test_mask_map"):
        assert whole.get(name) == killed.get(name)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Check two processes without random draws. Five images give three steps of two."""
    # With a higher threshold no detection matches.
    metric = {"metric_options": {"iou_thresholds": [0.05], "interpolation": "area"}}
    more = {"head": HEAD | {"roi_samples": 500, "rpn_samples": 5000}, "per_device_train_batch_size": 1, **metric}
    more |= {"optim": "sgd", "learning_rate": 1e-2, "empty_share": 1.0, "save_steps": 2, "drop_path_rate": 0.0}
    two = configure(tmp_path / "two", "oriented", **more)
    output = tmp_path / "output.txt"
    assert launch(2, output, "detection_run.py", *two) == [0, 0], output.read_text()[-3000:]
    metrics = read_metrics(tmp_path / "two")
    assert metrics["train_images"] == 5

    one = configure(tmp_path / "one", "oriented", **more, gradient_accumulation_steps=2)
    assert main([*one, "--max_steps", "2", "--num_pictures", "0"]) == 0
    alone = load_file(tmp_path / "one" / "out" / "model.safetensors")
    weights = load_file(tmp_path / "two" / "out" / "checkpoint-2" / "model.safetensors")
    torch.testing.assert_close({name: weights[name] for name in alone}, alone, rtol=1e-4, atol=1e-6)

    scored = configure(tmp_path / "scored", "oriented", from_scratch=None, head=None, do_train=False, **metric)
    assert main([*scored, "--model_name_or_path", str(tmp_path / "two" / "out"), "--num_pictures", "0"]) == 0
    again = read_metrics(tmp_path / "scored")["test"]
    found = {key: value for key, value in metrics["test"].items() if "map" in key or "ap_" in key}
    assert found["test_map"] > 0 and found == {key: again[key] for key in found}


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("oriented", {"right_angle_classes": ["dam"]}, "right_angle_classes.*'dam'"),
        ("oriented", {"metric": "coco_average_precision"}, "coco_average_precision"),
        ("horizontal", {"submission": {"split": "test"}}, "submission"),
        ("horizontal", {"image_size": 100}, "image_size.*100"),
        ("horizontal", {"vertical_flip": 0.6}, "vertical_flip"),
        ("horizontal", {"lr_milestones": [8, 4]}, "lr_milestones"),
    ],
)
def test_incompatible_settings_are_refused(tmp_path, task, more, message):
    with pytest.raises(ValueError, match=message):
        main(configure(tmp_path, task, **more))


@pytest.mark.slow
def test_detector_trains_on_bands(tmp_path):
    start = {"model_name_or_path": str(tmp_path / "start"), "from_scratch": {}}
    words = configure(tmp_path, "oriented", watch_samples=1, **start)
    rng, names = np.random.default_rng(0), ["red", "green", "blue", "nir"]
    for path in sorted(tmp_path.rglob("*.png")):
        colors = np.asarray(Image.open(path)).transpose(2, 0, 1).astype(np.uint16) * 39
        nir = rng.integers(0, 10000, (1, *colors.shape[1:]), dtype=np.uint16)
        write_bands(path.with_suffix(".tif"), np.concatenate([colors, nir]))
        path.unlink()
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**TINY)), tmp_path / "start")
    data = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]
    bands = {"input_spec": {"band_names": names, "window": [0, 10000]}}
    assert main([*words, "--data", json.dumps(data | bands)]) == 0
    model = ViTPForOrientedObjectDetection.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert model.config.backbone_config.band_names == processor.band_names == names
    assert (tmp_path / "out/predictions.png").is_file() and (tmp_path / "out/watch/step-000000.png").is_file()
    scene = next((tmp_path / "test/images").glob("*.tif"))
    detect_large(model, processor, scene, tmp_path / "found.geojson", threshold=0.0)
    assert json.loads((tmp_path / "found.geojson").read_text())["type"] == "FeatureCollection"
    more = ["--detector", "rt_detr_v2", "--keep_ratio", "false", "--task", "horizontal", "--head", "{}"]
    more += ["--output_dir", str(tmp_path / "again"), "--model_name_or_path", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="'rt_detr_v2' .*out has 4 bands"):
        main([*words, "--data", json.dumps(data), *more])
