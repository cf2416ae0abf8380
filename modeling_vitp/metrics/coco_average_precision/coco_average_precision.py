"""COCO average precision and recall of boxes or masks."""

from collections.abc import Mapping

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths

from modeling_vitp.metrics import base, box_metrics, pixel_metrics

AREAS = ("small", "medium", "large")  # Up to 32², up to 96², and above.
DETECTIONS_PER_IMAGE = (1, 10, 100)


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

    def __init__(
        self,
        *args,
        masks: bool = False,
        **kwargs,
    ):
        self.masks = masks
        super().__init__(*args, **kwargs)

    def _reduce(self, prediction: Mapping, reference: Mapping) -> tuple[dict, dict, tuple[int, int]]:
        """Return the detections and the objects of an image, and the size of its masks, if it has any."""
        detected = self._objects(prediction, "prediction")
        num_detected = len(detected["labels"])
        detected["scores"] = box_metrics.numbers(prediction, "scores", "prediction", num_detected, ())

        annotated = self._objects(reference, "reference")
        num_annotated = len(annotated["labels"])
        for key in ("crowd", "area"):
            if reference.get(key) is not None:
                annotated[key] = box_metrics.numbers(reference, key, "reference", num_annotated, ())

        masks = []
        if self.masks:
            masks = detected["masks"] + annotated["masks"]
        return detected, annotated, size_of_masks(masks)

    def _objects(self, side: Mapping, name: str) -> dict:
        """Return the labels and the boxes or masks of a prediction or reference."""
        labels = self._labels(side, name)
        if self.masks:
            masks = encoded(side, name, len(labels))
            return {"labels": labels, "masks": masks}
        boxes = box_metrics.numbers(side, "boxes", name, len(labels), (4,))
        return {"labels": labels, "boxes": boxes}

    def _join(self, parts: list[dict]) -> list[list[int]]:
        cases = super()._join(parts)
        self.images = self._match(self.images)
        return cases

    def _match(self, images: list[tuple]) -> list[list]:
        """Return the matches of each image, by class and area, and set `scoring`, which accumulates them."""
        sizes = []
        detections = []
        annotations = []
        for image_id, (detected, annotated, size) in enumerate(images, start=1):
            height, width = size
            sizes.append({"id": image_id, "height": height, "width": width})
            detections.extend(entries(detected, image_id))
            for annotation in entries(annotated, image_id):
                annotations.append({"id": len(annotations) + 1, **annotation})
        categories = [{"id": label, "name": str(label)} for label in range(self.num_labels)]
        content = {
            "images": sizes,
            "annotations": annotations,
            "categories": categories,
        }
        truth = COCO(content)
        self.scoring = COCOeval_faster(
            truth,
            truth.loadRes(detections),
            "segm" if self.masks else "bbox",
            print_function=silent,
            separate_eval=True,
        )
        self.scoring.evaluate()
        # The list has all images of the first class and area, then all images of the next area, and so on.
        matches = self.scoring._evalImgs_cpp
        return [matches[index :: len(images)] for index in range(len(images))]

    def _compute(self, images: list[list]) -> dict:
        # The library has no public way to accumulate repeated images. Matching them again takes ten times as long.
        matches = []
        for matches_of_images in zip(*images):
            matches.extend(matches_of_images)
        scoring = self.scoring
        scoring._evalImgs_cpp = matches
        scoring._paramsEval.imgIds = list(range(len(images)))
        scoring.accumulate()

        # Axes: IoU thresholds, recalls, classes, areas (all, small, medium, large), detections per image (1, 10, 100).
        precision = absent_as_nan(scoring.eval["precision"])
        # The same axes without recalls.
        recall = absent_as_nan(scoring.eval["recall"])
        precision_of_all_areas = precision[..., 0, 2]
        mean = pixel_metrics.mean_of_counted
        scores = {
            "map": mean(precision_of_all_areas),
            "map_50": mean(precision_of_all_areas[0]),
            "map_75": mean(precision_of_all_areas[5]),
        }
        for index, area in enumerate(AREAS, start=1):
            scores[f"map_{area}"] = mean(precision[..., index, 2])
        for index, number in enumerate(DETECTIONS_PER_IMAGE):
            scores[f"mar_{number}"] = mean(recall[..., 0, index])
        for index, area in enumerate(AREAS, start=1):
            scores[f"mar_{area}"] = mean(recall[..., index, 2])

        metrics = {name: float(score) for name, score in scores.items()}
        metrics["per_category_ap"] = mean(precision_of_all_areas, axis=(0, 1)).tolist()
        metrics["per_category_ap_50"] = mean(precision_of_all_areas[0], axis=0).tolist()
        return metrics


def size_of_masks(masks: list[dict]) -> tuple[int, int]:
    """Return the height and width that the run lengths of an image have in common, 0 without masks."""
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        raise ValueError(f"expected masks of one size, got {sorted(sizes)}.")
    if not sizes:
        return 0, 0
    return sizes.pop()


def encoded(side: Mapping, name: str, length: int) -> list[dict]:
    """Return the masks of a prediction or reference as COCO run lengths."""
    masks = side.get("masks", [])
    are_run_lengths = all(isinstance(mask, dict) for mask in masks)
    if len(masks) == length and are_run_lengths:
        encoded_masks = []
        for mask in masks:
            height, width = mask["size"]
            encoded_mask = run_lengths.segmToRle(dict(mask), width, height)
            encoded_masks.append(encoded_mask)
        return encoded_masks
    masks = base.as_array(masks)
    if masks.ndim != 3 or len(masks) != length:
        raise ValueError(
            f"expected {length} masks in the {name}, one per label, as run lengths or of shape (n, height, width), got "
            f"shape {list(masks.shape)}."
        )
    is_object = masks.astype(bool).transpose(1, 2, 0)
    return run_lengths.encode(np.asfortranarray(is_object.astype(np.uint8)))


def entries(objects: dict, image_id: int) -> list[dict]:
    """Return the objects of an image as entries of a COCO file."""
    outlines = []
    if "boxes" in objects:
        corners = objects["boxes"][:, :2]
        sizes = objects["boxes"][:, 2:] - corners
        areas = sizes.prod(axis=1)
        for box in np.concatenate([corners, sizes], axis=1).tolist():
            outlines.append({"bbox": box})
    else:
        areas = []
        if objects["masks"]:
            areas = run_lengths.area(objects["masks"])
        for mask in objects["masks"]:
            outlines.append({"segmentation": mask})
    areas = objects.get("area", areas)
    is_crowd = objects.get("crowd", np.zeros(len(outlines)))

    coco_entries = []
    for index, outline in enumerate(outlines):
        coco_entry = {
            "image_id": image_id,
            "category_id": int(objects["labels"][index]),
            **outline,
        }
        if "scores" in objects:
            coco_entry["score"] = float(objects["scores"][index])
        else:
            coco_entry["area"] = float(areas[index])
            coco_entry["iscrowd"] = int(is_crowd[index])
        coco_entries.append(coco_entry)
    return coco_entries


def absent_as_nan(scores: np.ndarray) -> np.ndarray:
    """Return scores with NaN in place of -1, which the library returns where there are no objects."""
    scores = np.asarray(scores, np.float64)
    return np.where(scores < 0, np.nan, scores)


def silent(*_):
    """Discard the output that the library prints."""
