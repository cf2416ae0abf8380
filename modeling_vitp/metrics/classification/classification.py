"""Accuracy, F1 and area under the ROC curve of image classification, single-label or multi-label."""

from collections.abc import Hashable, Sequence

import evaluate
import numpy as np
from datasets import Features, List, Value

from modeling_vitp.metrics import base, pixel_metrics, ranking

UNKNOWN = -100


class Classification(base.DistributedMetric):
    """Classification scores over a data set, as defined by scikit-learn.

    The predicted class is the one with the highest score; in multi-label classification all classes with a score above
    `threshold`. F1 of a class is 2 TP / (2 TP + FP + FN). The area under the ROC curve compares the scores of images
    with the class and without it. F1 is NaN for a class that is neither predicted nor in the references. The area is
    NaN for a class without positives or without negatives. `macro_f1` and `auroc` are means over the other classes.

    `evaluate.load(str(METRICS_FOLDER / "classification"), num_labels=10)` loads the metric.

    Args:
        num_labels: number of classes.
        multi_label: whether an image may have any number of classes.
        threshold: score above which a class is predicted in multi-label classification.
        num_process, process_id: see `DistributedMetric`.

    The other arguments are those of `evaluate.load`.

    Returns:
        `accuracy` (share of images with all labels correct), `macro_f1`, `auroc`, and the lists per class
        `per_category_f1` and `per_category_auroc`. With `multi_label` also `label_accuracy` (share of correct labels
        over all images and classes) and `mean_average_precision`, the mean over the classes that occur. Unknown labels
        are left out of all scores.
    """

    def __init__(
        self,
        *args,
        num_labels: int,
        multi_label: bool = False,
        threshold: float = 0.5,
        **kwargs,
    ):
        self.num_labels = num_labels
        self.multi_label = multi_label
        self.threshold = threshold
        self.main_score = "mean_average_precision" if multi_label else "accuracy"
        self.kept: list[tuple[np.ndarray, np.ndarray, Sequence[Hashable]]] = []
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label_features = Value("int64")
        if self.multi_label:
            label_features = List(label_features)
        features = Features(
            predictions=List(Value("float64")),
            references=label_features,
        )
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=features,
        )

    def __len__(self) -> int:
        return sum(len(labels) for _, labels, _ in self.kept)

    def add_batch(
        self,
        *,
        predictions: Sequence,
        references: Sequence,
        case_ids: Sequence[Hashable] | None = None,
    ):
        """Add a batch of images.

        Args:
            predictions: class scores, `(n, num_labels)`, as array, tensor or list. With `multi_label`, probabilities.
            references: class indices, integers `(n,)`. With `multi_label`, 1 for the classes of an image, -100 for
                unknown ones and 0 for the others, `(n, num_labels)`.
            case_ids: case of each image, such as its scene or patient; all numbers or all strings. Only resamples use
                them. Default: each image is a case.

        Raises:
            ValueError: if a shape or length is wrong, a score is NaN, or a label is not a class index.
        """
        scores = base.as_array(predictions)
        labels = base.as_array(references)
        with base.prefixed_errors(self.name):
            self._check(scores, labels)
        if case_ids is None:
            first_index = len(self)
            case_ids = [(self.process_id, first_index + index) for index in range(len(labels))]
        base.check_lengths(
            self.name,
            references=labels,
            case_ids=case_ids,
        )
        batch = (
            scores.astype(np.float64),
            labels.astype(np.int64),
            case_ids,
        )
        self.kept.append(batch)

    def _check(self, scores: np.ndarray, labels: np.ndarray) -> None:
        scores_shape = (len(labels), self.num_labels)
        labels_shape = scores_shape if self.multi_label else (len(labels),)
        if scores.shape != scores_shape or labels.shape != labels_shape:
            raise ValueError(
                f"expected scores of shape {scores_shape} and labels of shape {labels_shape}, got {scores.shape} and "
                f"{labels.shape}."
            )
        images_with_nan = np.flatnonzero(np.isnan(scores).any(axis=1))
        if len(images_with_nan) > 0:
            raise ValueError(f"image {images_with_nan[0]} of the batch has a NaN score.")
        highest_label = 1 if self.multi_label else self.num_labels - 1
        is_integer = labels == np.rint(labels)
        is_label = is_integer & (labels >= 0) & (labels <= highest_label)
        if self.multi_label:
            is_label |= labels == UNKNOWN
        wrong_labels = np.unique(labels[~is_label])
        if len(wrong_labels) > 0:
            raise ValueError(f"expected integer labels in [0, {highest_label}], got {wrong_labels[:10].tolist()}.")

    def _join(
        self,
        parts: list[list[tuple[np.ndarray, np.ndarray, Sequence[Hashable]]]],
    ) -> list[list[int]]:
        """Return the indices of the images of each case.

        Set `images` to the scores of each image followed by its label or labels, float64.
        """
        images = []
        all_case_ids = []
        for process_batches in parts:
            for scores, labels, case_ids in process_batches:
                image_rows = np.column_stack([scores, labels])
                images.append(image_rows)
                all_case_ids.extend(case_ids)
        self.images = np.concatenate(images)
        return base.group_by_case(all_case_ids)

    def _take(self, indices: np.ndarray) -> np.ndarray:
        image_indices = []
        for index in indices:
            image_indices.extend(self.cases[index])
        return self.images[image_indices]

    def _classes(self, cases: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return true, predicted and known classes, bool of shape `(images, num_labels)`. Only known ones are true."""
        scores, labels = np.split(cases, [self.num_labels], axis=1)
        if self.multi_label:
            is_known = labels != UNKNOWN
            predicted = (scores > self.threshold) & is_known
            truth = labels == 1
            return truth, predicted, is_known
        classes = np.arange(self.num_labels)
        best_classes = scores.argmax(axis=1, keepdims=True)
        predicted = best_classes == classes
        truth = labels == classes
        is_known = np.ones(scores.shape, dtype=bool)
        return truth, predicted, is_known

    def _score(self, cases: np.ndarray, key: str) -> float:
        if key == "mean_average_precision":
            return self._mean_average_precision(cases)
        if key != "accuracy":
            return super()._score(cases, key)
        truth, predicted, is_known = self._classes(cases)
        is_counted = is_known.any(axis=1)
        is_correct = (truth == predicted).all(axis=1)
        num_correct = np.sum(is_correct & is_counted)
        accuracy = pixel_metrics.ratio(num_correct, is_counted.sum())
        return float(accuracy)

    def _mean_average_precision(self, cases: np.ndarray) -> float:
        truth, _, is_known = self._classes(cases)
        precisions = []
        for label in range(self.num_labels):
            known_images = is_known[:, label]
            is_positive = truth[known_images, label]
            if is_positive.any():
                precisions.append(ranking.average_precision(cases[known_images, label], is_positive))
        return float(pixel_metrics.mean_of_counted(np.array(precisions)))

    def _compute(self, cases: np.ndarray) -> dict:
        truth, predicted, is_known = self._classes(cases)
        true_positives = (truth & predicted).sum(axis=0)
        num_positives = truth.sum(axis=0) + predicted.sum(axis=0)
        f1 = pixel_metrics.ratio(2 * true_positives, num_positives)

        areas = []
        for label in range(self.num_labels):
            known_images = is_known[:, label]
            scores = cases[known_images, label]
            is_positive = truth[known_images, label]
            area = ranking.area_under_curve(scores, is_positive)
            areas.append(area)
        areas = np.array(areas)

        metrics = {
            "accuracy": self._score(cases, "accuracy"),
            "macro_f1": float(pixel_metrics.mean_of_counted(f1)),
            "auroc": float(pixel_metrics.mean_of_counted(areas)),
            "per_category_f1": f1.tolist(),
            "per_category_auroc": areas.tolist(),
        }
        if self.multi_label:
            is_correct = (truth == predicted)[is_known]
            label_accuracy = pixel_metrics.ratio(is_correct.sum(), is_known.sum())
            metrics["label_accuracy"] = float(label_accuracy)
            metrics["mean_average_precision"] = self._mean_average_precision(cases)
        return metrics
