"""Figures of detections beside the annotated objects: outlines of boxes, and masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from ...image_processing_vitp_detection import mask_of
from ...images.pixels import shown
from .augmentation import corners_of

SHOWN = 0.3  # Smallest score of the detections that are drawn.


def draw_detections(
    samples: Sequence[Mapping],
    detections: Sequence[Mapping],
    names: Sequence[str],
    path: Path,
    components: Sequence[np.ndarray] = (),
    band_names: Sequence[str] | None = None,
) -> None:
    """Draw one row per sample with the annotated objects, if any, and the detections with their scores. Save a PNG.

    Args:
        samples: items of [`~modeling_vitp.tasks.detection.data.ObjectImages`].
        detections: output of [`~modeling_vitp.tasks.detection.trainer.ViTPDetectionTrainer.detect`] for the images.
        names: names of the classes.
        path: path of the PNG file.
        components: principal components of the backbone features as RGB images, to show in a last column.
        band_names: names of the image bands, see [`~modeling_vitp.images.pixels.shown`].
    """
    colors = [matplotlib.colormaps["tab20"](index % 20) for index in range(len(names))]
    is_annotated = "labels" in samples[0]
    columns = 1 + is_annotated + bool(components)
    figure = Figure(figsize=(4 * columns, 4 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for axis, component_image in zip(axes[:, -1], components):
        axis.imshow(component_image, interpolation="nearest")
        axis.set_title("backbone", fontsize=8)
        axis.axis("off")
    for row, sample, detections_of_image in zip(axes, samples, detections):
        image = shown(sample["image"], band_names)
        panels = [("detected", detections_of_image)]
        if is_annotated:
            panels.insert(0, ("annotated", sample))
        for axis, (title, objects) in zip(row, panels):
            draw_image(axis, image)
            axis.set_title(f"{sample['id']}: {title}", fontsize=8)
            axis.axis("off")
            draw_objects(axis, objects, colors)
    handles = [Patch(facecolor=color, label=name) for name, color in zip(names, colors)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
    figure.savefig(path, dpi=120)


def draw_image(axis: Axes, image: np.ndarray) -> None:
    """Draw an image in continuous coordinates, as those of the objects are."""
    height, width = image.shape[:2]
    axis.imshow(image, interpolation="nearest", extent=(0, width, height, 0))


def draw_objects(axis: Axes, objects: Mapping, colors: Sequence) -> None:
    """Draw the boxes of objects, and their scores and masks if they have some."""
    labels = objects["labels"].tolist()
    for index, points in enumerate(outlines(objects)):
        color = colors[labels[index]]
        box = Polygon(points, fill=False, edgecolor=color, linewidth=1)
        axis.add_patch(box)
        if "scores" in objects:
            score = float(objects["scores"][index])
            draw_score(axis, score, points[0], color)
        if "masks" in objects:
            mask = objects["masks"][index]
            if isinstance(mask, dict):
                mask = mask_of(mask)
            height, width = mask.shape
            layer = np.zeros((height, width, 4))
            layer[np.asarray(mask) > 0] = (*color[:3], 0.4)
            draw_image(axis, layer)


def draw_score(
    axis: Axes,
    score: float,
    position: np.ndarray,
    color: Sequence[float],
) -> None:
    """Write a score on the color of its class, moved into the image if its position is outside."""
    # The limits of y are in descending order, because y points down.
    x_low, x_high = sorted(axis.get_xlim())
    y_low, y_high = sorted(axis.get_ylim())
    x, y = np.clip(position, [x_low, y_low], [x_high, y_high])
    text = axis.text(
        x,
        y,
        f"{score:.2f}",
        fontsize=5,
        color="white",
        backgroundcolor=(*color[:3], 0.6),
        clip_on=True,
    )
    text.set_in_layout(False)


def outlines(objects: Mapping) -> np.ndarray:
    """Return the corners of the boxes, `(n, 4, 2)`."""
    if "corners" in objects:
        corners = objects["corners"]
    else:
        corners = corners_of(objects["boxes"])
    return corners.cpu().numpy()
