"""Mean intersection over union and accuracy of semantic segmentation."""

from modeling_vitp.metrics import pixel_metrics


class MeanIou(pixel_metrics.PixelMetric):
    """Mean intersection over union, and accuracy, over all pixels of the data set.

    For each class, IoU = intersection / union and accuracy = intersection / reference, with areas summed over the data
    set before dividing, as iSAID, LoveDA and UAVid (and Pascal VOC) do. A class with an empty union is not counted in
    `mean_iou`, one that no reference has is not counted in `mean_accuracy`; their own values are NaN.

    `evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=7, ignore_index=255)`; see `PixelMetric` for the
    arguments.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy` (share of pixels that are right), and lists by class,
        `per_category_iou` and `per_category_accuracy`.
    """

    main_score = "mean_iou"

    def _compute(self, cases):
        both, predicted, labelled = cases.sum(axis=0)
        iou = pixel_metrics.ratio(both, predicted + labelled - both)
        accuracy = pixel_metrics.ratio(both, labelled)
        return {
            "mean_iou": float(pixel_metrics.mean_of_counted(iou)),
            "mean_accuracy": float(pixel_metrics.mean_of_counted(accuracy)),
            "overall_accuracy": float(pixel_metrics.ratio(both.sum(), labelled.sum())),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }
