"""Detectors under corruptions, with a detector that reads color-coded images."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detection_data import COLORS, NAMES, coco_contents
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from tiny_models import adapter_config

from modeling_vitp import ViTPDetectionImageProcessor
from modeling_vitp.recipes import evaluate_robustness, finetune_detection
from modeling_vitp.rotated_boxes import rectangles
from modeling_vitp.tasks.detection.trainer import TASK_MODELS, ViTPDetectionTrainer

SIDE = 240
# Class, center, half of the sides and angle. All stay whole or leave the image: the third one by a translation to the
# left, and its mirror image is seen after one to the right and after the rotation; the fourth one by both.
OBJECTS = [
    ("ship", (100, 100), (18, 10), 0.5),
    ("plane", (140, 144), (16, 10), 1.2),
    ("ship", (10, 120), (7, 12), 0.0),
    ("plane", (228, 228), (6, 5), 0.0),
]
MAIN = {"horizontal": "map_75", "oriented": "map_75", "instances": "mask_map_75"}


def scene(is_upright: bool) -> list[tuple[str, np.ndarray]]:
    found = []
    for name, center, half, angle in OBJECTS:
        points = cv2.boxPoints((center, (2 * half[0], 2 * half[1]), 0.0 if is_upright else np.degrees(angle)))
        found.append((name, points.astype(float)))
    return found


def paint(objects: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Draw objects in eight times the size, and average the pixels."""
    image = np.full((8 * SIDE, 8 * SIDE, 3), 20, np.uint8)
    for name, corners in objects:
        cv2.fillPoly(image, [(8 * corners - 0.5).round().astype(np.int32)], COLORS[NAMES.index(name)])
    return Image.fromarray(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))


def read_colors(trainer: ViTPDetectionTrainer, images: list[torch.Tensor], threshold: float = 0.0) -> list[dict]:
    """Return a detection for each connected area of one color."""
    found = []
    for image in images:
        labels, masks, boxes, corners = [], [], [], []
        for label, channel in enumerate((0, 2)):
            count, areas = cv2.connectedComponents((image[channel].numpy() > 125).astype(np.uint8))
            for area in range(1, count):
                points = np.argwhere(areas == area)[:, ::-1]
                if len(points) < 20:
                    continue  # what the border of the image leaves of an object
                labels.append(label)
                masks.append(run_lengths.encode(np.asfortranarray(areas == area, np.uint8)))
                boxes.append([*points.min(0), *points.max(0) + 1])
                center, size, angle = cv2.minAreaRect(points.astype(np.float32) + 0.5)
                corners.append(cv2.boxPoints((center, (size[0] + 1, size[1] + 1), angle)))
        one = {"labels": torch.tensor(labels), "scores": torch.ones(len(labels))}
        one["boxes"] = torch.tensor(np.array(boxes)).float().reshape(-1, 4)
        if trainer.task == "instances":
            one["masks"] = masks
        if trainer.task == "oriented":
            one["corners"] = torch.tensor(np.array(corners)).float().reshape(-1, 4, 2)
            one["boxes"] = rectangles(one["corners"])
        found.append(one)
    return found


def write_data(folder: Path, task: str) -> dict:
    """Write two images of the scene, and return the fine-tuning configuration."""
    found = {name: scene(task == "horizontal") for name in ("a", "b")}
    (folder / "images").mkdir(parents=True)
    for name, objects in found.items():
        paint(objects).save(folder / "images" / f"{name}.png")
    contents = coco_contents(found)
    for image in contents["images"]:
        image |= {"width": SIDE, "height": SIDE}
    for entry, (_, corners) in zip(contents["annotations"], (one for objects in found.values() for one in objects)):
        entry["segmentation"] = [corners.flatten().tolist()]
    (folder / "instances.json").write_text(json.dumps(contents))
    (folder / "annfiles").mkdir()
    for name, objects in found.items():
        lines = [f"{' '.join(map(str, corners.flatten()))} {label} 0" for label, corners in objects]
        (folder / "annfiles" / f"{name}.txt").write_text("\n".join(lines))
    form, annotations = ("dota", "annfiles") if task == "oriented" else ("coco", "instances.json")
    split = {"images": "images", "annotations": annotations}
    data = {"root": str(folder), "format": form, "classes": NAMES, "splits": {"test": split}}
    options = {"metric_options": {"iou_thresholds": [0.5, 0.75]}} if task == "oriented" else {}
    return {"data": data, "task": task, "test_split": "test", **options}


