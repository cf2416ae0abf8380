"""Dice coefficient of medical segmentation, over the data set and by case."""

from modeling_vitp.metrics import pixel_metrics


class Dice(pixel_metrics.PixelMetric):
    """Dice coefficient, 2 |A and B| / (|A| + |B|), over the data set and by case, with and without background.

    Over the data set, areas are summed over all pixels before dividing. By case, each case (a patient's volume, or an
    image) has a coefficient for each class; those of a class are averaged over the cases, and then the classes. What is
    in neither prediction nor reference is not counted: a class of a case in the class's mean, a class that no case has
    in the mean over classes; it is NaN.

    `evaluate.load(str(METRICS_FOLDER / "dice"), num_labels=14)`.

    Args:
        background: the class that is left out of what is called foreground.

    The other arguments are those of `PixelMetric`.

    Returns:
        `mean_dice`, `mean_dice_foreground`, `mean_dice_by_case`, `mean_dice_by_case_foreground`, and lists by class,
        `per_category_dice` and `per_category_dice_by_case`.
    """

    main_score = "mean_dice"
    surface_metric = "surface_distance"

    main_score = "mean_dice"
    surface_metric = "surface_distance"
    is_by_case = True

    def __init__(self, *args, background: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.background = background

    def _compute(self, cases):
        both, predicted, labelled = cases.sum(axis=0)
        dice = pixel_metrics.ratio(2 * both, predicted + labelled)
        both, predicted, labelled = cases.swapaxes(0, 1)
        by_case = pixel_metrics.mean_of_counted(pixel_metrics.ratio(2 * both, predicted + labelled), axis=0)
        foreground = [label for label in range(self.num_labels) if label != self.background]
        return {
            "mean_dice": float(pixel_metrics.mean_of_counted(dice)),
            "mean_dice_foreground": float(pixel_metrics.mean_of_counted(dice[foreground])),
            "mean_dice_by_case": float(pixel_metrics.mean_of_counted(by_case)),
            "mean_dice_by_case_foreground": float(pixel_metrics.mean_of_counted(by_case[foreground])),
            "per_category_dice": dice.tolist(),
            "per_category_dice_by_case": by_case.tolist(),
        }
