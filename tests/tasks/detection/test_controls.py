"""Tests of the control scores with detectors whose detections are known."""

from types import SimpleNamespace

import evaluate
import pytest
import torch

from modeling_vitp.metrics.report import METRICS_FOLDER
from modeling_vitp.tasks.detection.controls import blind_scores
from modeling_vitp.tasks.detection.trainer import ViTPDetectionTrainer, reference

SIZES = [(40, 60), (80, 60), (40, 30)]


def corners_of(boxes):
    left, top, right, bottom = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4).unbind(1)
    return torch.stack([left, top, right, top, right, bottom, left, bottom], 1).view(-1, 4, 2)


def sample(name, size, boxes, labels=None):
    """Return an item with upright boxes, given relative to the image size."""
    height, width = size
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist()):
        mask[top:bottom, left:right] = 1
    no = torch.zeros(len(boxes), dtype=torch.bool)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    image = torch.full((3, height, width), int(name[-1]), dtype=torch.uint8)
    found = {"id": name, "image": image, "labels": labels, "difficult": no, "crowd": no, "masks": masks}
    return found | {"corners": corners_of(boxes), "area": torch.full((len(boxes),), float("nan"), dtype=torch.float64)}


def trainer_of(task, items, **options):
    """Trainer whose detections are exactly the annotated objects."""
    name = "average_precision" if task == "oriented" else "coco_average_precision"
    metrics = {"": evaluate.load(str(METRICS_FOLDER / name), num_labels=2)}
    if task == "instances":
        masks = evaluate.load(str(METRICS_FOLDER / name), num_labels=2, masks=True)
        metrics = {"box_": metrics[""], "mask_": masks}

    def detect(images):
        found = [reference(items[int(image[0, 0, 0])], task) for image in images]
        found = [item | {"scores": torch.ones(len(item["labels"]))} for item in found]
        # Oriented detections also have boxes as centers, sides and angles.
        if task != "oriented":
            return found
        return [item | {"boxes": torch.zeros(len(item["labels"]), 5)} for item in found]

    return SimpleNamespace(task=task, names=["ship", "plane"], metrics=metrics, detect=detect)


METRIC = """
from modeling_vitp.metrics import box_metrics


class MissedImages(box_metrics.BoxMetric):
    main_score = "missed"
    lower_is_better = ("missed",)

    def _reduce(self, prediction, reference):
        return float((prediction["boxes"] - reference["boxes"]).abs().max() > 1)

    def _compute(self, images):
        return {"missed": sum(images) / len(images)}
"""


def test_best_control_has_the_lowest_error(tmp_path):
    """Swap detections of four images in two equal pairs: the shift by two misses none."""
    (tmp_path / "missed_images.py").write_text(METRIC)
    boxes = [[0.1, 0.1, 0.4, 0.4]], [[0.6, 0.6, 0.9, 0.9]]
    items = [sample(f"b{index}", (40, 40), boxes[index % 2]) for index in range(4)]
    trainer = trainer_of("horizontal", items)
    trainer.metrics = {"box_": evaluate.load(str(tmp_path / "missed_images.py"), num_labels=2)}
    assert blind_scores(trainer, items)["swapped_box_missed"] == 0
    assert not ViTPDetectionTrainer.greater_is_better(trainer, "box_missed")
    assert ViTPDetectionTrainer.greater_is_better(trainer, "mask_map")


@pytest.mark.parametrize("task", ["horizontal", "oriented", "instances"])
def test_detections_are_swapped_between_images(task):
    apart = [[0.1, 0.1, 0.3, 0.3]], [[0.4, 0.4, 0.6, 0.6]], [[0.7, 0.7, 0.9, 0.9]]
    items = [sample(f"b{index}", size, boxes) for index, (size, boxes) in enumerate(zip(SIZES, apart))]
    trainer = trainer_of(task, items)
    scores = blind_scores(trainer, items)
    assert {key for key in scores if key.endswith("map_50")} == {f"swapped_{begin}map_50" for begin in trainer.metrics}
    assert all(scores[f"swapped_{begin}map_50"] == 0 for begin in trainer.metrics)
    # Swapping is lossless for images with equal objects in relative coordinates.
    alike = [sample(f"b{index}", size, apart[0]) for index, size in enumerate(SIZES)]
    scores = blind_scores(trainer_of(task, alike), alike)
    assert all(scores[f"swapped_{begin}map_50"] == pytest.approx(1) for begin in trainer.metrics)


@pytest.mark.parametrize("task", ["horizontal", "oriented", "instances"])
def test_best_training_layout_is_reported(task):
    """Check a training sample with the objects of all test images, in different sizes."""
    boxes = [[0.1, 0.2, 0.5, 0.6], [0.6, 0.1, 0.9, 0.4]]
    test = [sample(f"b{index}", size, boxes, [0, 1]) for index, size in enumerate(SIZES)]
    train = [sample("a3", (20, 20), [[0.5, 0.5, 0.9, 0.9]]), sample("a4", (80, 90), boxes, [0, 1])]
    trainer = trainer_of(task, test)
    scores = blind_scores(trainer, test, train)
    for begin in trainer.metrics:
        assert scores[f"constant_{begin}map_50"] == pytest.approx(1)
        assert scores[f"constant_{begin}ap_50/plane"] == pytest.approx(1)


@pytest.mark.parametrize("task", ["horizontal", "oriented", "instances"])
def test_best_grid_is_reported(task):
    """Check objects in a grid, with the size of the training objects but with different positions."""
    cells = [(row, column) for row in range(3) for column in range(3)]
    boxes = [[column / 3 + 0.07, row / 3 + 0.07, column / 3 + 0.27, row / 3 + 0.27] for row, column in cells]
    test = [sample(f"b{index}", (60, 60), boxes) for index in range(2)]
    train = [sample("a3", (60, 60), [[0.0, 0.0, 0.2, 0.2]])]
    trainer = trainer_of(task, test)
    scores = blind_scores(trainer, test, train)
    assert all(scores[f"constant_{begin}map_50"] == pytest.approx(1) for begin in trainer.metrics)


def test_single_image_is_refused():
    items = [sample("b0", (40, 40), [[0.1, 0.1, 0.4, 0.4]])]
    with pytest.raises(ValueError, match="blind_controls"):
        blind_scores(trainer_of("horizontal", items), items)