def save_model(folder: Path, task: str) -> Path:
    model_class = TASK_MODELS[task]
    sizes = {"neck_channels": 16, "head_hidden_size": 32, "id2label": dict(enumerate(NAMES))}
    model = model_class(model_class.config_class(backbone_config=adapter_config(), **sizes))
    model.save_pretrained(folder)
    ViTPDetectionImageProcessor().save_pretrained(folder)
    return folder


def evaluate(folder: Path, configuration: dict, *words: str, models: tuple = ("model",)) -> dict:
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    given = ["--models", *(str(folder / name) for name in models), "--data", str(folder / "config.yaml")]
    assert evaluate_robustness.main([*given, "--output_dir", str(folder / "out"), *words]) == 0
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("task", TASK_MODELS)
def test_perfect_detector_keeps_its_score(tmp_path, monkeypatch, task):
    monkeypatch.setattr(ViTPDetectionTrainer, "detect", read_colors)
    save_model(tmp_path / "model", task)
    conditions = ["--corruptions", "rotation", "scale", "translation", "--severities", "2", "4"]
    metrics = evaluate(tmp_path, write_data(tmp_path / "data", task), *conditions, "--score", MAIN[task])
    (model,) = metrics["models"]
    assert metrics["images"] == 2 and metrics["task"] == task
    assert model["clean"]["score"] == pytest.approx(1)
    assert {(item["corruption"], item["severity"]): item["score"] for item in model["conditions"]} == {
        (name, severity): pytest.approx(1) for name in ("rotation", "scale", "translation") for severity in (2, 4)
    }


def test_mirror_images_would_be_false_alarms(tmp_path, monkeypatch):
    """Score the detections in the padding too."""
    monkeypatch.setattr(ViTPDetectionTrainer, "detect", read_colors)
    monkeypatch.setattr("modeling_vitp.tasks.detection.trainer.without_padding", lambda found, item: found)
    save_model(tmp_path / "model", "oriented")
    configuration = write_data(tmp_path / "data", "oriented")
    metrics = evaluate(tmp_path, configuration, "--corruptions", "rotation", "--severities", "2")
    assert metrics["models"][0]["corruptions"]["rotation"]["score"] < 0.99 < metrics["models"][0]["clean"]["score"]


@pytest.mark.slow
def test_clean_scores_match_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(ViTPDetectionTrainer, "detect", read_colors)
    configuration = write_data(tmp_path / "data", "oriented")
    configuration["data"]["splits"]["train"] = configuration["data"]["splits"]["test"] | {"part": [0.0, 0.5]}
    configuration["data"]["splits"]["test"] |= {"part": [0.5, 1.0]}
    configuration["data"]["allow_shared_images"] = True
    save_model(tmp_path / "start", "oriented")
    settings = {"output_dir": str(tmp_path / "model"), "model_name_or_path": str(tmp_path / "start"), "max_steps": 1}
    settings |= {"image_size": 64, "num_pictures": 0, "watch_samples": 0, "bf16": False, "report_to": "none"}
    settings["metric_options"] = {"iou_thresholds": [0.99], "interpolation": "area"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration | settings | {"per_device_train_batch_size": 1}))
    assert finetune_detection.main(["--config", str(tmp_path / "run.yaml")]) == 0
    recorded = json.loads((tmp_path / "model" / "metrics.json").read_text())["test"]
    words = ["--models", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--corruptions", "haze"]
    assert evaluate_robustness.main([*words, "--severities", "1"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    clean = metrics["models"][0]["clean"]["metrics"]
    assert {f"test_{name}": value for name, value in clean.items()}.items() <= recorded.items()
    assert "map_99" in clean and metrics["metric_options"] == settings["metric_options"]


def test_unsupported_detectors_are_named(tmp_path):
    save_model(tmp_path / "model", "horizontal")
    save_model(tmp_path / "other", "instances")
    configuration = write_data(tmp_path / "data", "horizontal")

    def says(message, *words, models=("model",), **data):
        changed = configuration | {"data": configuration["data"] | data}
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, changed, "--corruptions", "haze", *words, models=models)

    says("window: not supported for .*model", "--window", "64")
    says("'boat'.*2 classes of .*model", classes=["boat"], leave_out=[*NAMES])
    says("'test' needs annotations", splits={"test": {"images": "images"}})
    says("other and .*model differ in their .*task", models=("model", "other"))
    says("red, green and blue.*model", input_spec={"band_names": ["VV", "VH"]})
