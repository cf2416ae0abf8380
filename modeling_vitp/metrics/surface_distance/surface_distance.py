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
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.background = background
        self.tolerance = tolerance
        self.kept: dict[Hashable, dict[int, Packed]] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=pixel_metrics.LABEL_MAPS,
        )

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
        if case_ids is None:
            first_index = len(self)
            case_ids = [(self.process_id, first_index + index) for index in range(len(references))]
            places = [0] * len(references)
        if places is None:
            places = []
        base.check_lengths(
            self.name,
            predictions=predictions,
            references=references,
            spacings=spacings,
            case_ids=case_ids,
            places=places,
        )
        for index, (case, place) in enumerate(zip(case_ids, places)):
            with base.prefixed_errors(f"{self.name}, map {index} of the batch"):
                packed = self._pack(predictions[index], references[index], spacings[index])
            slices = self.kept.setdefault(case, {})
            if place in slices:
                raise ValueError(f"{self.name}: slice {place} of case {case!r} was added before.")
            slices[int(place)] = packed

    def _pack(self, prediction, reference, spacing: Sequence[float]) -> Packed:
        # Only the checks of this function are needed.
        pixel_metrics.count_areas(prediction, reference, self.num_labels, self.ignore_index)
        shape = tuple(np.shape(reference))
        is_spacing = len(spacing) == 3 and all(0 < distance < np.inf for distance in spacing)
        if len(shape) not in (2, 3) or not is_spacing:
            raise ValueError(
                f"expected shape (slices, height, width) and three spacings in millimeters, got {shape} and {spacing}."
            )
        predicted_labels = pixel_metrics.as_labels(prediction, "map").cpu().numpy()
        labels = pixel_metrics.as_labels(reference, "map").cpu().numpy()
        if self.ignore_index is not None:
            is_ignored = labels == self.ignore_index
            predicted_labels = np.where(is_ignored, self.background, predicted_labels)
            labels = np.where(is_ignored, self.background, labels)
        if len(shape) == 2:
            shape = (1, *shape)
        return Packed(
            shape=shape,
            prediction=compressed(predicted_labels),
            reference=compressed(labels),
            spacing=tuple(float(distance) for distance in spacing),
        )

    def _join(self, parts: list[dict[Hashable, dict[int, Packed]]]) -> np.ndarray:
        """Return the scores of each case, see `_measure`, of shape `(cases, 3, num_labels)`."""
        cases: dict[Hashable, dict[int, Packed]] = {}
        for process_cases in parts:
            for case, slices in process_cases.items():
                cases.setdefault(case, {}).update(slices)
        case_ids = list(cases)

        # Every process has all cases, in the same order, and measures a share of them.
        own_scores = {}
        for index in range(self.process_id, len(case_ids), self.num_process):
            case = case_ids[index]
            own_scores[index] = self._measure(case, cases[case])
        scores_by_index = {}
        for process_scores in base.gather_parts(own_scores, self.num_process, self.name):
            scores_by_index.update(process_scores)
        return np.stack([scores_by_index[index] for index in range(len(case_ids))])

    def _compute(self, cases: np.ndarray) -> dict[str, Any]:
        surface_dice, hausdorff, missed = cases.swapaxes(0, 1)
        class_surface_dice = pixel_metrics.mean_of_counted(surface_dice, axis=0)
        class_hausdorff = pixel_metrics.mean_of_counted(hausdorff, axis=0)
        class_missed = missed.sum(axis=0).astype(int)
        return {
            "mean_surface_dice": float(pixel_metrics.mean_of_counted(class_surface_dice)),
            "mean_hausdorff_95": float(pixel_metrics.mean_of_counted(class_hausdorff)),
            "per_category_surface_dice": class_surface_dice.tolist(),
            "per_category_hausdorff_95": class_hausdorff.tolist(),
            "per_category_missed_cases": class_missed.tolist(),
        }

    def _measure(self, case: Hashable, slices: dict[int, Packed]) -> np.ndarray:
        """Return surface Dice, Hausdorff distance and whether the case is missed, of shape `(3, num_labels)`."""
        missing_places = set(range(len(slices))) - set(slices)
        if missing_places:
            raise ValueError(
                f"{self.name}: slice {min(missing_places)} of case {case!r} is missing. Surface distances need whole "
                "volumes."
            )
        ordered_slices = [slices[place] for place in range(len(slices))]
        first_slice = ordered_slices[0]
        predictions = []
        references = []
        for packed in ordered_slices:
            if packed.shape[1:] != first_slice.shape[1:] or packed.spacing != first_slice.spacing:
                raise ValueError(f"{self.name}: the slices of case {case!r} differ in size or spacing.")
            predictions.append(decompressed(packed.prediction, packed.shape))
            references.append(decompressed(packed.reference, packed.shape))
        prediction = np.concatenate(predictions)
        reference = np.concatenate(references)

        scores = np.full((3, self.num_labels), np.nan)
        scores[2] = 0
        for label in range(self.num_labels):
            if label != self.background:
                scores[:, label] = surface_scores(
                    prediction == label,
                    reference == label,
                    first_slice.spacing,
                    self.tolerance,
                )
        return scores


def compressed(labels: np.ndarray) -> bytes:
    """Return class indices as compressed bytes, one for each voxel."""
    return zlib.compress(labels.astype(np.uint8).tobytes(), level=1)


def decompressed(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return the class indices of [`compressed`], uint8 of a shape."""
    labels = np.frombuffer(zlib.decompress(content), np.uint8)
    return labels.reshape(shape)


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
    is_predicted = prediction.any()
    is_labeled = reference.any()
    if not is_predicted and not is_labeled:
        return np.nan, np.nan, 0
    if not is_predicted or not is_labeled:
        diagonal = np.linalg.norm(np.array(prediction.shape) * spacing)
        return 0.0, float(diagonal), 1
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ModuleNotFoundError as error:
        raise ImportError("Surface distances need MONAI: pip install 'modeling-vitp[medical]'.") from error

    if len(prediction) == 1:
        prediction = prediction[0]
        reference = reference[0]
        spacing = spacing[1:]
    prediction_mask = as_batch(prediction)
    reference_mask = as_batch(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns about its own code.
        surface_dice = compute_surface_dice(
            prediction_mask,
            reference_mask,
            class_thresholds=[tolerance],
            include_background=True,
            spacing=list(spacing),
        )
        hausdorff = compute_hausdorff_distance(
            prediction_mask,
            reference_mask,
            percentile=PERCENTILE,
            include_background=True,
            spacing=list(spacing),
        )
    return surface_dice.item(), hausdorff.item(), 0


def as_batch(mask: np.ndarray) -> torch.Tensor:
    """Return a mask as a batch of one image with one channel."""
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]
