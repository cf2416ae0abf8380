"""Average precision of detection as in Pascal VOC and DOTA, for upright and oriented boxes."""

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
        self.interpolation, self.difficult_counts = interpolation, difficult_counts
        super().__init__(*args, **kwargs)

    def _reduce(self, prediction, reference):
        """Return labels, scores and matches of the detections, and the number of objects of each class.

        A match is 1 for a correct, 0 for a wrong and -1 for an ignored detection, at each IoU threshold.
        """
        detected, annotated = self._labels(prediction, "prediction"), self._labels(reference, "reference")
        scores = box_metrics.numbers(prediction, "scores", "prediction", len(detected), ())
        ignored = np.zeros(len(annotated), bool)
        for name in ("crowd",) if self.difficult_counts else ("crowd", "difficult"):
            if reference.get(name) is not None:
                ignored |= box_metrics.numbers(reference, name, "reference", len(annotated), ()) != 0
        iou = pairwise_overlaps(
            read_boxes(prediction, "prediction", len(detected)), read_boxes(reference, "reference", len(annotated))
        )
        matches = np.zeros((len(self.iou_thresholds), len(detected)), np.int8)
        for label in np.unique(detected):
            rows, columns = np.flatnonzero(detected == label), np.flatnonzero(annotated == label)
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            for match, threshold in zip(matches, self.iou_thresholds):
                match[rows] = assign(iou[np.ix_(rows, columns)], ignored[columns], threshold)
        objects = np.bincount(annotated[~ignored], minlength=self.num_labels)
        return detected.astype(np.int32), scores, matches, objects

    def _compute(self, images):
        labels, scores, matches, objects = zip(*images)
        labels, scores, matches = np.concatenate(labels), np.concatenate(scores), np.concatenate(matches, 1)
        order = np.argsort(-scores, kind="stable")
        labels, matches, objects = labels[order], matches[:, order], np.sum(objects, axis=0)
        precisions = np.full((len(self.iou_thresholds), self.num_labels), np.nan)
        for label in np.flatnonzero(objects):
            for row, match in zip(precisions, matches[:, labels == label]):
                row[label] = interpolated_precision(match[match >= 0], objects[label], self.interpolation)
        result = {"map": float(pixel_metrics.mean_of_counted(precisions))}
        for threshold, row in zip(self.iou_thresholds, precisions):
            name = f"{100 * threshold:g}"
            result[f"map_{name}"] = float(pixel_metrics.mean_of_counted(row))
            result[f"per_category_ap_{name}"] = row.tolist()
        return result


def read_boxes(side, name: str, length: int) -> np.ndarray:
    """Return the boxes of a prediction or reference, upright `(length, 4)` or rotated `(length, 5)`."""
    if "corners" not in side:
        return box_metrics.numbers(side, "boxes", name, length, (4,), (5,))
    corners = torch.from_numpy(box_metrics.numbers(side, "corners", name, length, (4, 2)))
    return smallest_rectangles(corners).numpy() if length else np.zeros((0, 5))


def pairwise_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of all pairs, `(n, m)`."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    if boxes.shape[1] != others.shape[1]:
        raise ValueError("expected rotated boxes in both prediction and reference or in neither, got one of them.")
    iou = box_iou if boxes.shape[1] == 4 else rotated_iou
    return iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()


def assign(iou: np.ndarray, ignored: np.ndarray, threshold: float) -> np.ndarray:
    """Match detections to objects, and return 1 for correct, 0 for wrong and -1 for ignored detections.

    Args:
        iou: overlaps of the detections, by descending score, with the objects, `(n, m)`.
        ignored: whether an object is ignored, bool of shape `(m,)`.
        threshold: smallest IoU of a match.
    """
    if not iou.shape[1]:
        return np.zeros(len(iou), np.int8)
    best, is_enough = iou.argmax(1), iou.max(1) >= threshold
    matches = np.where(is_enough & ignored[best], -1, 0)
    candidates = np.flatnonzero(is_enough & ~ignored[best])
    _, first = np.unique(best[candidates], return_index=True)  # The best detection of each object.
    matches[candidates[first]] = 1
    return matches


def interpolated_precision(matches: np.ndarray, num_objects: int, interpolation: str) -> float:
    """Return the average precision of a class.

    Args:
        matches: whether each detection of the class is correct, by descending score.
        num_objects: number of objects of the class.
        interpolation: `"11_points"` or `"area"`.
    """
    correct = np.cumsum(matches, dtype=np.int64)
    precision = correct / np.arange(1, len(correct) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # Best precision at this recall or a higher one.
    if interpolation == "area":
        return float((best * (matches > 0)).sum() / num_objects)
    indices = [np.searchsorted(10 * correct, tenth * num_objects) for tenth in range(11)]
    return float(sum(best[index] for index in indices if index < len(best)) / 11)
