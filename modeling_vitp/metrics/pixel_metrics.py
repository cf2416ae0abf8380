"""Base class and functions of the metrics of label maps. Pixels are counted per case, and maps are not kept."""

from collections import Counter
from collections.abc import Hashable, Sequence

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value

from .base import DistributedMetric, check_lengths, prefixed_errors

LABEL_MAPS = Features(
    predictions=List(List(Value("int64"))),
    references=List(List(Value("int64"))),
)


def count_areas(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    num_labels: int,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Return the number of pixels of each class, without the pixels whose reference is `ignore_index`.

    Args:
        prediction, reference: class indices of the same shape, integers (arrays, tensors or nested lists).
        num_labels: number of classes.
        ignore_index: reference value of ignored pixels, or `None` to count all pixels.

    Returns:
        Pixel counts of the intersection, the prediction and the reference, int64 of shape `(3, num_labels)`.

    Raises:
        ValueError: if the shapes differ, the values are not integers, or a value is not a class index.
    """
    shape = tuple(np.shape(prediction))
    reference_shape = tuple(np.shape(reference))
    if shape != reference_shape:
        raise ValueError(f"expected a prediction of the shape of the reference {reference_shape}, got {shape}.")
    prediction = as_labels(prediction, "prediction")
    reference = as_labels(reference, "reference")
    if ignore_index is not None:
        is_counted = reference != ignore_index
        prediction = prediction[is_counted]
        reference = reference[is_counted]
    for name, labels in (("prediction", prediction), ("reference", reference)):
        is_wrong = (labels < 0) | (labels >= num_labels)
        wrong_labels = labels[is_wrong].unique().tolist()
        if wrong_labels:
            raise ValueError(
                f"expected class indices of the {name} in [0, {num_labels}) or ignore_index={ignore_index}, got "
                f"{wrong_labels[:10]}."
            )
    pairs = reference * num_labels + prediction
    pair_counts = torch.bincount(pairs, minlength=num_labels**2)
    confusion = pair_counts.view(num_labels, num_labels).cpu().numpy()
    areas = [
        confusion.diagonal(),
        confusion.sum(axis=0),
        confusion.sum(axis=1),
    ]
    return np.stack(areas)


def as_labels(values: np.ndarray | torch.Tensor | list, name: str) -> torch.Tensor:
    """Return the class indices of a map, int64 of shape `(pixels,)`."""
    if not isinstance(values, torch.Tensor):
        array = np.array(values)
        values = torch.from_numpy(array)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"expected the {name} as integer class indices (the argmax of logits), got {values.dtype}.")
    return values.flatten().long()


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide two arrays, with NaN where the denominator is 0."""
    quotients = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=quotients, where=denominator != 0)


def mean_of_counted(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the mean of the values that are not NaN, or NaN if all are."""
    is_counted = ~np.isnan(values)
    counted_values = np.where(is_counted, values, 0)
    return ratio(counted_values.sum(axis), is_counted.sum(axis))


class PixelMetric(DistributedMetric):
    """Base class of metrics that are computed from the pixel counts of [`count_areas`] of each case.

    A subclass implements `_compute(cases)`, where `cases` is int64 of shape `(cases, 3, num_labels)`. Predictions are
    not kept.

    Attributes:
        surface_metric: metric of this folder that is also computed on volumes after training.

    Args:
        num_labels: number of classes.
        ignore_index: reference value of ignored pixels.
        num_process, process_id: see `DistributedMetric`.

    The other arguments are those of `evaluate.load`.
    """

    surface_metric: str | None = None

    def __init__(
        self,
        *args,
        num_labels: int,
        ignore_index: int | None = None,
        **kwargs,
    ):
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.kept: dict[tuple[Hashable, Hashable], np.ndarray] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=LABEL_MAPS,
        )

    def set_names(self, names: Sequence[str]) -> None:
        """Set the names of the classes. Metrics that depend on class names override this method."""

    def add_batch(
        self,
        *,
        predictions: Sequence,
        references: Sequence,
        case_ids: Sequence[Hashable] | None = None,
        group_ids: Sequence[Hashable] | None = None,
    ):
        """Count a batch.

        Args:
            predictions, references: label maps, `(batch, height, width)` as array, tensor (on any device) or list. Maps
                of different sizes must be a list.
            case_ids: case of each map, all numbers or all strings. The maps of a case (slices of a volume) may be added
                in any batch and process. Default: each map is a case.
            group_ids: group of the case of each map, such as the patient of a volume; all numbers or all strings. Only
                resamples use them. Default: each case is a group.

        Raises:
            ValueError: if the arguments differ in number or shape, or have a value that is not a class index.
        """
        if case_ids is None:
            first_index = len(self)
            case_ids = [(self.process_id, first_index + index) for index in range(len(references))]
        if group_ids is None:
            group_ids = case_ids
        check_lengths(
            self.name,
            predictions=predictions,
            references=references,
            case_ids=case_ids,
            group_ids=group_ids,
        )
        for index, case in enumerate(zip(group_ids, case_ids)):
            with prefixed_errors(f"{self.name}, map {index} of the batch"):
                areas = count_areas(
                    predictions[index],
                    references[index],
                    self.num_labels,
                    self.ignore_index,
                )
            self.kept[case] = self.kept.get(case, 0) + areas

    def _join(self, parts: list[dict[tuple[Hashable, Hashable], np.ndarray]]) -> np.ndarray:
        """Return the index of the first case and the number of cases of each group, int64 of shape `(groups, 2)`.

        Set `areas` to the pixel counts of the cases, group by group.
        """
        areas_by_case = {}
        for process_areas in parts:
            for case, areas in process_areas.items():
                areas_by_case[case] = areas_by_case.get(case, 0) + areas
        ordered_cases = sorted(areas_by_case)
        self.areas = np.stack([areas_by_case[case] for case in ordered_cases])
        ordered_groups = [group for group, _ in ordered_cases]
        # The cases are sorted by group, so the counter has the groups in the order of their cases.
        group_sizes = Counter(ordered_groups)
        counts = np.array(list(group_sizes.values()))
        starts = np.cumsum(counts) - counts
        return np.stack([starts, counts], axis=1)

    def _take(self, indices: np.ndarray) -> np.ndarray:
        starts, counts = self.cases[indices].T
        ends = np.cumsum(counts)
        # The difference of where a group starts in `areas` and where it starts in what is returned.
        offsets = starts - ends + counts
        case_indices = np.repeat(offsets, counts) + np.arange(ends[-1])
        return self.areas[case_indices]
