"""Probes of a pretraining on labeled images: patches of views, or classes of whole images, beside controls."""

import itertools
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ..classification.data import FileImages
from ..data.annotations import AnnotatedImage
from ..data.files import FileSample
from ..dense.data import DenseData
from ..image_processing_vitp_dense import IGNORE_INDEX
from ..images.pixels import IMAGE_PROCESSOR, ColorJitter, to_pixels
from ..instructions.from_annotations.collages import Collage
from ..instructions.from_annotations.drawing import DrawnInstructions, encode_picture
from ..instructions.from_annotations.questions import covered_by_class
from ..vrl import keyed_generator
from .classification import ClassificationProbe
from .few_labels import FewLabels
from .gains import PIXELS, gains_of, load_backbones, measure_gains, with_least_gain

MOST_VIEWS = 200  # Of the training images, and of the test images.
MOST_CLASSES = IGNORE_INDEX - 1  # Of a mask with 8 bits, beside the background.
NEIGHBORS, TEMPERATURE, L2 = 20, 0.07, 1e-2  # Of the probes of classes, as those of `vitp probe`.


def probe_labels(
    drawn: DrawnInstructions,
    test_images: Sequence[AnnotatedImage],
    output_dir: Path,
    seed: int,
    device: str | torch.device,
    color_jitter: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Probe `backbone` in the folder of a run, `backbone_at_start`, random weights and bare pixels on labeled images.

    Patches of boxes, oriented boxes (their upright boxes) and masks have the class that covers most of them. Images
    with one class each are probed as a whole, without pixels as a control.

    Args:
        drawn: transform of the training images.
        test_images: labeled images that the run has not trained on.
        output_dir: folder of the run, to which pictures of patches are written as `probe`.
        seed: seed of the views and of the random weights.
        device: device of the backbones.
        color_jitter: fields of the [`~modeling_vitp.images.pixels.ColorJitter`] of the pretraining, which the training
            views of 8-bit images get too.

    Returns:
        `scores` by backbone and probe, `gains` by probe and control, `least_gain` by probe (see [`measure_gains`] and
        [`gains_of`]); or `None` if the labels have no classes of patches or images, as those of pairs.
    """
    subject, folder = drawn.asker.subject, output_dir / "probe"
    backbones = load_backbones(output_dir / "backbone", output_dir / "backbone_at_start", seed, device)
    if subject == "scene":
        del backbones[PIXELS]
        measured = measure_class_gains(drawn.images, test_images, backbones, output_dir)
    elif subject in ("objects", "regions"):
        data = write_views(drawn, test_images, folder / "data", seed, color_jitter)
        measured = measure_gains(data, "train", "test", backbones=backbones, folder=folder)["test"]
        shutil.rmtree(folder / "data")
    else:
        return None
    return with_least_gain(measured)


def measure_class_gains(
    train: Sequence[AnnotatedImage], test: Sequence[AnnotatedImage], backbones: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Return `scores` and `gains` of nearest-neighbor and linear probes of the classes of whole images."""
    names = sorted({image.label for image in train})
    samples = {}
    for role, images in (("train", train), ("test", test)):
        chosen = [image for image in spread(images, MOST_VIEWS) if image.label in names]
        files = [FileSample(image.id, {}, image.paths, None) for image in chosen]
        samples[role] = FileImages(files, [[image.label] for image in chosen], None).set_classes(names, False)
    task = ClassificationProbe(samples, names, None, "mean", NEIGHBORS, TEMPERATURE, L2)
    draws = {FewLabels(share=1.0): [np.arange(len(samples["train"]))]}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, backbone in backbones.items():
        with tempfile.TemporaryDirectory(dir=folder) as features:
            found = task.probe(backbone, draws, None, Path(features))
        scores[name] = {probe: dict(of_draws[0]) for (probe, _), of_draws in found.items()}
    return {"control": task.control(), "scores": scores, "gains": gains_of(scores, task.shown)}


def write_views(
    drawn: DrawnInstructions,
    test_images: Sequence[AnnotatedImage],
    folder: Path,
    seed: int,
    color_jitter: dict[str, Any] | None = None,
) -> DenseData:
    """Write drawn views of the training images and windows of the test images, with masks of their classes.

    The training views have the random colors of the pretraining, if it has any and they have 8 bits. Background is a
    class. The other classes are those of the training images, at most the `MOST_CLASSES` most frequent.
    """
    shutil.rmtree(folder, ignore_errors=True)
    names = [name for name, _ in Counter(drawn.asker.vocabulary).most_common(MOST_CLASSES)]
    number = max(MOST_VIEWS // len(drawn.images), 1)
    train = spread(drawn.images, MOST_VIEWS)
    views = {"train": [], "test": []}
    for image in train:
        for repeat in range(number):
            generator = keyed_generator(seed, image.id, repeat, "probe")
            views["train"].append(drawn.draw_view(image, generator, is_mosaic_allowed=False))
    windows = itertools.chain.from_iterable(drawn.fixed_views(image, 0) for image in test_images)
    views["test"] = spread(list(windows), MOST_VIEWS)
    jitter = None if color_jitter is None else ColorJitter(**color_jitter)
    for split, of_split in views.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index, view in enumerate(of_split):
            picture = drawn.scenes.render(view)[0]
            if split == "train" and jitter is not None and isinstance(picture, Image.Image):
                generator = keyed_generator(seed, index, "probe colors")
                picture = to_pil_image(jitter([to_pixels(picture, None)], IMAGE_PROCESSOR, generator)[0])
            content = encode_picture(picture)["bytes"]
            suffix = "png" if content.startswith(b"\x89PNG") else "tif"
            (folder / split / "images" / f"{index:06}.{suffix}").write_bytes(content)
            Image.fromarray(class_mask(view, names)).save(folder / split / "masks" / f"{index:06}.png")
    return DenseData(
        classes=[{"name": name, "value": value} for value, name in enumerate(["background", *names])],
        splits={
            split: {"image": f"{split}/images/{{name}}.*", "mask": f"{split}/masks/{{name}}.png"} for split in views
        },
        root=str(folder),
        ignore=[IGNORE_INDEX],
    )


def class_mask(view: Collage, names: Sequence[str]) -> np.ndarray:
    """Return the class of each pixel of a view, uint8 `(height, width)`: 0 for none, or from 1 the index in `names`.

    Pixels of unclear objects, of several classes, and of classes without a name are `IGNORE_INDEX`.
    """
    mask = np.zeros(view.size, dtype=np.uint8)
    num_classes = np.zeros(view.size, dtype=np.uint8)
    for label, covered in covered_by_class(view):
        if label in names:
            mask[covered] = 1 + names.index(label)
            num_classes += covered
        else:
            num_classes[covered] = 2
    for region in view.visible:
        if not region.is_clear and view.mask is None:
            left, top, right, bottom = (math.ceil(end - 0.5) for end in region.box)
            num_classes[top:bottom, left:right] = 2
    mask[num_classes > 1] = IGNORE_INDEX
    return mask


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most a number of items, evenly spaced."""
    chosen = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[index] for index in chosen]
