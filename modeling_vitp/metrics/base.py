"""Base class of the metrics, which computes results over all processes."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch

from .resampling import RESAMPLES, Score, resample


class DistributedMetric(evaluate.Metric):
    """Base class of metrics that keep statistics of each batch in `kept`, and compute the result over all processes.

    A subclass sets `kept` to an empty dictionary or list, adds to it in `add_batch`, and implements `_join(parts)`,
    which receives the `kept` of each process and returns the statistics of all cases, and `_compute(cases)`. A case is
    an image, the windows of an image, the slices of a volume, or the images of a scene or a patient. The order of the
    cases does not depend on the model.

    Attributes:
        main_score: key of the main score in the result, used to compare models.
        lower_is_better: keys of the numbers in the result that are better when they are lower, such as an error rate.
        is_share: whether the main score is a share between 0 and 1, which reports show in points, hundredths of it.
        resamples: number of resamples of the cases in `score_images`.
        cases: statistics of the cases of the last result.

    Args:
        num_process, process_id: number of processes that each add a part of the data, and index of this process.
            `compute` gathers the parts through `torch.distributed` and returns the result on all processes. Leave the
            default if every process has all data, as in `Trainer`, which gathers predictions first.

    The other arguments are those of `evaluate.load`.
    """

    main_score: str | None = None
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    is_share: ClassVar[bool] = True
    resamples = RESAMPLES
    kept: dict | list
    cases: Sequence = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for method in ("add", "add_batch", "compute"):
            # `evaluate` appends to the docstrings of these methods when it loads the metric.
            if getattr(cls, method).__doc__ is None:
                raise ValueError(f"Metric {cls.__name__}: expected a docstring of the method {method!r}, found none.")

    def __len__(self) -> int:
        return len(self.kept)

    def add(self, *, prediction, reference):
        """Add one prediction and its reference, see `add_batch`."""
        self.add_batch(
            predictions=[prediction],
            references=[reference],
        )

    def compute(
        self,
        *,
        predictions: Sequence | None = None,
        references: Sequence | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Return the result for all batches added so far, and reset the metric.

        Args:
            predictions, references, kwargs: last batch for `add_batch`, optional.

        Raises:
            ValueError: if no batch was added, or if the number of running processes is not `num_process`.
        """
        if predictions is not None:
            self.add_batch(
                predictions=predictions,
                references=references,
                **kwargs,
            )
        parts = gather_parts(self.kept, self.num_process, self.name)
        self.kept = type(self.kept)()
        if not any(parts):
            raise ValueError(f"{self.name}: nothing to compute. Add predictions first.")
        self.cases = self._join(parts)
        all_indices = np.arange(len(self.cases))
        return self.compute_cases(all_indices)

    def compute_cases(self, indices: np.ndarray) -> dict[str, Any]:
        """Return the result for some cases of the last result, which may be repeated, without predicting again."""
        cases = self._take(indices)
        return self._compute(cases)

    def greater_is_better(self, score: str) -> bool:
        """Return whether a higher value of a score is better.

        Args:
            score: key of the result, or the name of the value of a class, such as `iou/building`, see
                [`~modeling_vitp.metrics.report.name_classes`].
        """
        key = score.partition("/")[0]
        if key in self.lower_is_better:
            return False
        return f"per_category_{key}" not in self.lower_is_better

    def score_images(self, key: str | None = None) -> Score:
        """Return a score of the last result with its values over resamples of the cases.

        Args:
            key: key of a number in the result, by default `main_score`.

        Raises:
            ValueError: if the result has no such number.
        """
        key = key or self.main_score
        num_cases = len(self.cases)
        metrics = self.compute_cases(np.arange(num_cases))
        scores = {}
        for name, value in metrics.items():
            if isinstance(value, float):
                scores[name] = value
        if key not in scores:
            score_names = ", ".join(scores)
            raise ValueError(f"{self.name}: unknown main score {key!r}. Expected one of {score_names}.")
        resampled = []
        for draw in resample(num_cases, number=self.resamples):
            drawn_cases = self._take(draw)
            resampled.append(self._score(drawn_cases, key))
        return Score(
            value=scores[key],
            resampled=resampled,
            cases=num_cases,
            greater_is_better=self.greater_is_better(key),
        )

    def _take(self, indices: np.ndarray) -> Sequence:
        return self.cases[indices]

    def _score(self, cases: Sequence, key: str) -> float:
        """Return one number of the result. Metrics whose other numbers take long override this method."""
        return self._compute(cases)[key]


def as_array(values: Any) -> np.ndarray:
    """Return a tensor (on any device, of any dtype), array or list as an array; floats of a tensor as float64."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    tensor = values.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.double()
    return tensor.numpy()


def check_lengths(metric_name: str, **arguments: Sequence) -> None:
    """Raise a `ValueError` if the arguments, each with a value for every image of a batch, differ in length."""
    lengths = {argument: len(values) for argument, values in arguments.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{metric_name}: expected arguments of the same length, got {lengths}.")


@contextmanager
def prefixed_errors(prefix: str) -> Iterator[None]:
    """Put a prefix, such as the metric and the image, before the message of a `ValueError` in the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def group_by_case(case_ids: Iterable[Hashable]) -> list[list[int]]:
    """Return the indices of the images of each case, in the order of the cases."""
    image_indices = {}
    for index, case in enumerate(case_ids):
        if case not in image_indices:
            image_indices[case] = []
        image_indices[case].append(index)
    return [image_indices[case] for case in sorted(image_indices)]


def gather_parts(part: Any, num_process: int, name: str) -> list[Any]:
    """Return the parts of all processes (through `torch.distributed`, by pickle), in the order of their ranks.

    Args:
        part: the part of this process.
        num_process: number of processes that have a part. If 1, the result is `[part]`.
        name: name of the metric in errors.

    Raises:
        ValueError: if the number of running processes is not `num_process`.
    """
    if num_process == 1:
        return [part]
    processes = 1
    if torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    if processes != num_process:
        raise ValueError(f"{name}: expected num_process={num_process} processes, got {processes}.")
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    return parts
