"""What the metrics of this folder share: areas of agreement, counted as predictions come and then let go."""

from collections.abc import Hashable, Iterable, Sequence

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value

from .gathering import gather


def count_areas(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int | None = None
) -> np.ndarray:
    """Pixels of each class, where the reference is not `ignore_index`.

    Args:
        prediction, reference: class ids of one shape, integers (arrays, tensors or nested lists).
        num_labels: number of classes.
        ignore_index: value in the reference of pixels that do not count; `None` if all do.

    Returns:
        int64 of shape `(3, num_labels)`: in both, in the prediction, in the reference.

    Raises:
        ValueError: if the shapes differ, the values are not integers, or a value that counts is no class.
    """
    if tuple(np.shape(prediction)) != tuple(np.shape(reference)):
        raise ValueError(f"the prediction has shape {np.shape(prediction)}, the reference {np.shape(reference)}.")
    prediction, reference = as_labels(prediction, "prediction"), as_labels(reference, "reference")
    if ignore_index is not None:
        counts = reference != ignore_index
        prediction, reference = prediction[counts], reference[counts]
    for name, value in (("prediction", prediction), ("reference", reference)):
        wrong = value[(value < 0) | (value >= num_labels)].unique().tolist()
        if wrong:
            raise ValueError(
                f"the {name} has the value(s) {wrong[:10]}, but classes are 0 to {num_labels - 1} and "
                f"ignore_index is {ignore_index}."
            )
    confusion = torch.bincount(reference * num_labels + prediction, minlength=num_labels**2)
    confusion = confusion.view(num_labels, num_labels).cpu().numpy()
    return np.stack([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)])


def as_labels(values, name: str) -> torch.Tensor:
    values = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"the {name} is {values.dtype}: class ids (the argmax of logits) are needed.")
    return values.flatten().long()


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def mean_of_counted(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean without NaN; NaN if nothing else is there."""
    is_counted = ~np.isnan(values)
    return ratio(np.where(is_counted, values, 0).sum(axis), is_counted.sum(axis))


class PixelMetric(evaluate.Metric):
    """Base of metrics that follow from the areas of [`count_areas`], by case or over the data set.

    No prediction is kept: `add_batch` counts and forgets. A subclass gives `_compute(cases)`, where `cases` is int64 of
    shape `(cases, 3, num_labels)`.

    Attributes:
        main_score: key of the result that stands for it where one number is shown.
        surface_metric: metric of this folder that is measured beside it on volumes, after training.

    Args:
        num_labels: number of classes.
        ignore_index: value in references of pixels that do not count.
        num_process, process_id: where each process has added its own part of the data, their number and which this is.
            `compute` then adds up the counts of all (through `torch.distributed`) and gives the result to all. Leave
            the default where every process has everything, as in `Trainer`, which gathers predictions first.

    The other arguments are those of `evaluate.load`.
    """

    main_score: str | None = None
    surface_metric: str | None = None

    def __init__(self, *args, num_labels: int, ignore_index: int | None = None, **kwargs):
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.cases: dict[Hashable, np.ndarray] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label_map = List(List(Value("int64")))
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=Features({"predictions": label_map, "references": label_map}),
        )

    def set_names(self, names: Sequence[str]) -> None:
        """Take the names of the classes. A metric to which they matter overrides it."""

    def __len__(self) -> int:
        return len(self.cases)

    def add(self, *, prediction, reference):
        """One label map, `(height, width)`, and its reference; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence, references: Sequence, case_ids: Sequence[Hashable] | None = None):
        """Counts a batch.

        Args:
            predictions, references: label maps, `(batch, height, width)` as array, tensor (on any device) or list; maps
                of different size are a list.
            case_ids: case of each map, for a metric that is by case; others ignore it.

        Raises:
            ValueError: if the two differ in number or shape, or hold a value that is no class; the map is named by its
                place in the batch.
        """
        self._count(predictions, references, [None] * len(references))

    def _count(self, predictions: Sequence, references: Sequence, cases: Iterable[Hashable]) -> None:
        if len(predictions) != len(references):
            raise ValueError(f"there are {len(predictions)} predictions for {len(references)} references.")
        for place, (prediction, reference, case) in enumerate(zip(predictions, references, cases)):
            try:
                areas = count_areas(prediction, reference, self.num_labels, self.ignore_index)
            except ValueError as error:
                raise ValueError(f"{self.name}, map {place} of the batch: {error}") from error
            self.cases[case] = self.cases.get(case, 0) + areas

    def compute(self, *, predictions: Sequence | None = None, references: Sequence | None = None, **kwargs) -> dict:
        """The result for all that was added, which is then forgotten.

        Raises:
            ValueError: if nothing was added, or `num_process` processes are not there.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        parts = gather(self.cases, self.num_process, self.name)
        self.cases = {}
        total = {}
        for part in parts:
            for case, areas in part.items():
                total[case] = total.get(case, 0) + areas
        if not total:
            raise ValueError(f"{self.name}: there is nothing to compute: add predictions first.")
        return self._compute(np.stack(list(total.values())))
