"""Accuracy, F1 and area under the curve of the classes of images, with one label an image or several."""

from collections.abc import Sequence

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value

from modeling_vitp.metrics import base, pixel_metrics, ranking


class Classification(base.DistributedMetric):
    """Scores of classes over a data set, as scikit-learn defines them.

    With one label an image, the class with the highest score is predicted; with several, each class whose score is
    above `threshold`. F1 of a class is 2 TP / (2 TP + FP + FN), its area that under the ROC curve of its scores against
    those of all other images. `macro_f1` and `auroc` are means over classes without those of which they cannot be told,
    which are NaN: F1 of a class that is neither in the references nor predicted, an area without a positive or without
    a negative.

    `evaluate.load(str(METRICS_FOLDER / "classification"), num_labels=10)`.

    Args:
        num_labels: number of classes.
        multi_label: whether an image may have any number of classes.
        threshold: for several labels.
        num_process, process_id: see `DistributedMetric`.

    The other arguments are those of `evaluate.load`.

    Returns:
        `accuracy` (share of images that are right in all their labels), `macro_f1`, `auroc`, and lists by class,
        `per_category_f1` and `per_category_auroc`. With several labels also `label_accuracy` (share of all labels of
        all images that are right) and `mean_average_precision`, the mean over the classes that occur.
    """

    def __init__(self, *args, num_labels: int, multi_label: bool = False, threshold: float = 0.5, **kwargs):
        self.num_labels, self.multi_label, self.threshold = num_labels, multi_label, threshold
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        references = List(Value("int64")) if self.multi_label else Value("int64")
        features = Features({"predictions": List(Value("float64")), "references": references})
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=features)

    def __len__(self) -> int:
        return sum(len(references) for _, references in self.kept)

    def add(self, *, prediction, reference):
        """The scores and the label or labels of one image; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence, references: Sequence):
        """Adds images.

        Args:
            predictions: scores of the classes, `(n, num_labels)`, as array, tensor or list; probabilities, where
                there are several labels.
            references: classes, integers `(n,)`; for several labels 1 for each class that an image has and else 0,
                `(n, num_labels)`.

        Raises:
            ValueError: if these are of other shapes, a score is NaN, or a label is no class.
        """
        scores, labels = (as_array(values) for values in (predictions, references))
        shape = (len(labels), self.num_labels)
        if scores.shape != shape or labels.shape != (shape if self.multi_label else shape[:1]):
            raise ValueError(
                f"{self.name}: scores are of shape {scores.shape} and labels of shape {labels.shape} for "
                f"{self.num_labels} classes{' with several labels' if self.multi_label else ''}."
            )
        if np.isnan(scores).any():
            raise ValueError(f"{self.name}: image {np.argwhere(np.isnan(scores))[0, 0]} of the batch has NaN as score.")
        last = 1 if self.multi_label else self.num_labels - 1
        wrong = np.unique(labels[(labels < 0) | (labels > last) | (labels != np.rint(labels))]).tolist()
        if wrong:
            raise ValueError(f"{self.name}: labels are 0 to {last}, and not {wrong[:10]}.")
        self.kept.append((scores.astype(np.float64), labels.astype(np.int64)))

    def _compute_parts(self, parts: list[list[tuple[np.ndarray, np.ndarray]]]) -> dict:
        scores, labels = (np.concatenate(values) for values in zip(*(batch for part in parts for batch in part)))
        if self.multi_label:
            truth, predicted = labels.astype(bool), scores > self.threshold
        else:
            classes = np.arange(self.num_labels)
            truth, predicted = labels[:, None] == classes, scores.argmax(1)[:, None] == classes
        f1 = pixel_metrics.ratio(2 * (truth & predicted).sum(0), truth.sum(0) + predicted.sum(0))
        areas = np.array([ranking.area_under_curve(one, is_there) for one, is_there in zip(scores.T, truth.T)])
        result = {
            "accuracy": float((truth == predicted).all(1).mean()),
            "macro_f1": float(pixel_metrics.mean_of_counted(f1)),
            "auroc": float(pixel_metrics.mean_of_counted(areas)),
            "per_category_f1": f1.tolist(),
            "per_category_auroc": areas.tolist(),
        }
        if self.multi_label:
            occurring = [place for place in range(self.num_labels) if truth[:, place].any()]
            precisions = [ranking.average_precision(scores[:, place], truth[:, place]) for place in occurring]
            result["label_accuracy"] = float((truth == predicted).mean())
            result["mean_average_precision"] = float(np.mean(precisions)) if precisions else float("nan")
        return result


def as_array(values: Sequence) -> np.ndarray:
    return values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
