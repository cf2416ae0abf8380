"""Probes of the backbones of a run on labeled images: patches of views, or classes of whole images."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.annotations import AnnotatedImage
from ..data.files import FileSample
from ..data.splits import spread
from ..image_processing_vitp_dense import IGNORE_INDEX
from ..probing.few_labels import FewLabels
from ..tasks.classification.data import FileImages
from ..tasks.classification.probe import ClassificationProbe
from ..tasks.segmentation.data import DenseData
from .gains import PIXELS, gains_of, load_backbones, measure_gains, with_least_gain

MOST_SCENES = 200  # Of the training images, and of the test images.
# Settings of the probes of classes, as those of `vitp probe`.
NEIGHBORS = 20
TEMPERATURE = 0.07
L2 = 1e-2


def probe_views(
    views: Path,
    names: Sequence[str],
    output_dir: Path,
    seed: int,
    device: str | torch.device,
) -> dict[str, Any]:
    """Probe `backbone` in the folder of a run, `backbone_at_start`, random weights and bare pixels on patches of views.

    A patch has the class that covers most of it.

    Args:
        views: folder with `train/images`, `train/masks`, `test/images` and `test/masks`, with files of equal names.
        names: name of each value in the masks.
        output_dir: folder of the run, to which pictures of patches are written as `probe`.
        seed: seed of the random weights.
        device: device of the backbones.

    Returns:
        `scores` by backbone and probe, `gains` by probe and control, `least_gain` by probe (see [`measure_gains`] and
        [`gains_of`]).
    """
    gains = measure_gains(
        views_data(views, names),
        "train",
        "test",
        backbones=load_backbones(output_dir / "backbone", output_dir / "backbone_at_start", seed, device),
        folder=output_dir / "probe",
    )
    return with_least_gain(gains["test"])


def views_data(views: Path, names: Sequence[str]) -> DenseData:
    """Return the data set of the views of [`probe_views`]."""
    splits = {}
    for split in ("train", "test"):
        splits[split] = {
            "image": f"{split}/images/{{name}}.*",
            "mask": f"{split}/masks/{{name}}.png",
        }
    classes = [{"name": name, "value": value} for value, name in enumerate(names)]
    return DenseData(
        classes=classes,
        splits=splits,
        root=str(views),
        ignore=[IGNORE_INDEX],
    )


def probe_scenes(
    train: Sequence[AnnotatedImage],
    test: Sequence[AnnotatedImage],
    output_dir: Path,
    seed: int,
    device: str | torch.device,
) -> dict[str, Any]:
    """Probe the backbones of a run on the classes of whole images, without bare pixels as a control.

    The probes are nearest neighbors and a linear one.

    Args:
        train, test: labeled images; the run has not trained on those of the test.
        output_dir: folder of the run, with `backbone` and `backbone_at_start`.
        seed: seed of the random weights.
        device: device of the backbones.

    Returns:
        `scores`, `gains` and `least_gain`, see [`probe_views`], and `control`, the scores of a constant.
    """
    backbones = load_backbones(output_dir / "backbone", output_dir / "backbone_at_start", seed, device)
    del backbones[PIXELS]
    names = sorted(set().union(*(image.labels for image in train)))
    multi_label = any(len(image.labels) > 1 for image in [*train, *test])
    samples = {
        "train": labeled_scenes(train, names, multi_label),
        "test": labeled_scenes(test, names, multi_label),
    }
    task = ClassificationProbe(
        samples,
        names,
        input_spec=None,
        pooling="mean",
        num_neighbours=NEIGHBORS,
        temperature=TEMPERATURE,
        l2=L2,
        multi_label=multi_label,
    )
    all_images = np.arange(len(samples["train"]))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, backbone in backbones.items():
        with tempfile.TemporaryDirectory(dir=output_dir) as features_folder:
            draws = {FewLabels(share=1.0): [all_images]}
            probe_scores = task.probe(backbone, draws, None, Path(features_folder))
        scores[name] = {}
        for (probe, _), scores_of_draws in probe_scores.items():
            scores[name][probe] = dict(scores_of_draws[0])
    measured = {
        "control": task.control(),
        "scores": scores,
        "gains": gains_of(scores, task.main_score),
    }
    return with_least_gain(measured)


def labeled_scenes(images: Sequence[AnnotatedImage], names: Sequence[str], multi_label: bool) -> FileImages:
    """Return up to `MOST_SCENES` evenly spread images, without those that have a class which is not in `names`."""
    files = []
    labels = []
    for image in spread(images, MOST_SCENES):
        is_labeled = multi_label or len(image.labels) == 1
        if is_labeled and set(image.labels) <= set(names):
            files.append(FileSample(image.id, {}, image.paths, None))
            labels.append(image.labels)
    return FileImages(files, labels, None).set_classes(names, multi_label)
