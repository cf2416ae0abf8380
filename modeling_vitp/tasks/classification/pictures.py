"""Figures of predictions: images with their true and predicted classes, in green if correct and in red if wrong."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ...images.pixels import shown

THRESHOLD = 0.5  # Probability above which a class counts as predicted in multi-label classification.
MOST_SHOWN = 3
COLUMNS = 4
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_predictions(
    samples: Sequence[Mapping],
    scores: torch.Tensor,
    names: Sequence[str],
    path: Path,
    components: Sequence[np.ndarray] = (),
    band_names: Sequence[str] | None = None,
) -> None:
    """Draw a grid of images with their true and predicted classes, and save it as a PNG.

    Args:
        samples: items of [`~modeling_vitp.tasks.classification.data.ClassifiedImages`].
        scores: class probabilities of shape `(samples, classes)`.
        names: names of the classes.
        path: path of the PNG file.
        components: principal components of the backbone features as RGB images, to show below the images.
        band_names: names of the image bands, see [`~modeling_vitp.images.pixels.shown`].
    """
    columns = min(len(samples), COLUMNS)
    rows_per_sample = 2 if components else 1
    rows = math.ceil(len(samples) / columns) * rows_per_sample
    figure = Figure(figsize=(2.8 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (sample, probabilities) in enumerate(zip(samples, scores)):
        row = rows_per_sample * (index // columns)
        column = index % columns
        label = sample["label"]
        if label.ndim == 1:  # Multi-label: 1 for the classes of the image, -100 for unknown ones.
            is_class = label == 1
            is_predicted = probabilities > THRESHOLD
            is_known = label >= 0
            is_correct = torch.equal(is_class[is_known], is_predicted[is_known])
            true_classes = is_class.nonzero().flatten().tolist()
            predicted_classes = is_predicted.nonzero().flatten().tolist()
        else:
            true_classes = [label.item()]
            predicted_classes = [probabilities.argmax().item()]
            is_correct = true_classes == predicted_classes
        axis = axes[row, column]
        axis.imshow(shown(sample["image"], band_names), interpolation="nearest")
        truth = join_first([names[class_index] for class_index in true_classes])
        predictions = join_first([f"{names[i]} {probabilities[i]:.2f}" for i in predicted_classes])
        title = f"{sample['id']}\ntrue: {truth}\npredicted: {predictions}"
        axis.set_title(title, fontsize=8, color=RIGHT if is_correct else WRONG)
        if components:
            axes[row + 1, column].imshow(components[index], interpolation="nearest")
            axes[row + 1, column].set_title("backbone", fontsize=8)
    figure.savefig(path, dpi=120)


def join_first(texts: Sequence[str]) -> str:
    """Return the first texts, and the number of the others."""
    if not texts:
        return "–"
    joined = ", ".join(texts[:MOST_SHOWN])
    number_left = len(texts) - MOST_SHOWN
    return f"{joined} and {number_left} more" if number_left > 0 else joined
