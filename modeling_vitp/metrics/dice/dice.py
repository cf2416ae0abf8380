"""Dice coefficient of medical segmentation, over the data set and per case."""

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

    def __init__(self, *args, background: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.background = background

    def _compute(self, cases):
        both, predicted, labeled = cases.sum(axis=0)
        dice = pixel_metrics.ratio(2 * both, predicted + labeled)
        both, predicted, labeled = cases.swapaxes(0, 1)
        by_case = pixel_metrics.mean_of_counted(pixel_metrics.ratio(2 * both, predicted + labeled), axis=0)
        foreground = [label for label in range(self.num_labels) if label != self.background]
        return {
            "mean_dice": float(pixel_metrics.mean_of_counted(dice)),
            "mean_dice_foreground": float(pixel_metrics.mean_of_counted(dice[foreground])),
            "mean_dice_by_case": float(pixel_metrics.mean_of_counted(by_case)),
            "mean_dice_by_case_foreground": float(pixel_metrics.mean_of_counted(by_case[foreground])),
            "per_category_dice": dice.tolist(),
            "per_category_dice_by_case": by_case.tolist(),
        }
