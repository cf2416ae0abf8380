"""Base class and functions of the detection metrics: images may come in any order and from any process."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf

from .base import DistributedMetric


class BoxMetric(DistributedMetric):
    """Base class of detection metrics.

    A subclass implements `_reduce(prediction, reference)`, which returns what is kept of an image, and
    `_compute(images)`, which gets this for all images in the order of their ids.

    Args:
        num_labels: number of classes.
        num_process, process_id: see `DistributedMetric`. An image that several processes add counts once, by its id.

    The other arguments are those of `evaluate.load`.
    """

    def __init__(self, *args, num_labels: int, **kwargs):
        self.num_labels = num_labels
        self.kept: dict[Hashable, Any] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        boxes = {"boxes": ListOf(ListOf(Value("float64"))), "labels": ListOf(Value("int64"))}
        features = {"predictions": {**boxes, "scores": ListOf(Value("float64"))}, "references": boxes}
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=Features(features))

    def add(self, *, prediction: Mapping, reference: Mapping, image_id: Hashable | None = None):
        """The detections of one image and its objects; see `add_batch`."""
        ids = None if image_id is None else [image_id]
        self.add_batch(predictions=[prediction], references=[reference], image_ids=ids)

    def add_batch(
        self,
        *,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        image_ids: Sequence[Hashable] | None = None,
    ):
        """Adds images.

        Args:
            predictions: of each image `labels`, class indices `(n,)`, `scores`, `(n,)`, and their places; as arrays,
                tensors (on any device) or lists. In which form places are given, the metric says.
            references: the same without `scores`, and what the metric asks for.
            image_ids: by which images are told apart, and ordered where scores are equal: all numbers or all texts.
                If not given, images are in the order in which they come.

        Raises:
            ValueError: names the image, and what of it does not fit.
        """
        if image_ids is None:
            image_ids = [(self.process_id, len(self) + place) for place in range(len(references))]
        if not len(predictions) == len(references) == len(image_ids):
            raise ValueError(
                f"{self.name}: there are {len(predictions)} predictions, {len(references)} references and "
                f"{len(image_ids)} image_ids."
            )
        for image_id, prediction, reference in zip(image_ids, predictions, references):
            try:
                if image_id in self.kept:
                    raise ValueError("it was added before.")
                self.kept[image_id] = self._reduce(prediction, reference)
            except ValueError as error:
                raise ValueError(f"{self.name}, image {image_id!r}: {error}") from error

    def _compute_parts(self, parts: list[dict[Hashable, Any]]) -> dict:
        images = {image_id: kept for part in parts for image_id, kept in part.items()}
        return self._compute([images[key] for key in sorted(images)])

    def _labels(self, side: Mapping, name: str) -> np.ndarray:
        """Class indices of a prediction or a reference, int64 of shape `(n,)`."""
        labels = array(side, "labels", name)
        if labels.ndim != 1 or (labels.size and not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"labels of the {name} are no list of class indices.")
        wrong = np.unique(labels[(labels < 0) | (labels >= self.num_labels)]).tolist()
        if wrong:
            raise ValueError(f"the {name} has the label(s) {wrong[:10]}, but classes are 0 to {self.num_labels - 1}.")
        return labels.astype(np.int64)


def array(side: Mapping, key: str, name: str) -> np.ndarray:
    """A value of a prediction or a reference as an array."""
    if key not in side:
        raise ValueError(f"the {name} has no {key!r}.")
    value = side[key]
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.array(value)


def numbers(side: Mapping, key: str, name: str, length: int, *shapes: tuple[int, ...]) -> np.ndarray:
    """Finite numbers, float64 of shape `(length, *shape)` for one of `shapes`."""
    if isinstance(side.get(key), torch.Tensor):
        side = {key: side[key].float()}  # NumPy has no bfloat16
    values = array(side, key, name).astype(np.float64)
    if not length and not values.size:
        return values.reshape(0, *shapes[0])
    if len(values) != length or values.shape[1:] not in shapes:
        raise ValueError(f"{key} of the {name} are of shape {list(values.shape)}, for {length} label(s).")
    if not np.isfinite(values).all():
        raise ValueError(f"{key} of the {name} are not all finite.")
    return values
