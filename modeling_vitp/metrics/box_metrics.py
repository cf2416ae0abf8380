"""Base class and functions of the detection metrics. Images may be added in any order and by any process."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from .base import DistributedMetric, as_array, group_by_case
from .resampling import BOX_RESAMPLES


class BoxMetric(DistributedMetric):
    """Base class of detection metrics.

    A subclass implements `_reduce(prediction, reference)`, which returns the statistics of an image, and
    `_compute(images)`, which receives the statistics of images in the order of their ids.

    Args:
        num_labels: number of classes.
        num_process, process_id: see `DistributedMetric`. An image that several processes add is counted once.

    The other arguments are those of `evaluate.load`.
    """

    main_score = "map"
    resamples = BOX_RESAMPLES

    def __init__(self, *args, num_labels: int, **kwargs):
        self.num_labels = num_labels
        self.kept: dict[Hashable, tuple[Hashable, Any]] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        boxes = {"boxes": ListOf(ListOf(Value("float64"))), "labels": ListOf(Value("int64"))}
        features = {"predictions": {**boxes, "scores": ListOf(Value("float64"))}, "references": boxes}
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=Features(features))

    def add_batch(
        self,
        *,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        image_ids: Sequence[Hashable] | None = None,
        case_ids: Sequence[Hashable] | None = None,
    ):
        """Add a batch of images.

        Args:
            predictions: detections of each image: `labels` (class indices), `(n,)`, `scores`, `(n,)`, and the boxes or
                masks in the format of the metric, as arrays, tensors (on any device) or lists.
            references: objects of each image in the same format without `scores`, with the options of the metric.
            image_ids: unique ids of the images, all numbers or all strings. They order detections with equal scores.
                Default: the order in which the images are added.
            case_ids: case of each image, such as the whole image of a window; all numbers or all strings. Default: each
                image is a case. Only resamples use them.

        Raises:
            ValueError: if the arguments differ in length, an image was added before, or its values are invalid.
        """
        if image_ids is None:
            image_ids = [(self.process_id, len(self) + index) for index in range(len(references))]
        case_ids = image_ids if case_ids is None else case_ids
        if not len(predictions) == len(references) == len(image_ids) == len(case_ids):
            raise ValueError(
                f"{self.name}: expected as many predictions, image_ids and case_ids as references, got "
                f"{len(predictions)}, {len(image_ids)}, {len(case_ids)} and {len(references)}."
            )
        for image_id, case_id, prediction, reference in zip(image_ids, case_ids, predictions, references):
            try:
                if image_id in self.kept:
                    raise ValueError("the image was added before.")
                self.kept[image_id] = case_id, self._reduce(prediction, reference)
            except ValueError as error:
                raise ValueError(f"{self.name}, image {image_id!r}: {error}") from error

    def _join(self, parts: list[dict[Hashable, tuple[Hashable, Any]]]) -> list[list[int]]:
        """Return the indices of the images of each case, and set `images` to the statistics of the images."""
        kept = {image_id: image for part in parts for image_id, image in part.items()}
        images = [kept[image_id] for image_id in sorted(kept)]
        self.images = [statistics for _, statistics in images]
        return group_by_case(case for case, _ in images)

    def _take(self, indices):
        images = sorted(image for case in indices for image in self.cases[case])
        return [self.images[index] for index in images]

    def _labels(self, side: Mapping, name: str) -> np.ndarray:
        """Return the class indices of a prediction or reference, int64 of shape `(n,)`."""
        labels = array(side, "labels", name)
        if labels.ndim != 1 or (labels.size and not np.issubdtype(labels.dtype, np.integer)):
            found = f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"expected `labels` of the {name} as a list of class indices, got {found}.")
        wrong = np.unique(labels[(labels < 0) | (labels >= self.num_labels)]).tolist()
        if wrong:
            raise ValueError(f"expected `labels` of the {name} in [0, {self.num_labels}), got {wrong[:10]}.")
        return labels.astype(np.int64)


def array(side: Mapping, key: str, name: str) -> np.ndarray:
    """Return a value of a prediction or reference as an array."""
    if key not in side:
        raise ValueError(f"no key {key!r} in the {name}. Found: {', '.join(side)}.")
    return as_array(side[key])


def numbers(side: Mapping, key: str, name: str, length: int, *shapes: tuple[int, ...]) -> np.ndarray:
    """Return finite numbers of a prediction or reference, float64 of shape `(length, *shape)` for one of `shapes`."""
    values = array(side, key, name).astype(np.float64)
    if not length and not values.size:
        return values.reshape(0, *shapes[0])
    if len(values) != length or values.shape[1:] not in shapes:
        expected = " or ".join(str([length, *shape]) for shape in shapes)
        raise ValueError(f"expected `{key}` of the {name} of shape {expected}, got {list(values.shape)}.")
    if not np.isfinite(values).all():
        raise ValueError(f"`{key}` of the {name} must be finite.")
    return values
