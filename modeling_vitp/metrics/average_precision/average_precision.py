"""Average precision of detection as Pascal VOC and DOTA score it, for upright and for oriented boxes."""

import numpy as np
import torch
from torchvision.ops import box_iou

from modeling_vitp.metrics import box_metrics, pixel_metrics
from modeling_vitp.rotated_boxes import rotated_iou, smallest_rectangles

INTERPOLATIONS = ("11_points", "area")


class AveragePrecision(box_metrics.BoxMetric):
    """Average precision of each class at one or more overlaps, and the mean of the classes that occur.

    As Pascal VOC does it: over all images, detections of a class come by falling score. One is right if the object of
    its class in the image that it overlaps most is overlapped enough and still free; wrong otherwise, even where
    another object would do. Precision at a recall is the best at that recall or a higher one, averaged at recalls of 0,
    0.1, … 1 (`"11_points"`, VOC 2007, which DOTA, DIOR-R and RSAR are scored by) or over all (`"area"`, VOC 2010). What
    overlaps a difficult object most is neither right nor wrong, and such objects need not be found, unless
    `difficult_counts`. It is so with a crowd, a region of many, in any case.

    Places are `boxes`: upright, `(n, 4)` with x1, y1, x2, y2, or rotated, `(n, 5)` with cx, cy, width, height and an
    angle in radians from x towards y; or `corners`, `(n, 4, 2)`, which stand for the smallest rectangle around them.
    References may have `difficult` and `crowd`, `(n,)`. Matches and scores are kept, boxes are not.

    `evaluate.load(str(METRICS_FOLDER / "average_precision"), num_labels=20)`.

    Args:
        iou_thresholds: the overlaps (intersection over union) from which a detection is right.
        interpolation: `"11_points"` or `"area"`.
        difficult_counts: whether difficult objects are objects as others, as the authors' release scores DOTA.

    The other arguments are those of `BoxMetric`.

    Returns:
        `map`, the mean over classes and overlaps; for each overlap `map_50` and, by class, `per_category_ap_50`. A
        class without objects is NaN, and not in the means.
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
            raise ValueError(f"interpolation={interpolation!r} is none of {', '.join(INTERPOLATIONS)}.")
        self.iou_thresholds = tuple(iou_thresholds)
        self.interpolation, self.difficult_counts = interpolation, difficult_counts
        super().__init__(*args, **kwargs)

    def _reduce(self, prediction, reference):
        """The detections' labels and scores, what they are at each overlap (1 right, 0 wrong, -1 neither), and how many
        objects of each class there are to find."""
        found, there = self._labels(prediction, "prediction"), self._labels(reference, "reference")
        scores = box_metrics.numbers(prediction, "scores", "prediction", len(found), ())
        left_out = np.zeros(len(there), bool)
        for name in ("crowd",) if self.difficult_counts else ("crowd", "difficult"):
            if reference.get(name) is not None:
                left_out |= box_metrics.numbers(reference, name, "reference", len(there), ()) != 0
        iou = pairwise_overlaps(
            read_places(prediction, "prediction", len(found)), read_places(reference, "reference", len(there))
        )
        matches = np.zeros((len(self.iou_thresholds), len(found)), np.int8)
        for label in np.unique(found):
            rows, columns = np.flatnonzero(found == label), np.flatnonzero(there == label)
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            for match, threshold in zip(matches, self.iou_thresholds):
                match[rows] = assign(iou[np.ix_(rows, columns)], left_out[columns], threshold)
        objects = np.bincount(there[~left_out], minlength=self.num_labels)
        return found.astype(np.int32), scores, matches, objects

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


def read_places(side, name: str, length: int) -> np.ndarray:
    """Boxes of a prediction or a reference, upright `(length, 4)` or rotated `(length, 5)`."""
    if "corners" not in side:
        return box_metrics.numbers(side, "boxes", name, length, (4,), (5,))
    corners = torch.from_numpy(box_metrics.numbers(side, "corners", name, length, (4, 2)))
    return smallest_rectangles(corners).numpy() if length else np.zeros((0, 5))


def pairwise_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs, `(n, m)`."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    if boxes.shape[1] != others.shape[1]:
        raise ValueError("either the prediction or the reference has rotated boxes, but not both.")
    iou = box_iou if boxes.shape[1] == 4 else rotated_iou
    return iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()


def assign(iou: np.ndarray, left_out: np.ndarray, threshold: float) -> np.ndarray:
    """Of detections, best first, by their overlaps `(n, m)` with objects, some of which need not be found: 1 right, 0
    wrong, -1 neither.
    """
    if not iou.shape[1]:
        return np.zeros(len(iou), np.int8)
    best, is_enough = iou.argmax(1), iou.max(1) >= threshold
    matches = np.where(is_enough & left_out[best], -1, 0)
    taken = np.flatnonzero(is_enough & ~left_out[best])
    _, first = np.unique(best[taken], return_index=True)  # the best detection of each object
    matches[taken[first]] = 1
    return matches


def interpolated_precision(matches: np.ndarray, num_objects: int, interpolation: str) -> float:
    """
    Args:
        matches: of the detections of a class, best first, whether each is right.
        num_objects: how many are there to find.
    """
    right = np.cumsum(matches, dtype=np.int64)
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    if interpolation == "area":
        return float((best * (matches > 0)).sum() / num_objects)
    reached = [np.searchsorted(10 * right, tenth * num_objects) for tenth in range(11)]
    return float(sum(best[place] for place in reached if place < len(best)) / 11)
