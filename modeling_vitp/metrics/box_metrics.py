"""Base class and functions of the detection metrics. Images may be added in any order and by any process."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from .base import DistributedMetric, as_array, check_lengths, group_by_case, prefixed_errors
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
        reference_features = {
            "boxes": ListOf(ListOf(Value("float64"))),
            "labels": ListOf(Value("int64")),
        }
        prediction_features = {
            **reference_features,
            "scores": ListOf(Value("float64")),
        }
        features = Features(
            predictions=prediction_features,
            references=reference_features,
        )
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=features,
        )

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
            first_index = len(self)
            image_ids = [(self.process_id, first_index + index) for index in range(len(references))]
        if case_ids is None:
            case_ids = image_ids
        check_lengths(
            self.name,
            predictions=predictions,
            references=references,
            image_ids=image_ids,
            case_ids=case_ids,
        )
        for image_id, case_id, prediction, reference in zip(image_ids, case_ids, predictions, references):
            with prefixed_errors(f"{self.name}, image {image_id!r}"):
                if image_id in self.kept:
                    raise ValueError("the image was added before.")
                statistics = self._reduce(prediction, reference)
            self.kept[image_id] = (case_id, statistics)

    def _join(self, parts: list[dict[Hashable, tuple[Hashable, Any]]]) -> list[list[int]]:
        """Return the indices of the images of each case, and set `images` to the statistics of the images."""
        images_by_id = {}
        for process_images in parts:
            images_by_id.update(process_images)
        self.images = []
        case_ids = []
        for image_id in sorted(images_by_id):
            case_id, statistics = images_by_id[image_id]
            case_ids.append(case_id)
            self.images.append(statistics)
        return group_by_case(case_ids)

    def _take(self, indices: np.ndarray) -> list:
        image_indices = []
        for index in indices:
            image_indices.extend(self.cases[index])
        image_indices.sort()
        return [self.images[image_index] for image_index in image_indices]

    def _labels(self, side: Mapping, name: str) -> np.ndarray:
        """Return the class indices of a prediction or reference, int64 of shape `(n,)`."""
        labels = as_array(side["labels"])
        # An empty list becomes an array of floats.
        are_integers = labels.size == 0 or np.issubdtype(labels.dtype, np.integer)
        is_unknown = ~np.isin(labels, np.arange(self.num_labels))
        if labels.ndim != 1 or not are_integers or is_unknown.any():
            wrong_labels = np.unique(labels[is_unknown])
            raise ValueError(
                f"expected `labels` of the {name} as a list of class indices in [0, {self.num_labels}), got "
                f"{labels.dtype} of shape {labels.shape}, outside of this range {wrong_labels[:10].tolist()}."
            )
        return labels.astype(np.int64)


def numbers(side: Mapping, key: str, name: str, length: int, *shapes: tuple[int, ...]) -> np.ndarray:
    """Return finite numbers of a prediction or reference, float64 of shape `(length, *shape)` for one of `shapes`."""
    values = as_array(side[key]).astype(np.float64)
    if length == 0 and values.size == 0:
        return values.reshape(0, *shapes[0])
    is_finite = np.isfinite(values)
    expected_shapes = [(length, *shape) for shape in shapes]
    if values.shape not in expected_shapes or not is_finite.all():
        expected = " or ".join(str(list(shape)) for shape in expected_shapes)
        raise ValueError(
            f"expected `{key}` of the {name} as finite numbers of shape {expected}, got {list(values.shape)}, "
            f"{np.sum(~is_finite)} of them not finite."
        )
    return values
