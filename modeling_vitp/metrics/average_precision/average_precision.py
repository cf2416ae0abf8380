"""Average precision of detection as in Pascal VOC and DOTA, for upright and oriented boxes."""

from collections.abc import Mapping

import numpy as np
import torch
from torchvision.ops import box_iou

from modeling_vitp.metrics import box_metrics, pixel_metrics
from modeling_vitp.rotated_boxes import rotated_iou, smallest_rectangles

INTERPOLATIONS = ("11_points", "area")


class AveragePrecision(box_metrics.BoxMetric):
    """Average precision of each class at one or more IoU thresholds, and the mean over the classes that occur.

    The computation follows Pascal VOC. The detections of a class over all images are sorted by descending score. A
    detection is correct if it overlaps enough with the object of its class that it overlaps most, and if that object is
    not matched yet. Otherwise it is wrong, even if another object would match. The precision at a recall is the best
    precision at that recall or a higher one. It is averaged at the recalls 0, 0.1, … 1 (`"11_points"`, VOC 2007, used
    for DOTA, DIOR-R and RSAR) or over all recalls (`"area"`, VOC 2010). Difficult objects do not need to be found, and
    detections that overlap them most are ignored, unless `difficult_counts`. Crowd regions are always treated this way.

    Boxes are `boxes`, either upright, `(n, 4)` with x1, y1, x2, y2, or rotated, `(n, 5)` with cx, cy, width, height and
    an angle in radians from x towards y; or `corners`, `(n, 4, 2)`, which are converted to the smallest rectangle
    around them. References may have `difficult` and `crowd`, `(n,)`. Matches and scores are kept, boxes are not.

    `evaluate.load(str(METRICS_FOLDER / "average_precision"), num_labels=20)` loads the metric.

    Args:
        iou_thresholds: smallest IoU of a correct detection, one or more values.
        interpolation: `"11_points"` or `"area"`.
        difficult_counts: whether difficult objects count like other objects, as in the authors' DOTA scores.

    The other arguments are those of `BoxMetric`.

    Returns:
        `map`, the mean over classes and IoU thresholds; for each threshold the mean, such as `map_50`, and the list per
        class, such as `per_category_ap_50`. A class without objects is NaN and is left out of the means.
    """

    def __init__(
        self,
        *args,
        iou_thresholds: tuple[float, ...] = (0.5,),
        interpolation: str = "11_points",
        difficult_counts: bool = False,
        **kwargs,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}.")
        self.iou_thresholds = tuple(iou_thresholds)
        self.interpolation = interpolation
        self.difficult_counts = difficult_counts
        super().__init__(*args, **kwargs)

    def _reduce(
        self,
        prediction: Mapping,
        reference: Mapping,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return labels, scores and matches of the detections, and the number of objects of each class.

        A match is 1 for a correct, 0 for a wrong and -1 for an ignored detection, at each IoU threshold.
        """
        detected_labels = self._labels(prediction, "prediction")
        object_labels = self._labels(reference, "reference")
        num_detections = len(detected_labels)
        num_objects = len(object_labels)
        scores = box_metrics.numbers(prediction, "scores", "prediction", num_detections, ())
        is_ignored = self._is_ignored(reference, num_objects)
        detected_boxes = read_boxes(prediction, "prediction", num_detections)
        object_boxes = read_boxes(reference, "reference", num_objects)
        iou = pairwise_overlaps(detected_boxes, object_boxes)

        matches = np.zeros((len(self.iou_thresholds), num_detections), np.int8)
        for label in np.unique(detected_labels):
            detections = np.flatnonzero(detected_labels == label)
            order = np.argsort(-scores[detections], kind="stable")
            detections = detections[order]
            objects = np.flatnonzero(object_labels == label)
            class_iou = iou[np.ix_(detections, objects)]
            for index, threshold in enumerate(self.iou_thresholds):
                matches[index, detections] = assign(
                    class_iou,
                    is_ignored[objects],
                    threshold,
                )
        counted_labels = object_labels[~is_ignored]
        class_sizes = np.bincount(counted_labels, minlength=self.num_labels)
        return detected_labels.astype(np.int32), scores, matches, class_sizes

    def _is_ignored(self, reference: Mapping, num_objects: int) -> np.ndarray:
        """Return whether each object is a crowd region or, unless they count, difficult, bool of shape `(n,)`."""
        marks = ["crowd"]
        if not self.difficult_counts:
            marks.append("difficult")
        is_ignored = np.zeros(num_objects, bool)
        for mark in marks:
            if reference.get(mark) is not None:
                is_marked = box_metrics.numbers(reference, mark, "reference", num_objects, ())
                is_ignored |= is_marked != 0
        return is_ignored

    def _compute(self, images: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> dict:
        image_labels, image_scores, image_matches, image_class_sizes = zip(*images)
        scores = np.concatenate(image_scores)
        order = np.argsort(-scores, kind="stable")
        labels = np.concatenate(image_labels)[order]
        matches = np.concatenate(image_matches, axis=1)[:, order]
        class_sizes = np.sum(image_class_sizes, axis=0)

        precisions = np.full((len(self.iou_thresholds), self.num_labels), np.nan)
        for label in np.flatnonzero(class_sizes):
            class_matches = matches[:, labels == label]
            for index, threshold_matches in enumerate(class_matches):
                is_counted = threshold_matches >= 0
                precisions[index, label] = interpolated_precision(
                    threshold_matches[is_counted],
                    class_sizes[label],
                    self.interpolation,
                )

        mean_precision = pixel_metrics.mean_of_counted(precisions)
        metrics = {"map": float(mean_precision)}
        for threshold, class_precisions in zip(self.iou_thresholds, precisions):
            percent = f"{100 * threshold:g}"
            threshold_mean = pixel_metrics.mean_of_counted(class_precisions)
            metrics[f"map_{percent}"] = float(threshold_mean)
            metrics[f"per_category_ap_{percent}"] = class_precisions.tolist()
        return metrics


def read_boxes(side: Mapping, name: str, length: int) -> np.ndarray:
    """Return the boxes of a prediction or reference, upright `(length, 4)` or rotated `(length, 5)`."""
    if "corners" not in side:
        return box_metrics.numbers(side, "boxes", name, length, (4,), (5,))
    corners = box_metrics.numbers(side, "corners", name, length, (4, 2))
    if length == 0:
        return np.zeros((0, 5))
    rectangles = smallest_rectangles(torch.from_numpy(corners))
    return rectangles.numpy()


def pairwise_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of all pairs, `(n, m)`."""
    if len(boxes) == 0 or len(others) == 0:
        return np.zeros((len(boxes), len(others)))
    if boxes.shape[1] != others.shape[1]:
        raise ValueError("expected rotated boxes in both prediction and reference or in neither, got one of them.")
    overlap_function = box_iou if boxes.shape[1] == 4 else rotated_iou
    iou = overlap_function(
        torch.from_numpy(boxes),
        torch.from_numpy(others),
    )
    return iou.numpy()


def assign(iou: np.ndarray, is_ignored: np.ndarray, threshold: float) -> np.ndarray:
    """Match detections to objects, and return 1 for correct, 0 for wrong and -1 for ignored detections.

    Args:
        iou: overlaps of the detections, by descending score, with the objects, `(n, m)`.
        is_ignored: whether an object is ignored, bool of shape `(m,)`.
        threshold: smallest IoU of a match.
    """
    num_detections, num_objects = iou.shape
    if num_objects == 0:
        return np.zeros(num_detections, np.int8)
    best_objects = iou.argmax(axis=1)
    is_enough = iou.max(axis=1) >= threshold
    is_of_ignored = is_ignored[best_objects]
    matches = np.where(is_enough & is_of_ignored, -1, 0)
    # Only the best of the detections of an object is correct. They are sorted by score, so it is the first one.
    candidates = np.flatnonzero(is_enough & ~is_of_ignored)
    _, first_candidates = np.unique(best_objects[candidates], return_index=True)
    matches[candidates[first_candidates]] = 1
    return matches


def interpolated_precision(matches: np.ndarray, num_objects: int, interpolation: str) -> float:
    """Return the average precision of a class.

    Args:
        matches: whether each detection of the class is correct, by descending score.
        num_objects: number of objects of the class.
        interpolation: `"11_points"` or `"area"`.
    """
    num_correct = np.cumsum(matches, dtype=np.int64)
    num_detections = np.arange(1, len(num_correct) + 1)
    precision = num_correct / num_detections
    # The best precision at this recall or a higher one: the largest from each detection to the last.
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "area":
        precision_sum = (best_precision * (matches > 0)).sum()
        return float(precision_sum / num_objects)
    precision_sum = 0.0
    for tenth in range(11):
        # The first detection with at least this recall, compared as integers.
        index = np.searchsorted(10 * num_correct, tenth * num_objects)
        if index < len(best_precision):
            precision_sum += best_precision[index]
    return float(precision_sum / 11)
