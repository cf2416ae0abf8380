"""F1, precision, recall and intersection over union of the change class."""

from modeling_vitp.metrics import pixel_metrics


class ChangeDetection(pixel_metrics.PixelMetric):
    """F1, precision, recall and IoU of the change class, over all pixels of the data set.

    With TP, FP and FN summed over the data set, as LEVIR-CD, WHU-CD, SVCD and S2Looking are scored: precision =
    TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN). What would divide
    by 0 is NaN: precision if no change is predicted, recall if there is none, F1 and IoU if both.

    `evaluate.load(str(METRICS_FOLDER / "change_detection"))`. Masks are class ids: 255 for change, as most data sets
    store it, has to become 1 first.

    Args:
        change_label: the class of change.
        num_labels: number of classes, 2 by default.

    The other arguments are those of `PixelMetric`.

    Returns:
        `f1`, `precision`, `recall`, `iou`.
    """

    main_score = "f1"

    def __init__(self, *args, num_labels: int = 2, change_label: int = 1, **kwargs):
        super().__init__(*args, num_labels=num_labels, **kwargs)
        self.change_label = change_label

    def set_names(self, names):
        """Score the class named `change` or `changed`, or else the second of two.

        Raises:
            ValueError: if there are more than two classes, and none has such a name.
        """
        found = [label for label, name in enumerate(names) if name.casefold() in ("change", "changed")]
        if not found and len(names) != 2:
            raise ValueError(
                f"metric: change_detection scores one class against all others. Expected a class named 'change', got "
                f"{list(names)}. Rename the class, or set metric: mean_iou."
            )
        self.change_label = found[0] if found else 1

    def _compute(self, cases):
        both, predicted, labelled = cases.sum(axis=0)[:, self.change_label]
        return {
            "f1": float(pixel_metrics.ratio(2 * both, predicted + labelled)),
            "precision": float(pixel_metrics.ratio(both, predicted)),
            "recall": float(pixel_metrics.ratio(both, labelled)),
            "iou": float(pixel_metrics.ratio(both, predicted + labelled - both)),
        }
