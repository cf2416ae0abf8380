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
    trainer: ViTPDetectionTrainer,
    test: ObjectImages,
    train: ObjectImages | None = None,
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
    detections = []
    for item in items:
        (detections_of_image,) = trainer.detect([item["image"]])
        detections.append(relative(detections_of_image, item))
    largest_shift = min(SHIFTS, len(items) - 1)
    shifted_detections = (detections[shift:] + detections[:shift] for shift in range(1, largest_shift + 1))
    scores = best(trainer, items, shifted_detections, "swapped")
    if train is not None:
        constant_detections = ([layout] * len(items) for layout in layouts(trainer.task, train))
        scores.update(best(trainer, items, constant_detections, "constant"))
    return scores


def best(
    trainer: ViTPDetectionTrainer,
    items: list[dict],
    candidates: Iterable[list[Objects]],
    name: str,
) -> dict[str, float]:
    """Return the scores of the best candidate predictions, for each metric."""
    references = []
    image_ids = []
    for item in items:
        references.append(reference(item, trainer.task))
        image_ids.append(item["id"])
    best_scores: dict[str, dict] = {}
    for candidate in candidates:
        predictions = [in_pixels(objects, item) for objects, item in zip(candidate, items)]
        for prefix, metric in trainer.metrics.items():
            scores = metric.compute(
                predictions=predictions,
                references=references,
                image_ids=image_ids,
            )
            main_score = "map_50" if "map_50" in scores else metric.main_score
            is_better = operator.gt if metric.greater_is_better(main_score) else operator.lt
            if prefix not in best_scores or is_better(scores[main_score], best_scores[prefix][main_score]):
                best_scores[prefix] = scores
    named_scores = {}
    for prefix, scores in best_scores.items():
        for key, score in name_classes(scores, trainer.names).items():
            named_scores[f"{name}_{prefix}{key}"] = score
    return named_scores


def layouts(task: str, train: ObjectImages) -> Iterator[Objects]:
    """Yield the objects of training samples, and grids of boxes."""
    number = min(LAYOUTS, len(train))
    samples = []
    for index in range(number):
        item = train[index * len(train) // number]
        samples.append(relative(reference(item, task), item))
    for sample in samples:
        scores = torch.ones(len(sample["labels"]))
        yield {**sample, "scores": scores}
    for cells in GRIDS:
        yield grid(samples, cells)


def grid(samples: list[Objects], cells: int) -> Objects:
    """Return a grid of `cells` x `cells` upright boxes per class, with the median size of the class.

    If the samples have masks, the mask of each object is its filled box.
    """
    key = "corners" if "corners" in samples[0] else "boxes"
    labels = torch.cat([sample["labels"] for sample in samples])
    places = torch.cat([sample[key] for sample in samples])
    points = places.reshape(len(labels), -1, 2)
    sides = points.amax(1) - points.amin(1)
    positions = (torch.arange(cells) + 0.5) / cells
    centers = torch.cartesian_prod(positions, positions)
    classes = labels.unique()
    boxes_of_classes = []
    for label in classes:
        sides_of_class = sides[labels == label]
        half = sides_of_class.median(0).values / 2
        boxes_of_class = torch.cat([centers - half, centers + half], 1)
        boxes_of_classes.append(boxes_of_class)
    boxes = torch.cat(boxes_of_classes)
    objects = {
        "labels": classes.repeat_interleave(len(centers)),
        "scores": torch.ones(len(boxes)),
    }
    if key == "corners":
        objects["corners"] = corners_of(boxes)
        return objects
    objects["boxes"] = boxes
    if "masks" in samples[0]:
        objects["masks"] = filled_boxes(boxes, samples[0]["masks"].shape[-2:])
    return objects


def filled_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the masks, uint8 `(n, height, width)`, of the pixels with their center in relative boxes."""
    height, width = size
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    x1, y1, x2, y2 = boxes.T[:, :, None]
    is_row_inside = (rows > y1) & (rows < y2)
    is_column_inside = (columns > x1) & (columns < x2)
    is_inside = is_row_inside[:, :, None] & is_column_inside[:, None]
    return is_inside.to(torch.uint8)


def relative(objects: Objects, item: dict) -> Objects:
    """Return objects with coordinates relative to the width and height of the image, and masks as an array."""
    height, width = item["image"].shape[-2:]
    # Oriented detections also have `boxes`, which are not upright.
    key = "corners" if "corners" in objects else "boxes"
    relative_objects = {}
    for name in ("labels", "scores", key, "masks"):
        if name not in objects:
            continue
        if name == "masks" and isinstance(objects["masks"], list):
            masks = [mask_of(mask) for mask in objects["masks"]]
            stacked_masks = np.array(masks, np.uint8).reshape(-1, height, width)
            relative_objects["masks"] = torch.from_numpy(stacked_masks)
        else:
            relative_objects[name] = objects[name].cpu()
    return stretched(relative_objects, (1 / height, 1 / width))


def in_pixels(objects: Objects, item: dict) -> Objects:
    """Return relative objects in the pixels of an image."""
    size = tuple(item["image"].shape[-2:])
    objects = stretched(objects, size)
    if "masks" not in objects or objects["masks"].shape[-2:] == size:
        return objects
    masks = objects["masks"].float()
    if len(masks):
        masks = F.interpolate(masks[None], size)[0]
    else:
        masks = masks.new_zeros(0, *size)
    objects["masks"] = masks.byte()
    return objects


def stretched(objects: Objects, factors: tuple[float, float]) -> Objects:
    """Return objects with coordinates multiplied by the factors of height and width."""
    height_factor, width_factor = factors
    scale = torch.tensor([width_factor, height_factor])
    objects = dict(objects)
    if "corners" in objects:
        objects["corners"] = objects["corners"].float() * scale
    if "boxes" in objects:
        objects["boxes"] = objects["boxes"].float() * scale.repeat(2)
    return objects
