"""What a detector's scores are held against: the same detections in other images, and boxes that see no image."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from faster_coco_eval.core import mask as run_lengths
from torch.nn import functional as F

from ..metrics.report import name_classes
from .data import ObjectImages
from .trainer import ViTPDetectionTrainer, reference

SHIFTS = 7  # ways of exchanging images that are tried at most
LAYOUTS = 100  # training samples whose objects are tried as the objects of every image, at most
GRIDS = range(1, 13)  # boxes a side of the grids that are tried

Objects = dict[str, Any]  # `labels`, `scores` and `corners` or `boxes`, and `masks` for instances


def blind_scores(
    trainer: ViTPDetectionTrainer, test: ObjectImages, train: ObjectImages | None = None
) -> dict[str, float]:
    """The best scores on `test` that are reached without looking at its images.

    `swapped_…`: each image gets the detections of another, the list of images turned by 1 to 7 places; the best of
    these. `constant_…`, if `train` is given: every image gets the same objects, those of one training sample or a grid
    of boxes of a class's median size; the best of all of these. Objects are stretched from image to image. What is
    best, `map_50` says, for each metric of the trainer by itself.

    Raises:
        ValueError: if there is only one image, so that none can be exchanged.
    """
    items = [test[index] for index in range(len(test))]
    if len(items) < 2:
        raise ValueError("blind_controls: with one test image there is none to exchange it for.")
    found = [relative(trainer.detect([item["image"]])[0], item) for item in items]
    turned = (found[shift:] + found[:shift] for shift in range(1, min(SHIFTS, len(items) - 1) + 1))
    scores = best(trainer, items, turned, "swapped")
    if train is not None:
        scores |= best(trainer, items, ([layout] * len(items) for layout in layouts(trainer.task, train)), "constant")
    return scores


def best(
    trainer: ViTPDetectionTrainer, items: list[dict], tried: Iterable[list[Objects]], name: str
) -> dict[str, float]:
    """The scores of the best of what was tried, for each metric."""
    references, ids = [reference(item, trainer.task) for item in items], [item["id"] for item in items]
    chosen: dict[str, dict] = {}
    for objects in tried:
        predictions = [in_pixels(one, item) for one, item in zip(objects, items)]
        for begin, metric in trainer.metrics.items():
            scores = metric.compute(predictions=predictions, references=references, image_ids=ids)
            if begin not in chosen or scores["map_50"] > chosen[begin]["map_50"]:
                chosen[begin] = scores
    return {
        f"{name}_{begin}{key}": value
        for begin, scores in chosen.items()
        for key, value in name_classes(scores, trainer.names).items()
    }


def layouts(task: str, train: ObjectImages) -> Iterator[Objects]:
    """Objects that every image may get: those of training samples, and grids."""
    number = min(LAYOUTS, len(train))
    items = [train[index * len(train) // number] for index in range(number)]
    samples = [relative(reference(item, task), item) for item in items]
    for sample in samples:
        yield sample | {"scores": torch.ones(len(sample["labels"]))}
    for cells in GRIDS:
        yield grid(samples, cells)


def grid(samples: list[Objects], cells: int) -> Objects:
    """`cells` x `cells` boxes of the median size for each class, of one that is an upright rectangle; filled, if there
    are masks."""
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
        left, top, right, bottom = boxes.unbind(1)
        return found | {"corners": torch.stack([left, top, right, top, right, bottom, left, bottom], 1).view(-1, 4, 2)}
    found["boxes"] = boxes
    if "masks" in samples[0]:
        size = samples[0]["masks"].shape[-2:]
        rows, columns = ((torch.arange(side) + 0.5) / side for side in size)
        left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
        inside = ((rows > top) & (rows < bottom))[:, :, None] & ((columns > left) & (columns < right))[:, None]
        found["masks"] = inside.to(torch.uint8)
    return found


def relative(objects: Objects, item: dict) -> Objects:
    """Objects with places as shares of the image's width and height, and masks as an array."""
    height, width = item["image"].shape[-2:]
    place = "corners" if "corners" in objects else "boxes"
    objects = {name: objects[name] for name in ("labels", "scores", place, "masks") if name in objects}
    objects = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in objects.items()}
    if isinstance(objects.get("masks"), list):
        masks = [run_lengths.decode([run_lengths.segmToRle(mask, width, height)])[..., 0] for mask in objects["masks"]]
        empty = torch.zeros(0, height, width, dtype=torch.uint8)
        objects["masks"] = torch.cat([empty, *(torch.from_numpy(mask)[None] for mask in masks)])
    return stretched(objects, (1 / height, 1 / width))


def in_pixels(objects: Objects, item: dict) -> Objects:
    """The same in an image."""
    size = tuple(item["image"].shape[-2:])
    objects = stretched(objects, size)
    if "masks" in objects and objects["masks"].shape[-2:] != size:
        masks = objects["masks"].float()
        objects["masks"] = (F.interpolate(masks[None], size)[0] if len(masks) else masks.new_zeros(0, *size)).byte()
    return objects


def stretched(objects: Objects, factors: tuple[float, float]) -> Objects:
    height, width = factors
    places = {"corners": torch.tensor([width, height]), "boxes": torch.tensor([width, height, width, height])}
    return objects | {name: objects[name].float() * factor for name, factor in places.items() if name in objects}
