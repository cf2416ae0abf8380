"""F1, precision, recall and intersection over union of the change class."""

import numpy as np

from modeling_vitp.metrics import pixel_metrics


class ChangeDetection(pixel_metrics.PixelMetric):
    """F1, precision, recall and IoU of the change class, over all pixels of the data set.

    TP, FP and FN are summed over the data set, as in LEVIR-CD, WHU-CD, SVCD and S2Looking: precision = TP / (TP + FP),
    recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN). A score with a denominator of 0 is
    NaN.

    `evaluate.load(str(METRICS_FOLDER / "change_detection"))` loads the metric. Masks must hold class indices. Many data
    sets store change as 255, which must be converted to 1.

    Args:
        change_label: index of the change class.
        num_labels: number of classes.

    The other arguments are those of `PixelMetric`.

    Returns:
        `f1`, `precision`, `recall`, `iou`.
    """

    main_score = "f1"

    def __init__(
        self,
        *args,
        num_labels: int = 2,
        change_label: int = 1,
        **kwargs,
    ):
        super().__init__(
            *args,
            num_labels=num_labels,
            **kwargs,
        )
        self.change_label = change_label

    def set_names(self, names):
        """Score the class named `change` or `changed`, or else the second of two classes.

        Raises:
            ValueError: if there are more than two classes, and no class has such a name.
        """
        for label, name in enumerate(names):
            if name.casefold() in ("change", "changed"):
                self.change_label = label
                return
        if len(names) != 2:
            raise ValueError(
                f"metric: change_detection scores one class against all others. Expected a class named 'change', got "
                f"{list(names)}. Rename the class, or set metric: mean_iou."
            )
        self.change_label = 1

    def _compute(self, cases: np.ndarray) -> dict:
        both, predicted, labeled = cases.sum(axis=0)[:, self.change_label]
        union = predicted + labeled - both
        f1 = pixel_metrics.ratio(2 * both, predicted + labeled)
        precision = pixel_metrics.ratio(both, predicted)
        recall = pixel_metrics.ratio(both, labeled)
        iou = pixel_metrics.ratio(both, union)
        return {
            "f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "iou": float(iou),
        }
