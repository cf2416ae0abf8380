"""Detections as DOTA's server takes them: a text file for each class, flat in a zip archive."""

import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import DetectionData
from .samples import ObjectImages
from .tiles import merge
from .trainer import DetectionTrainer

MERGED = 0.1  # overlap up to which detections of a class are kept where windows are brought together


def write_submission(trainer: DetectionTrainer, data: DetectionData, settings: dict[str, Any]) -> None:
    """The detections of a split in `Task1` in the output folder, those in windows of one image merged; see
    [`write_task1`].
    """
    samples = data.open([settings["split"]], trainer.task)
    detections = detect_whole(trainer, samples, settings.get("nms", MERGED))
    archive = write_task1(detections, trainer.names, Path(trainer.args.output_dir) / "Task1")
    print(f"For the server: {archive}")


def detect_whole(
    trainer: DetectionTrainer, samples: ObjectImages, nms_threshold: float
) -> dict[str, dict[str, torch.Tensor]]:
    """The detections in whole images, by their names."""
    parts: dict[str, list] = {}
    for index, place in enumerate(samples.places):
        (found,) = trainer.detect([samples.image(index)])
        key = "corners" if "corners" in found else "boxes"
        found = {name: found[name].cpu() for name in ("scores", "labels", key)}
        parts.setdefault(place.whole, []).append((found, place.start))
    return {name: merge(*zip(*some), nms_threshold) for name, some in parts.items()}


def write_task1(
    detections: Mapping[str, Mapping[str, torch.Tensor]],
    names: Sequence[str],
    folder: str | Path,
    expected: Iterable[str] | None = None,
) -> Path:
    """Writes `Task1_<class>.txt` for each class to a folder, and all of them to a zip beside it.

    A line is `image score x1 y1 x2 y2 x3 y3 x4 y4`, corners with two decimals; images come by their names, and the
    detections of one as they are given.

    Args:
        detections: of each whole image, by its name, `scores` and `labels`, `(n,)`, and `corners`, `(n, 4, 2)` in
            pixels; see [`~modeling_vitp.detection.tiles.merge`] for images that were cut into windows.
        names: of the classes.
        folder: is created, or replaced.
        expected: names of all images that the server scores.

    Returns:
        The zip archive.

    Raises:
        ValueError: if an image is missing, or is none that is expected.
    """
    if expected is not None and set(expected) != set(detections):
        missing, more = sorted(set(expected) - set(detections)), sorted(set(detections) - set(expected))
        raise ValueError(f"submission: without detections for {missing[:5]}, and with some for {more[:5]}.")
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines: dict[str, list[str]] = {name: [] for name in names}
    for image, found in sorted(detections.items()):
        corners = first_at_top_left(found["corners"].double().cpu().numpy())
        for label, score, points in zip(found["labels"].tolist(), found["scores"].tolist(), corners):
            numbers = " ".join(f"{value:.2f}" for value in points.flatten())
            lines[names[label]].append(f"{image} {score} {numbers}\n")
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            path = folder / f"Task1_{name}.txt"
            path.write_text("".join(lines[name]))
            packed.write(path, path.name)
    return archive


def first_at_top_left(corners: np.ndarray) -> np.ndarray:
    """The same corners `(n, 4, 2)`, in the same direction, from where they are nearest to those of the upright box
    around them, which start at its top left.
    """
    if not len(corners):
        return corners.reshape(0, 4, 2)
    left, top, right, bottom = *corners.min(1).T, *corners.max(1).T
    upright = np.stack([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    starts = np.stack([np.roll(corners, -start, 1) for start in range(4)])
    distances = np.linalg.norm(starts - upright, axis=-1).sum(-1)  # (4, n)
    return starts[distances.argmin(0), np.arange(len(corners))]
