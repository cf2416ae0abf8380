"""Pictures of predictions: images with their class and what is predicted, right in green and wrong in red."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ..images.pixels import shown

THRESHOLD = 0.5  # of a class among several labels
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
    """A grid of images.

    Args:
        samples: items of [`~modeling_vitp.classification.data.ClassifiedImages`].
        scores: probabilities of the classes, of shape `(samples, classes)`.
        names: of the classes.
        path: of the PNG.
        components: of the backbone's features, as colors, if they are to be shown below the images.
        band_names: of the images, see [`~modeling_vitp.images.pixels.shown`].
    """
    columns = min(len(samples), COLUMNS)
    parts = 2 if components else 1
    rows = -(-len(samples) // columns) * parts
    figure = Figure(figsize=(2.8 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (sample, of_sample) in enumerate(zip(samples, scores)):
        row, column = parts * (index // columns), index % columns
        there, found = true_classes(sample["label"]), predicted_classes(of_sample, sample["label"].ndim == 1)
        axis = axes[row, column]
        axis.imshow(shown(sample["image"], band_names), interpolation="nearest")
        guesses = [f"{names[place]} {of_sample[place]:.2f}" for place in found]
        title = f"{sample['id']}\nis: {listed([names[place] for place in there])}\nfound: {listed(guesses)}"
        axis.set_title(title, fontsize=8, color=RIGHT if found == there else WRONG)
        if components:
            axes[row + 1, column].imshow(components[index], interpolation="nearest")
            axes[row + 1, column].set_title("backbone", fontsize=8)
    figure.savefig(path, dpi=120)


def true_classes(label: torch.Tensor) -> list[int]:
    return label.nonzero().flatten().tolist() if label.ndim == 1 else [label.item()]


def predicted_classes(scores: torch.Tensor, multi_label: bool) -> list[int]:
    return (scores > THRESHOLD).nonzero().flatten().tolist() if multi_label else [scores.argmax().item()]


def listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MOST_SHOWN]) + (f" and {len(texts) - MOST_SHOWN} more" * (len(texts) > MOST_SHOWN)) or "–"
