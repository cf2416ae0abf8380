"""COCO's average precision and recall, of boxes or of masks."""

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths

from modeling_vitp.metrics import box_metrics, pixel_metrics

AREAS = ("small", "medium", "large")  # up to 32², up to 96², and above


class CocoAveragePrecision(box_metrics.BoxMetric):
    """Average precision over overlaps of 0.5, 0.55, … 0.95, as COCO defines it (computed by `faster-coco-eval`).

    `boxes` are `(n, 4)`: x1, y1, x2, y2 in pixels. With `masks`, overlaps are those of `masks` instead, `(n, height,
    width)` or a list of COCO's run lengths (`{"size": [height, width], "counts": …}`), which is what is kept of them.
    References may have `crowd`, `(n,)`: regions that count neither as objects nor against what is detected in them; and
    `area`, `(n,)` in pixels, by which objects are small, medium or large: of the boxes or masks if not given. Of an
    image, the 100 best detections of each class count.

    `evaluate.load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=6)`.

    Args:
        masks: whether masks are scored, and not boxes.

    The other arguments are those of `BoxMetric`.

    Returns:
        COCO's twelve numbers: `map` over all overlaps, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, and
        recall with 1, 10 and 100 detections an image, `mar_1`, `mar_10`, `mar_100`, `mar_small`, `mar_medium`,
        `mar_large`; and lists by class, `per_category_ap` and `per_category_ap_50`. What no object is there for is NaN.
    """

    def __init__(self, *args, masks: bool = False, **kwargs):
        self.masks = masks
        super().__init__(*args, **kwargs)

    def _reduce(self, prediction, reference):
        found = self._side(prediction, "prediction") | {"scores": self._more(prediction, "scores", "prediction")}
        there = self._side(reference, "reference")
        for key in ("crowd", "area"):
            if reference.get(key) is not None:
                there[key] = self._more(reference, key, "reference")
        sizes = {tuple(one["size"]) for side in (found, there) for one in side.get("masks", [])}
        if len(sizes) > 1:
            raise ValueError(f"masks are of different sizes: {sorted(sizes)}.")
        return found, there, next(iter(sizes), (0, 0))

    def _side(self, side, name):
        labels = self._labels(side, name)
        if self.masks:
            return {"labels": labels, "masks": encoded(side, name, len(labels))}
        return {"labels": labels, "boxes": box_metrics.numbers(side, "boxes", name, len(labels), (4,))}

    def _more(self, side, key, name):
        return box_metrics.numbers(side, key, name, len(box_metrics.array(side, "labels", name)), ())

    def _compute(self, images):
        references, predictions, sizes = [], [], []
        for image_id, (found, there, (height, width)) in enumerate(images, start=1):
            sizes.append({"id": image_id, "height": height, "width": width})
            predictions += entries(found, image_id)
            references += [
                {"id": len(references) + place, **entry} for place, entry in enumerate(entries(there, image_id), 1)
            ]
        categories = [{"id": label, "name": str(label)} for label in range(self.num_labels)]
        truth = COCO({"images": sizes, "annotations": references, "categories": categories})
        scoring = COCOeval_faster(
            truth, truth.loadRes(predictions), "segm" if self.masks else "bbox", print_function=silent
        )
        scoring.evaluate()
        scoring.accumulate()
        # Overlaps, recalls, classes, areas (all, small, medium, large), and detections an image (1, 10, 100).
        precision = absent_as_nan(scoring.eval["precision"])
        recall = absent_as_nan(scoring.eval["recall"])
        mean = pixel_metrics.mean_of_counted
        result = {"map": mean(precision[..., 0, 2]), "map_50": mean(precision[0, ..., 0, 2])}
        result["map_75"] = mean(precision[5, ..., 0, 2])
        result |= {f"map_{name}": mean(precision[..., place, 2]) for place, name in enumerate(AREAS, start=1)}
        result |= {f"mar_{most}": mean(recall[..., 0, place]) for place, most in enumerate((1, 10, 100))}
        result |= {f"mar_{name}": mean(recall[..., place, 2]) for place, name in enumerate(AREAS, start=1)}
        return {name: float(value) for name, value in result.items()} | {
            "per_category_ap": mean(precision[..., 0, 2], (0, 1)).tolist(),
            "per_category_ap_50": mean(precision[0, ..., 0, 2], 0).tolist(),
        }


def encoded(side, name: str, length: int) -> list[dict]:
    """Masks as COCO's run lengths."""
    masks = side.get("masks", [])
    if len(masks) != length:
        raise ValueError(f"the {name} has {len(masks)} mask(s) for {length} label(s).")
    if all(isinstance(mask, dict) for mask in masks):
        return [run_lengths.segmToRle(dict(mask), mask["size"][1], mask["size"][0]) for mask in masks]
    masks = box_metrics.array(side, "masks", name)
    if masks.ndim != 3:
        raise ValueError(f"masks of the {name} are of shape {list(masks.shape)}.")
    return run_lengths.encode(np.asfortranarray(masks.astype(bool).astype(np.uint8).transpose(1, 2, 0)))


def entries(side: dict, image_id: int) -> list[dict]:
    """The objects of an image as COCO's files have them."""
    found = []
    if "boxes" in side:
        sizes = side["boxes"][:, 2:] - side["boxes"][:, :2]
        places = [{"bbox": box} for box in np.concatenate([side["boxes"][:, :2], sizes], 1).tolist()]
        areas = sizes.prod(1)
    else:
        places = [{"segmentation": mask} for mask in side["masks"]]
        areas = run_lengths.area(side["masks"]) if side["masks"] else []
    areas, crowd = side.get("area", areas), side.get("crowd", np.zeros(len(places)))
    for index, place in enumerate(places):
        entry = {"image_id": image_id, "category_id": int(side["labels"][index]), **place}
        if "scores" in side:
            entry["score"] = float(side["scores"][index])
        else:
            entry |= {"area": float(areas[index]), "iscrowd": int(crowd[index])}
        found.append(entry)
    return found


def absent_as_nan(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(values < 0, np.nan, values)


def silent(*_):
    """What the library prints."""
