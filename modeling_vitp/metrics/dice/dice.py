"""Dice coefficient of medical segmentation, over the data set and per case."""

import numpy as np

from modeling_vitp.metrics import pixel_metrics


class Dice(pixel_metrics.PixelMetric):
    """Dice coefficient, 2 |A and B| / (|A| + |B|), over the data set and per case, with and without background.

    Over the data set, pixels are summed over all cases before dividing. Per case, each case (volume of a patient, or
    image) has a coefficient for each class. The coefficients are averaged over the cases, and then over the classes. If
    a class is in neither the prediction nor the reference of a case, its coefficient is NaN and is left out of the
    means.

    `evaluate.load(str(METRICS_FOLDER / "dice"), num_labels=14)` loads the metric.

    Args:
        background: class index that is left out of the foreground scores.

    The other arguments are those of `PixelMetric`.

    Returns:
        `mean_dice`, `mean_dice_foreground`, `mean_dice_by_case`, `mean_dice_by_case_foreground`, and the lists per
        class `per_category_dice` and `per_category_dice_by_case`.
    """

    main_score = "mean_dice"
    surface_metric = "surface_distance"

    def __init__(
        self,
        *args,
        background: int = 0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.background = background

    def _compute(self, cases: np.ndarray) -> dict:
        dice = dice_of_areas(cases.sum(axis=0))
        dice_of_cases = dice_of_areas(cases.swapaxes(0, 1))
        dice_by_case = pixel_metrics.mean_of_counted(dice_of_cases, axis=0)
        is_foreground = np.arange(self.num_labels) != self.background
        return {
            "mean_dice": mean_dice(dice),
            "mean_dice_foreground": mean_dice(dice[is_foreground]),
            "mean_dice_by_case": mean_dice(dice_by_case),
            "mean_dice_by_case_foreground": mean_dice(dice_by_case[is_foreground]),
            "per_category_dice": dice.tolist(),
            "per_category_dice_by_case": dice_by_case.tolist(),
        }


def dice_of_areas(areas: np.ndarray) -> np.ndarray:
    """Return Dice coefficients from the areas of intersection, prediction and reference, the first axis."""
    both, predicted, labeled = areas
    return pixel_metrics.ratio(2 * both, predicted + labeled)


def mean_dice(coefficients: np.ndarray) -> float:
    """Return the mean of the coefficients that are not NaN."""
    return float(pixel_metrics.mean_of_counted(coefficients))
