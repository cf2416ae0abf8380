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
    for axis, colored in zip(axes[:, -1], components):
        axis.imshow(colored, interpolation="nearest")
        axis.set_title("backbone", fontsize=8)
        axis.axis("off")
    for row, sample, detected in zip(axes, samples, detections):
        panels = [("detected", detected)]
        if is_annotated:
            annotated = {name: sample[name] for name in ("labels", "corners", "masks") if name in sample}
            panels.insert(0, ("annotated", annotated))
        for axis, (title, objects) in zip(row, panels):
            height, width = sample["image"].shape[-2:]
            axis.imshow(
                shown(sample["image"], band_names), interpolation="nearest", extent=(0, width, height, 0)
            )  # continuous coordinates, as those of the objects
            axis.set_title(f"{sample['id']}: {title}", fontsize=8)
            axis.axis("off")
            draw_objects(axis, objects, colors)
    handles = [Patch(facecolor=color, label=name) for name, color in zip(names, colors)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
    figure.savefig(path, dpi=120)


def draw_objects(axis: Axes, objects: Mapping, colors: Sequence) -> None:
    scores = objects.get("scores", [None] * len(objects["labels"]))
    for index, (label, score, points) in enumerate(zip(objects["labels"].tolist(), scores, outlines(objects))):
        axis.add_patch(Polygon(points, fill=False, edgecolor=colors[label], linewidth=1))
        if score is not None:
            position = np.clip(points[0], *np.sort([axis.get_xlim(), axis.get_ylim()]).T)
            background = (*colors[label][:3], 0.6)
            text = axis.text(
                *position, f"{float(score):.2f}", fontsize=5, color="white", backgroundcolor=background, clip_on=True
            )
            text.set_in_layout(False)
        if "masks" in objects:
            mask = objects["masks"][index]
            mask = mask_of(mask) if isinstance(mask, dict) else mask
            layer = np.zeros((*np.shape(mask), 4))
            layer[np.asarray(mask) > 0] = (*colors[label][:3], 0.4)
            axis.imshow(layer, interpolation="nearest", extent=(0, layer.shape[1], layer.shape[0], 0))


def outlines(objects: Mapping) -> np.ndarray:
    """Return the corners of the boxes, `(n, 4, 2)`."""
    return (objects["corners"] if "corners" in objects else corners_of(objects["boxes"])).cpu().numpy()
