"""Probes of masks: a linear layer and a small nonlinear one on each patch, also on corrupted images."""

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..dense.data import ClassPixels, DenseData, ImageFiles, MaskedImages
from ..image_processing_vitp_dense import IGNORE_INDEX
from ..images.corruptions import SEVERITIES, CorruptedImages
from ..metrics.ranking import mean_area
from ..metrics.report import METRICS_FOLDER, name_classes
from .backbones import Backbone, ImagesOf, extract_maps
from .few_labels import FewLabels
from .heads import fit_linear, fit_nonlinear

logger = logging.getLogger(__name__)
Probe = Callable[[torch.Tensor], torch.Tensor]  # features to logits


class SegmentationProbe:
    """Classes of pixels, probed by a linear layer and a small nonlinear one on each patch.

    Args:
        data: see [`~modeling_vitp.dense.data.DenseData`]. Its input spec is for all backbones; without one, each reads
            images by its own (but volumes, which become 8-bit slices).
        splits: the names of what is trained and tested on, under `train` and `test`.
        l2: see [`~modeling_vitp.probing.heads.fit_linear`].
        depths: see [`~modeling_vitp.probing.backbones.Backbone.maps`].

    Raises:
        ValueError: if a split is not there, has no masks, or shares a file or a patient with the other.
    """

    shown = "mean_iou"  # of the scores
    control_name = "largest class, whatever the image"

    def __init__(self, data: DenseData, splits: Mapping[str, str], l2: float, depths: int = 1):
        if splits["train"] == splits["test"]:
            raise ValueError(f"Split {splits['train']!r} is trained and tested on: give another test_split.")
        self.data, self.splits, self.l2, self.depths = data, splits, l2, depths
        self.names = data.encoding.names
        self.samples = {role: data.open([name]) for role, name in splits.items()}
        data.check_disjoint(list(splits.values()))
        self.corruption: tuple[str, int, int] | None = None

    def under(self, corruption: str, severity: int, seed: int) -> "SegmentationProbe":
        """Return the task with corrupted test images; see [`~modeling_vitp.images.corruptions.CorruptedImages`]."""
        task = copy.copy(self)
        task.corruption = corruption, severity, seed
        task.samples = {**self.samples, "test": CorruptedImages(self.samples["test"], *task.corruption)}
        return task

    @cached_property
    def pixels(self) -> np.ndarray:
        """Pixels of each class in each training image, int64 of shape `(images, classes)`."""
        counts = ClassPixels(self.samples["train"], len(self.names))
        pixels = np.stack([counts[index].numpy() for index in tqdm(range(len(counts)), desc="Reading masks")])
        absent = [name for name, count in zip(self.names, pixels.sum(0)) if not count]
        if absent:
            logger.warning("The classes %s never occur in what is trained on.", absent)
        return pixels

    @property
    def presence(self) -> np.ndarray:
        return self.pixels > 0

    def masks(self, role: str) -> Iterator[np.ndarray]:
        """Yield the masks of a split: class indices, uint8 of shape `(height, width)`."""
        for index in range(len(self.samples[role])):
            mask = self.samples[role].mask(index)
            if mask is None:
                raise ValueError(f"Split {self.splits[role]!r} has no masks: give `mask` in its settings.")
            yield mask.numpy()

    def control(self) -> dict[str, float]:
        """Return the scores of the most frequent class of the training pixels, everywhere."""
        metric, label = self._metric(), int(self.pixels.sum(0).argmax())
        for mask in self.masks("test"):
            metric.add(prediction=np.full(mask.shape, label), reference=mask)
        return name_classes(metric.compute(), self.names)

    def fit(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Probe]]:
        """Fit the probes to each draw of training images, and return them by probe and labels."""
        train = self.features(backbone, "train", image_size, folder, **loading)
        counts = np.stack([pixels_by_patch(mask, train.shape[1:3], len(self.names)) for mask in self.masks("train")])
        heads, device = {}, backbone.model.device
        for labels, subsets in draws.items():
            heads["linear", labels] = [fit_linear(train, counts, used, self.l2, device) for used in subsets]
            heads["nonlinear", labels] = [fit_nonlinear(train, counts, used, device=device) for used in subsets]
        return heads

    def probe(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[dict[str, float]]]:
        """Return the scores of each draw of training images, by probe and labels.

        `mean_iou` is over pixels, and `patch_auc` over patches: how well one of a class is told from the others, by the
        class that most of its pixels have, the mean over classes. The latter depends on no threshold.
        """
        return self.score(
            self.fit(backbone, draws, image_size, folder, **loading), backbone, image_size, folder, **loading
        )

    def score(
        self,
        heads: dict[tuple[str, FewLabels], list[Probe]],
        backbone: Backbone,
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[dict[str, float]]]:
        """Return the scores of fitted probes; see [`fit`] and [`probe`]."""
        test = self.features(backbone, "test", image_size, folder, **loading)
        return {key: [self._score(probe, test, f"{backbone.name}, {key[0]}") for probe in heads[key]] for key in heads}

    def _score(self, probe: Probe, features: np.ndarray, description: str) -> dict[str, float]:
        metric, logits, labels = self._metric(), [], []
        masks = tqdm(self.masks("test"), desc=f"{description}, scoring", total=len(features))
        for maps, mask in zip(features, masks, strict=True):
            scores = probe(torch.tensor(maps)).cpu()
            metric.add(prediction=interpolate(scores, mask.shape).argmax(0).numpy(), reference=mask)
            counts = pixels_by_patch(mask, scores.shape[:2], len(self.names))
            labels.append(counts.argmax(-1)[counts.any(-1)])
            logits.append(scores.numpy()[counts.any(-1)])
        area = mean_area(np.concatenate(logits), np.concatenate(labels))
        return name_classes(metric.compute(), self.names) | {"patch_auc": area}

    def _metric(self) -> evaluate.Metric:
        return evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=len(self.names), ignore_index=IGNORE_INDEX)

    def features(self, backbone: Backbone, role: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`: float32 of shape `(images, rows, columns, width)`."""
        data = self.data
        if data.volumes is None:
            data = dataclasses.replace(data, input_spec=backbone.reading(data.input_spec))
        samples = data.open([self.splits[role]])
        state = f"{state_of(samples)} {data.input_spec}"
        if role == "test" and self.corruption is not None:
            samples, state = CorruptedImages(samples, *self.corruption), f"{state} {self.corruption}"
        images = ImagesOf(len(samples), partial(single_image, samples))
        description = f"{backbone.name}, {role}"
        return extract_maps(
            backbone, images, self.depths, image_size, state, folder, description=description, **loading
        )


def single_image(samples: MaskedImages, index: int) -> torch.Tensor:
    """Return the image of a sample without its mask."""
    sample = samples[index]
    if len(sample["images"]) > 1:
        raise ValueError(f"{sample['id']} is a pair of images: probes read one.")
    return sample["images"][0]


def pixels_by_patch(mask: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return how many pixels of each class have their center in each patch. Pixels without a class do not count.

    Args:
        mask: class indices of shape `(height, width)`.
        grid: rows and columns of patches, which span the image.

    Returns:
        float32 of shape `(rows, columns, num_classes)`.
    """
    (rows, columns), (height, width) = grid, mask.shape
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    column = (2 * np.arange(width) + 1) * columns // (2 * width)
    places = (row[:, None] * columns + column) * num_classes + mask
    counts = np.bincount(places[mask != IGNORE_INDEX], minlength=rows * columns * num_classes)
    return counts.reshape(rows, columns, num_classes).astype(np.float32)


def interpolate(logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Interpolate logits of patches, `(rows, columns, classes)`, bilinearly to pixels, `(classes, height, width)`."""
    logits = logits.permute(2, 0, 1)[None]
    return F.interpolate(logits, shape, mode="bilinear", align_corners=False)[0]


def state_of(samples: MaskedImages) -> str:
    """Return a text that changes when the images change."""
    if isinstance(samples, ImageFiles):
        files = [(path, box, path.stat().st_mtime_ns) for sample, box in samples.rows for path in sample.images]
        return str(files)
    return f"{samples.rows._fingerprint} {samples.image_columns}"


SHOWN = ("patch_auc", "mean_iou")


def probe_robustness(
    task: SegmentationProbe, backbone: Backbone, severities: Sequence[int], seed: int, folder: Path
) -> dict[str, dict[str, dict]]:
    """Return the scores of probes of a frozen backbone, fitted once, on clean and on corrupted test images.

    Args:
        severities: of each corruption, from 1 to 5.
        seed: of what is drawn: noise, clouds, gaps, directions.
        folder: for features, which are deleted again.

    Returns:
        By probe and score (`patch_auc`, `mean_iou`): `clean`; `corruptions`, the mean over the severities of each;
        `average`, the mean of these; and `relative`, which is the average divided by `clean`.
    """
    labels = FewLabels(share=1.0)
    draws = {labels: [np.arange(len(task.samples["train"]))]}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as features:
        heads = task.fit(backbone, draws, None, Path(features))

        def score(task: SegmentationProbe) -> dict[str, dict[str, float]]:
            return {probe: draw[0] for (probe, _), draw in task.score(heads, backbone, None, Path(features)).items()}

        clean, corrupted = score(task), {}
        for name in tqdm(SEVERITIES, desc=f"{backbone.name}, corruptions"):
            corrupted[name] = [score(task.under(name, severity, seed)) for severity in severities]
    return {
        probe: {
            shown: summarize_corruptions(
                clean[probe][shown],
                {name: [scores[probe][shown] for scores in found] for name, found in corrupted.items()},
            )
            for shown in SHOWN
        }
        for probe in clean
    }


def summarize_corruptions(clean: float, corrupted: dict[str, list[float]]) -> dict:
    means = {name: float(np.mean(scores)) for name, scores in corrupted.items()}
    average = float(np.mean(list(means.values())))
    return {"clean": clean, "average": average, "relative": average / clean, "corruptions": means}
