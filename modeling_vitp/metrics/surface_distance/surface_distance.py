"""Surface Dice and Hausdorff distance of medical segmentation, in millimeters, per case."""

import warnings
import zlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import evaluate
import numpy as np
import torch

from modeling_vitp.metrics import base, pixel_metrics

PERCENTILE = 95


class Packed(NamedTuple):
    """Compressed label map and reference, with their shape and voxel spacing."""

    shape: tuple[int, int, int]
    prediction: bytes
    reference: bytes
    spacing: tuple[float, float, float]


class SurfaceDistance(base.DistributedMetric):
    """Surface Dice at a tolerance, and 95th percentile of the Hausdorff distance, per class and case.

    The surface of a class is the set of its voxels that have one of their six neighbors outside the class, or lie at
    the border of the volume. Each surface voxel has a distance in millimeters to the nearest voxel of the other
    surface. *Surface Dice* (Nikolov et al., arXiv 1809.04430, with voxel counts for areas) is the share of voxels of
    both surfaces whose distance is at most the tolerance. The *Hausdorff distance* is the larger of the 95th
    percentiles of both directions. MONAI computes both (`compute_surface_dice`, `compute_hausdorff_distance`).

    If a class is in neither the prediction nor the reference of a case, it is not counted. If it is in only one of the
    two, surface Dice is 0, and the Hausdorff distance is the diagonal of the volume, as in BraTS (373.13 mm). A case of
    one slice is measured in its plane. Ignored voxels are background in both maps. The values are averaged over the
    cases, and then over the classes without the background.

    `evaluate.load(str(METRICS_FOLDER / "surface_distance"), num_labels=14)` loads the metric.

    Args:
        num_labels: number of classes, at most 256.
        ignore_index: reference value of ignored voxels.
        background: class index that is not measured.
        tolerance: tolerance of surface Dice in millimeters.
        num_process, process_id: see `DistributedMetric`.

    Returns:
        `mean_surface_dice`, `mean_hausdorff_95` (in millimeters), and the lists per class `per_category_surface_dice`,
        `per_category_hausdorff_95` and `per_category_missed_cases` (number of cases with the class in only one of
        prediction and reference).
    """

    lower_is_better = ("mean_hausdorff_95", "per_category_hausdorff_95", "per_category_missed_cases")

    def __init__(
        self,
        *args,
        num_labels: int,
        ignore_index: int | None = None,
        background: int = 0,
        tolerance: float = 1.0,
        **kwargs,
    ):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.background, self.tolerance = background, tolerance
        self.kept: dict[Hashable, dict[int, Packed]] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=pixel_metrics.LABEL_MAPS)

    def add_batch(
        self,
        *,
        predictions: Sequence,
        references: Sequence,
        spacings: Sequence[Sequence[float]],
        case_ids: Sequence[Hashable] | None = None,
        places: Sequence[int] | None = None,
    ):
        """Add a batch of label maps, which are kept compressed.

        Args:
            predictions, references: label maps, integers of shape `(slices, height, width)`, or single slices of
                shape `(height, width)`.
            spacings: spacing of each map in millimeters, between slices, rows and columns.
            case_ids: case of each map, if the maps are single slices. The slices of a case may be added in any batch
                and process. Default: each map is a case.
            places: index of each slice in its case, from 0. Required with `case_ids`.

        Raises:
            ValueError: if the arguments differ in number, a map differs in shape from its reference, a value is not a
                class index, or a spacing is not three positive numbers.
        """
        count = len(references)
        if case_ids is None:
            case_ids, places = [(self.process_id, len(self) + index) for index in range(count)], [0] * count
        if not len(predictions) == len(spacings) == len(case_ids) == len(places or ()) == count:
            raise ValueError(f"{self.name}: expected {count} predictions, spacings, case_ids and places.")
        for index, (case, place) in enumerate(zip(case_ids, places)):
            try:
                packed = self._pack(predictions[index], references[index], spacings[index])
            except ValueError as error:
                raise ValueError(f"{self.name}, map {index} of the batch: {error}") from error
            if place in self.kept.setdefault(case, {}):
                raise ValueError(f"{self.name}: slice {place} of case {case!r} was added before.")
            self.kept[case][int(place)] = packed

    def _pack(self, prediction, reference, spacing: Sequence[float]) -> Packed:
        shape = tuple(np.shape(reference))
        # Only the checks of this function are needed.
        pixel_metrics.count_areas(prediction, reference, self.num_labels, self.ignore_index)
        if len(shape) not in (2, 3) or len(spacing) != 3 or not all(0 < value < np.inf for value in spacing):
            raise ValueError(
                f"expected shape (slices, height, width) and three spacings in millimeters, got {shape} and {spacing}."
            )
        maps = [pixel_metrics.as_labels(values, "map").cpu().numpy() for values in (prediction, reference)]
        if self.ignore_index is not None:
            ignored = maps[1] == self.ignore_index
            maps = [np.where(ignored, self.background, values) for values in maps]
        packed = [zlib.compress(values.astype(np.uint8).tobytes(), 1) for values in maps]
        return Packed((1,) * (3 - len(shape)) + shape, *packed, tuple(map(float, spacing)))

    def _join(self, parts: list[dict[Hashable, dict[int, Packed]]]) -> np.ndarray:
        """Return the scores of each case, see `_measure`, of shape `(cases, 3, num_labels)`."""
        cases: dict[Hashable, dict[int, Packed]] = {}
        for part in parts:
            for case, slices in part.items():
                cases.setdefault(case, {}).update(slices)
        numbered = list(enumerate(cases.items()))
        own_scores = {number: self._measure(*case) for number, case in numbered[self.process_id :: self.num_process]}
        measured = {}
        for part in base.gather_parts(own_scores, self.num_process, self.name):
            measured |= part
        return np.stack([measured[number] for number, _ in numbered])

    def _compute(self, cases: np.ndarray) -> dict[str, Any]:
        surface_dice, hausdorff, missed = cases.swapaxes(0, 1)
        by_class = [pixel_metrics.mean_of_counted(values, axis=0) for values in (surface_dice, hausdorff)]
        return {
            "mean_surface_dice": float(pixel_metrics.mean_of_counted(by_class[0])),
            "mean_hausdorff_95": float(pixel_metrics.mean_of_counted(by_class[1])),
            "per_category_surface_dice": by_class[0].tolist(),
            "per_category_hausdorff_95": by_class[1].tolist(),
            "per_category_missed_cases": missed.sum(axis=0).astype(int).tolist(),
        }

    def _measure(self, case: Hashable, slices: dict[int, Packed]) -> np.ndarray:
        """Return surface Dice, Hausdorff distance and whether the case is missed, of shape `(3, num_labels)`."""
        if sorted(slices) != list(range(len(slices))):
            missing = min(set(range(len(slices))) - set(slices))
            raise ValueError(
                f"{self.name}: slice {missing} of case {case!r} is missing. Surface distances need whole volumes."
            )
        ordered = [slices[place] for place in range(len(slices))]
        if len({(packed.shape[1:], packed.spacing) for packed in ordered}) > 1:
            raise ValueError(f"{self.name}: the slices of case {case!r} differ in size or spacing.")
        prediction, reference = (
            np.concatenate(
                [np.frombuffer(zlib.decompress(getattr(part, kind)), np.uint8).reshape(part.shape) for part in ordered]
            )
            for kind in ("prediction", "reference")
        )
        scores = np.full((3, self.num_labels), np.nan)
        scores[2] = 0
        for label in range(self.num_labels):
            if label != self.background:
                scores[:, label] = surface_scores(
                    prediction == label, reference == label, ordered[0].spacing, self.tolerance
                )
        return scores


def surface_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    tolerance: float,
) -> tuple[float, float, int]:
    """Return surface Dice, Hausdorff distance, and 1 if the class is in only one of prediction and reference.

    Args:
        prediction, reference: bool of shape `(slices, height, width)`.
        spacing: spacing of the three axes in millimeters.
        tolerance: tolerance of surface Dice in millimeters.
    """
    if not (prediction.any() and reference.any()):
        if not (prediction.any() or reference.any()):
            return np.nan, np.nan, 0
        return 0.0, float(np.linalg.norm(np.array(prediction.shape) * spacing)), 1
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ModuleNotFoundError as error:
        raise ImportError("Surface distances need MONAI: pip install 'modeling-vitp[medical]'.") from error

    if len(prediction) == 1:
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    maps = [torch.from_numpy(np.ascontiguousarray(values))[None, None] for values in (prediction, reference)]
    options = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns about its own code.
        surface_dice = compute_surface_dice(*maps, [tolerance], **options)
        hausdorff = compute_hausdorff_distance(*maps, percentile=PERCENTILE, **options)
    return surface_dice.item(), hausdorff.item(), 0
