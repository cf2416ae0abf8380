"""COCO average precision and recall of boxes or masks."""

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths

from modeling_vitp.metrics import box_metrics, pixel_metrics

AREAS = ("small", "medium", "large")  # Up to 32², up to 96², and above.


class CocoAveragePrecision(box_metrics.BoxMetric):
    """Average precision over IoU thresholds of 0.5, 0.55, … 0.95, as defined by COCO (computed by `faster-coco-eval`).

    `boxes` are `(n, 4)` with x1, y1, x2, y2 in pixels. With `masks=True`, overlaps are those of `masks`, either
    `(n, height, width)` or a list of COCO run lengths (`{"size": [height, width], "counts": …}`), which are kept.
    References may have `crowd`, `(n,)`, regions in which detections are ignored, and `area` in pixels, `(n,)`, which
    determines whether an object is small, medium or large. Default area: that of the box or mask. Up to 100 detections
    per class and image are evaluated. Objects that are marked as difficult count like others: COCO has no such mark.

    `evaluate.load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=6)` loads the metric.

    Args:
        masks: whether to evaluate masks instead of boxes.

    The other arguments are those of `BoxMetric`.

    Returns:
        The twelve COCO scores: `map` over all IoU thresholds, `map_50`, `map_75`, `map_small`, `map_medium`,
        `map_large`, and the recall with 1, 10 and 100 detections per image, `mar_1`, `mar_10`, `mar_100`, `mar_small`,
        `mar_medium`, `mar_large`; and the lists per class `per_category_ap` and `per_category_ap_50`. A score without
        objects is NaN.
    """

    def __init__(self, *args, masks: bool = False, **kwargs):
        self.masks = masks
        super().__init__(*args, **kwargs)

    def _reduce(self, prediction, reference):
        detected = self._objects(prediction, "prediction") | {
            "scores": self._numbers(prediction, "scores", "prediction")
        }
        annotated = self._objects(reference, "reference")
        for key in ("crowd", "area"):
            if reference.get(key) is not None:
                annotated[key] = self._numbers(reference, key, "reference")
        sizes = {tuple(mask["size"]) for side in (detected, annotated) for mask in side.get("masks", [])}
        if len(sizes) > 1:
            raise ValueError(f"expected masks of one size, got {sorted(sizes)}.")
        return detected, annotated, next(iter(sizes), (0, 0))

    def _objects(self, side, name):
        labels = self._labels(side, name)
        if self.masks:
            return {"labels": labels, "masks": encoded(side, name, len(labels))}
        return {"labels": labels, "boxes": box_metrics.numbers(side, "boxes", name, len(labels), (4,))}

    def _numbers(self, side, key, name):
        return box_metrics.numbers(side, key, name, len(box_metrics.array(side, "labels", name)), ())

    def _join(self, parts):
        cases = super()._join(parts)
        self.images = self._match(self.images)
        return cases

    def _match(self, images: list) -> list[list]:
        """Return the matches of each image, by class and area, and set `scoring`, which accumulates them."""
        references, predictions, sizes = [], [], []
        for image_id, (detected, annotated, (height, width)) in enumerate(images, start=1):
            sizes.append({"id": image_id, "height": height, "width": width})
            predictions += entries(detected, image_id)
            references += [
                {"id": len(references) + index, **entry} for index, entry in enumerate(entries(annotated, image_id), 1)
            ]
        categories = [{"id": label, "name": str(label)} for label in range(self.num_labels)]
        truth = COCO({"images": sizes, "annotations": references, "categories": categories})
        self.scoring = COCOeval_faster(
            truth,
            truth.loadRes(predictions),
            "segm" if self.masks else "bbox",
            print_function=silent,
            separate_eval=True,
        )
        self.scoring.evaluate()
        # The list has all images of the first class and area, then all images of the next area, and so on.
        return [self.scoring._evalImgs_cpp[index :: len(images)] for index in range(len(images))]

    def _compute(self, images):
        scoring = self.scoring
        # The library has no public way to accumulate repeated images. Matching them again takes ten times as long.
        scoring._evalImgs_cpp = [match for matches in zip(*images) for match in matches]
        scoring._paramsEval.imgIds = list(range(len(images)))
        scoring.accumulate()
        # Axes: IoU thresholds, recalls, classes, areas (all, small, medium, large), detections per image (1, 10, 100).
        precision = absent_as_nan(scoring.eval["precision"])
        recall = absent_as_nan(scoring.eval["recall"])
        mean = pixel_metrics.mean_of_counted
        result = {"map": mean(precision[..., 0, 2]), "map_50": mean(precision[0, ..., 0, 2])}
        result["map_75"] = mean(precision[5, ..., 0, 2])
        result |= {f"map_{name}": mean(precision[..., index, 2]) for index, name in enumerate(AREAS, start=1)}
        result |= {f"mar_{most}": mean(recall[..., 0, index]) for index, most in enumerate((1, 10, 100))}
        result |= {f"mar_{name}": mean(recall[..., index, 2]) for index, name in enumerate(AREAS, start=1)}
        return {name: float(value) for name, value in result.items()} | {
            "per_category_ap": mean(precision[..., 0, 2], (0, 1)).tolist(),
            "per_category_ap_50": mean(precision[0, ..., 0, 2], 0).tolist(),
        }


def encoded(side, name: str, length: int) -> list[dict]:
    """Return masks as COCO run lengths."""
    masks = side.get("masks", [])
    if len(masks) != length:
        raise ValueError(f"expected {length} masks in the {name}, one per label, got {len(masks)}.")
    if all(isinstance(mask, dict) for mask in masks):
        return [run_lengths.segmToRle(dict(mask), mask["size"][1], mask["size"][0]) for mask in masks]
    masks = box_metrics.array(side, "masks", name)
    if masks.ndim != 3:
        raise ValueError(f"expected masks of the {name} of shape (n, height, width), got {list(masks.shape)}.")
    return run_lengths.encode(np.asfortranarray(masks.astype(bool).astype(np.uint8).transpose(1, 2, 0)))


def entries(side: dict, image_id: int) -> list[dict]:
    """Return the objects of an image as entries of a COCO file."""
    result = []
    if "boxes" in side:
        sizes = side["boxes"][:, 2:] - side["boxes"][:, :2]
        outlines = [{"bbox": box} for box in np.concatenate([side["boxes"][:, :2], sizes], 1).tolist()]
        areas = sizes.prod(1)
    else:
        outlines = [{"segmentation": mask} for mask in side["masks"]]
        areas = run_lengths.area(side["masks"]) if side["masks"] else []
    areas, crowd = side.get("area", areas), side.get("crowd", np.zeros(len(outlines)))
    for index, outline in enumerate(outlines):
        entry = {"image_id": image_id, "category_id": int(side["labels"][index]), **outline}
        if "scores" in side:
            entry["score"] = float(side["scores"][index])
        else:
            entry |= {"area": float(areas[index]), "iscrowd": int(crowd[index])}
        result.append(entry)
    return result


def absent_as_nan(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(values < 0, np.nan, values)


def silent(*_):
    """Discard the output that the library prints."""
