"""Control scores of a detector without its images: detections of other images, and fixed layouts of boxes."""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...image_processing_vitp_detection import mask_of
from ...metrics.report import name_classes
from .augmentation import corners_of
from .data import ObjectImages
from .trainer import ViTPDetectionTrainer, reference

SHIFTS = 7  # Largest number of shifts by which detections are swapped between images.
LAYOUTS = 100  # Largest number of training samples whose objects are used as a layout for every image.
GRIDS = range(1, 13)  # Boxes per side of the grids that are used as layouts.

Objects = dict[str, Any]  # `labels`, `scores`, `corners` or `boxes`, and `masks` for instances.


def blind_scores(
    trainer: ViTPDetectionTrainer, test: ObjectImages, train: ObjectImages | None = None
) -> dict[str, float]:
    """Return the best scores on `test` that are reached without looking at its images.

    - `swapped_…`: each image gets the detections of another image. The list of images is shifted by 1 to 7 positions.
    - `constant_…`, if `train` is given: every image gets the same objects. These are the objects of one training
      sample, or a grid of boxes with the median size of each class.

    Objects are scaled to the size of the image. The best scores are selected by `map_50`, or by the main score of a
    metric without it, separately for each metric of the trainer.

    Raises:
        ValueError: if `test` has only one image.
    """
    items = [test[index] for index in range(len(test))]
    if len(items) < 2:
        raise ValueError(f"`blind_controls` require at least two test images, got {len(items)}.")
    detected = [relative(trainer.detect([item["image"]])[0], item) for item in items]
    shifted = (detected[shift:] + detected[:shift] for shift in range(1, min(SHIFTS, len(items) - 1) + 1))
    scores = best(trainer, items, shifted, "swapped")
    if train is not None:
        scores |= best(trainer, items, ([layout] * len(items) for layout in layouts(trainer.task, train)), "constant")
    return scores


def best(
    trainer: ViTPDetectionTrainer, items: list[dict], candidates: Iterable[list[Objects]], name: str
) -> dict[str, float]:
    """Return the scores of the best candidate predictions, for each metric."""
    references, ids = [reference(item, trainer.task) for item in items], [item["id"] for item in items]
    chosen: dict[str, dict] = {}
    for candidate in candidates:
        predictions = [in_pixels(objects, item) for objects, item in zip(candidate, items)]
        for begin, metric in trainer.metrics.items():
            scores = metric.compute(predictions=predictions, references=references, image_ids=ids)
            score = "map_50" if "map_50" in scores else metric.main_score
            is_better = operator.gt if metric.greater_is_better(score) else operator.lt
            if begin not in chosen or is_better(scores[score], chosen[begin][score]):
                chosen[begin] = scores
    return {
        f"{name}_{begin}{key}": value
        for begin, scores in chosen.items()
        for key, value in name_classes(scores, trainer.names).items()
    }


def layouts(task: str, train: ObjectImages) -> Iterator[Objects]:
    """Yield the objects of training samples, and grids of boxes."""
    number = min(LAYOUTS, len(train))
    items = [train[index * len(train) // number] for index in range(number)]
    samples = [relative(reference(item, task), item) for item in items]
    for sample in samples:
        yield sample | {"scores": torch.ones(len(sample["labels"]))}
    for cells in GRIDS:
        yield grid(samples, cells)


def grid(samples: list[Objects], cells: int) -> Objects:
    """Return a grid of `cells` x `cells` upright boxes per class, with the median size of the class.

    If the samples have masks, the mask of each object is its filled box.
    """
    key = "corners" if "corners" in samples[0] else "boxes"
    labels = torch.cat([sample["labels"] for sample in samples])
    points = torch.cat([sample[key] for sample in samples]).reshape(len(labels), -1, 2)
    sides = points.amax(1) - points.amin(1)
    centers = (torch.arange(cells) + 0.5) / cells
    centers = torch.cartesian_prod(centers, centers)
    boxes, classes = [], labels.unique()
    for label in classes:
        half = sides[labels == label].median(0).values / 2
        boxes.append(torch.cat([centers - half, centers + half], 1))
    boxes = torch.cat(boxes)
    found = {"labels": classes.repeat_interleave(len(centers)), "scores": torch.ones(len(boxes))}
    if key == "corners":
        return found | {"corners": corners_of(boxes)}
    found["boxes"] = boxes
    if "masks" in samples[0]:
        size = samples[0]["masks"].shape[-2:]
        rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
        left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
        inside = ((rows > top) & (rows < bottom))[:, :, None] & ((columns > left) & (columns < right))[:, None]
        found["masks"] = inside.to(torch.uint8)
    return found


def relative(objects: Objects, item: dict) -> Objects:
    """Return objects with coordinates relative to the width and height of the image, and masks as an array."""
    height, width = item["image"].shape[-2:]
    key = "corners" if "corners" in objects else "boxes"
    objects = {name: objects[name] for name in ("labels", "scores", key, "masks") if name in objects}
    objects = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in objects.items()}
    if isinstance(objects.get("masks"), list):
        masks = np.array([mask_of(mask) for mask in objects["masks"]], np.uint8)
        objects["masks"] = torch.from_numpy(masks.reshape(-1, height, width))
    return stretched(objects, (1 / height, 1 / width))


def in_pixels(objects: Objects, item: dict) -> Objects:
    """Return relative objects in the pixels of an image."""
    size = tuple(item["image"].shape[-2:])
    objects = stretched(objects, size)
    if "masks" in objects and objects["masks"].shape[-2:] != size:
        masks = objects["masks"].float()
        objects["masks"] = (F.interpolate(masks[None], size)[0] if len(masks) else masks.new_zeros(0, *size)).byte()
    return objects


def stretched(objects: Objects, factors: tuple[float, float]) -> Objects:
    height, width = factors
    scales = {"corners": torch.tensor([width, height]), "boxes": torch.tensor([width, height, width, height])}
    return objects | {name: objects[name].float() * scale for name, scale in scales.items() if name in objects}
