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
WRONG = {"red": (220, 30, 30), "black": (0, 0, 0), "magenta": (255, 0, 255), "blue": (0, 60, 255)}


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
    colors = np.full((IGNORE_INDEX + 1, 3), UNLABELED, dtype=np.uint8)
    colors[: len(encoding.classes)] = encoding.palette
    # Wrong pixels have the color that differs most from those of all classes.
    wrong = max(WRONG, key=lambda name: np.abs(encoding.palette.astype(int) - WRONG[name]).sum(-1).min())
    titles = ["image"] if len(samples[0]["images"]) == 1 else ["before", "after"]
    titles += ["mask", "prediction", f"wrong ({wrong})"] if "mask" in samples[0] else ["prediction"]
    titles += ["backbone"] if components else []
    figure = Figure(figsize=(2.6 * len(titles), 2.8 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), len(titles), squeeze=False)
    for row, sample, prediction, colored in zip(axes, samples, predictions, components or [None] * len(samples)):
        panels = [shown(image, band_names) for image in sample["images"]]
        if "mask" in sample:
            errors = mistakes(sample["mask"], prediction, WRONG[wrong])
            panels += [colors[sample["mask"].numpy()], colors[prediction], errors]
        else:
            panels.append(colors[prediction])
        panels += [] if colored is None else [colored]
        for axis, panel, title in zip(row, panels, titles):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
        row[0].set_title(sample["id"], fontsize=8)
    legend = [(item.name, item.color) for item in encoding.classes] + [("no class", UNLABELED)]
    handles = [Patch(facecolor=np.array(color) / 255, edgecolor="black", label=name) for name, color in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
    figure.savefig(path, dpi=120)


def mistakes(mask: torch.Tensor, prediction: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return an RGB image of the errors: white for correct pixels, `color` for wrong, gray for unlabeled pixels."""
    mask = mask.numpy()
    panel = np.full((*mask.shape, 3), 255, dtype=np.uint8)
    panel[mask != prediction] = color
    panel[mask == IGNORE_INDEX] = UNLABELED
    return panel
