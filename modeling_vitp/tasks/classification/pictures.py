"""Figures of predictions: images with their true and predicted classes, in green if correct and in red if wrong."""

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
    parts = 2 if components else 1
    rows = -(-len(samples) // columns) * parts
    figure = Figure(figsize=(2.8 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (sample, probabilities) in enumerate(zip(samples, scores)):
        row, column = parts * (index // columns), index % columns
        label = sample["label"]
        if label.ndim == 1:  # Multi-label: 1 for the classes of the image, -100 for unknown ones.
            masks = label == 1, probabilities > THRESHOLD
            truth, predicted = (mask.nonzero().flatten().tolist() for mask in masks)
            is_correct = torch.equal(*(mask[label >= 0] for mask in masks))
        else:
            truth, predicted = [label.item()], [probabilities.argmax().item()]
            is_correct = truth == predicted
        axis = axes[row, column]
        axis.imshow(shown(sample["image"], band_names), interpolation="nearest")
        predictions = [f"{names[index]} {probabilities[index]:.2f}" for index in predicted]
        title = f"{sample['id']}\ntrue: {listed([names[index] for index in truth])}\npredicted: {listed(predictions)}"
        axis.set_title(title, fontsize=8, color=RIGHT if is_correct else WRONG)
        if components:
            axes[row + 1, column].imshow(components[index], interpolation="nearest")
            axes[row + 1, column].set_title("backbone", fontsize=8)
    figure.savefig(path, dpi=120)


def listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MOST_SHOWN]) + (f" and {len(texts) - MOST_SHOWN} more" * (len(texts) > MOST_SHOWN)) or "–"
