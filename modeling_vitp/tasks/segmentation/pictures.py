"""Figures of segmentation predictions: image or pair, mask, prediction and errors, with a legend of the classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...data.classes import LabelEncoding
from ...image_processing_vitp_dense import IGNORE_INDEX
from ...images.pixels import shown

UNLABELED = (127, 127, 127)
WRONG = {
    "red": (220, 30, 30),
    "black": (0, 0, 0),
    "magenta": (255, 0, 255),
    "blue": (0, 60, 255),
}


def draw_predictions(
    samples: Sequence[dict],
    predictions: Sequence[np.ndarray],
    encoding: LabelEncoding,
    path: Path,
    components: Sequence[np.ndarray] = (),
    band_names: Sequence[str] | None = None,
) -> None:
    """Draw one row of images per sample, and save the figure as a PNG.

    Args:
        samples: items of [`~modeling_vitp.tasks.segmentation.data.MaskedImages`].
        predictions: class indices of shape `(height, width)`.
        encoding: names and colors of the classes.
        path: path of the PNG file.
        components: principal components of the backbone features as RGB images, to show in a last column.
        band_names: names of the image bands, see [`~modeling_vitp.images.pixels.shown`].
    """
    error_color = color_of_errors(encoding)
    titles = titles_of_panels(samples[0], error_color)
    if components:
        titles.append("backbone")
    figure = Figure(figsize=(2.6 * len(titles), 2.8 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), len(titles), squeeze=False)
    for index, (sample, prediction) in enumerate(zip(samples, predictions)):
        panels = [shown(image, band_names) for image in sample["images"]]
        panels += panels_of_masks(
            sample,
            prediction,
            encoding,
            error_color,
        )
        if components:
            panels.append(components[index])
        for axis, panel, title in zip(axes[index], panels, titles):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
        axes[index, 0].set_title(sample["id"], fontsize=8)
    legend = legend_entries(encoding)
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=min(len(legend), 6),
        fontsize=8,
    )
    figure.savefig(path, dpi=120)


def color_of_errors(encoding: LabelEncoding) -> str:
    """Return the name of the color that differs most from those of all classes."""

    def distance_to_classes(name: str) -> int:
        differences = np.abs(encoding.palette.astype(int) - WRONG[name])
        return differences.sum(-1).min()

    return max(WRONG, key=distance_to_classes)


def titles_of_panels(sample: dict, error_color: str) -> list[str]:
    titles = ["image"] if len(sample["images"]) == 1 else ["before", "after"]
    if "mask" in sample:
        titles.append("mask")
    titles.append("prediction")
    if "mask" in sample:
        titles.append(f"wrong ({error_color})")
    return titles


def panels_of_masks(
    sample: dict,
    prediction: np.ndarray,
    encoding: LabelEncoding,
    error_color: str,
) -> list[np.ndarray]:
    """Return the mask, the prediction and the errors as RGB images, or the prediction alone."""
    colors = np.full((IGNORE_INDEX + 1, 3), UNLABELED, dtype=np.uint8)
    colors[: len(encoding.classes)] = encoding.palette
    if "mask" not in sample:
        return [colors[prediction]]
    errors = mistakes(sample["mask"], prediction, WRONG[error_color])
    return [colors[sample["mask"].numpy()], colors[prediction], errors]


def legend_entries(encoding: LabelEncoding) -> list[Patch]:
    entries = []
    for item in encoding.classes:
        entries.append(legend_entry(item.name, item.color))
    entries.append(legend_entry("no class", UNLABELED))
    return entries


def legend_entry(name: str, color: tuple[int, int, int]) -> Patch:
    return Patch(facecolor=np.array(color) / 255, edgecolor="black", label=name)


def mistakes(
    mask: torch.Tensor,
    prediction: np.ndarray,
    color: tuple[int, int, int],
) -> np.ndarray:
    """Return an RGB image of the errors: white for correct pixels, `color` for wrong, gray for unlabeled pixels."""
    mask = mask.numpy()
    panel = np.full((*mask.shape, 3), 255, dtype=np.uint8)
    panel[mask != prediction] = color
    panel[mask == IGNORE_INDEX] = UNLABELED
    return panel
