"""Mean intersection over union and accuracy of semantic segmentation."""

import numpy as np

from modeling_vitp.metrics import pixel_metrics


class MeanIou(pixel_metrics.PixelMetric):
    """Mean intersection over union and accuracy over all pixels of the data set.

    For each class, IoU = intersection / union and accuracy = intersection / reference. The pixels are summed over the
    data set before dividing, as in iSAID, LoveDA, UAVid and Pascal VOC. A class with an empty union has the IoU NaN and
    is not part of `mean_iou`. A class without reference pixels has the accuracy NaN and is not part of `mean_accuracy`.

    `evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=7, ignore_index=255)` loads the metric. The arguments
    are those of `PixelMetric`.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy` (share of correct pixels), and the lists per class
        `per_category_iou` and `per_category_accuracy`.
    """

    main_score = "mean_iou"

    def _compute(self, cases: np.ndarray) -> dict:
        both, predicted, labeled = cases.sum(axis=0)
        union = predicted + labeled - both
        iou = pixel_metrics.ratio(both, union)
        accuracy = pixel_metrics.ratio(both, labeled)
        mean_iou = pixel_metrics.mean_of_counted(iou)
        mean_accuracy = pixel_metrics.mean_of_counted(accuracy)
        overall_accuracy = pixel_metrics.ratio(both.sum(), labeled.sum())
        return {
            "mean_iou": float(mean_iou),
            "mean_accuracy": float(mean_accuracy),
            "overall_accuracy": float(overall_accuracy),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }
