"""Probes of masks: a linear layer and a small nonlinear network on each patch."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ...image_processing_vitp_dense import IGNORE_INDEX
from ...input_spec import InputSpec
from ...metrics.ranking import mean_area
from ...metrics.report import METRICS_FOLDER, name_classes
from ...metrics.resampling import Scores
from ...probing.arguments import ProbeArguments
from ...probing.backbones import Backbone, extract_maps, state_of
from ...probing.base import Probe
from ...probing.few_labels import FewLabels
from ...probing.heads import fit_linear, fit_nonlinear
from .data import ClassPixels, DenseData, ImageFiles, MaskedImages

logger = logging.getLogger(__name__)
Head = Callable[[torch.Tensor], torch.Tensor]  # From features to logits.


class SegmentationProbe(Probe):
    """Probing task of pixel classes, with a linear layer and a small nonlinear network on each patch.

    Args:
        data: images with masks, see [`~modeling_vitp.tasks.segmentation.data.DenseData`]. Its input spec
            is used for all backbones;
            by default each backbone uses its own, except for volumes, which are read as 8-bit slices.
        splits: names of the splits under `train` and `test`.
        l2: weight decay, see [`~modeling_vitp.probing.heads.fit_linear`].
        depths: number of depths, see [`~modeling_vitp.probing.backbones.Backbone.maps`].
        intervals: whether scores have resamples, for intervals.

    Raises:
        ValueError: If a split is not found or has no masks, or the splits share a file or a patient.
    """

    main_score = "mean_iou"
    title = "mIoU"
    control_name = "most frequent class"
    options = ("pixel_control", "depths")
    reads_patches = True

    def __init__(self, data: DenseData, splits: Mapping[str, str], l2: float, depths: int = 1, intervals: bool = False):
        if splits["train"] == splits["test"]:
            raise ValueError(f"train_split and test_split must differ, got {splits['train']!r}.")
        self.data, self.l2, self.depths, self.intervals = data, l2, depths, intervals
        self.names = data.encoding.names
        self.samples = {role: data.open([name]) for role, name in splits.items()}
        for role, name in splits.items():
            if self.samples[role].mask(0) is None:
                raise ValueError(f"Split {name!r} has no masks. Set `mask` in its settings.")
        data.check_disjoint(list(splits.values()))

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data`, whose classes and splits are inferred from its root if they are not given."""
        data = DenseData.from_dict(DenseData.complete(args.data))
        splits = {"train": args.train_split, "test": args.test_split}
        return cls(data, splits, args.l2, args.depths, args.intervals)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each class in each training image, int64 `(images, classes)`."""
        counts = ClassPixels(self.samples["train"], len(self.names))
        pixels = np.stack([counts[index].numpy() for index in tqdm(range(len(counts)), desc="Reading masks")])
        absent = [name for name, count in zip(self.names, pixels.sum(0)) if not count]
        if absent:
            logger.warning("No training images found for the classes %s.", absent)
        return pixels

    @property
    def presence(self) -> np.ndarray:
        return self.pixels > 0

    def masks(self, role: str) -> Iterator[np.ndarray]:
        """Yield the masks of a split: class indices, uint8 `(height, width)`."""
        for index in range(len(self.samples[role])):
            yield self.samples[role].mask(index).numpy()

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction: the most frequent class of the training pixels."""
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
    ) -> dict[tuple[str, FewLabels], list[Head]]:
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
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of each draw of training images, by probe and labels.

        `mean_iou` is computed on pixels. `patch_auc` is computed on patches, with the most frequent class of a patch as
        label: area under the ROC curve of each class against the others, averaged over classes.
        """
        return self.score(
            self.fit(backbone, draws, image_size, folder, **loading), backbone, image_size, folder, **loading
        )

    def score(
        self,
        heads: dict[tuple[str, FewLabels], list[Head]],
        backbone: Backbone,
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of fitted probes, see [`fit`] and [`probe`]."""
        test = self.features(backbone, "test", image_size, folder, **loading)
        return {key: [self._score(probe, test, f"{backbone.name}, {key[0]}") for probe in heads[key]] for key in heads}

    def _score(self, probe: Head, features: np.ndarray, description: str) -> Scores:
        metric, logits, labels = self._metric(), [], []
        masks = tqdm(self.masks("test"), desc=f"{description}, scoring", total=len(features))
        for index, (maps, mask) in enumerate(zip(features, masks, strict=True)):
            scores, case = probe(torch.tensor(maps)).cpu(), self.samples["test"].cases[index]
            predicted = interpolate(scores, mask.shape).max(0).indices.numpy()
            metric.add_batch(predictions=[predicted], references=[mask], case_ids=[case])
            counts = pixels_by_patch(mask, scores.shape[:2], len(self.names))
            labels.append(counts.argmax(-1)[counts.any(-1)])
            logits.append(scores.numpy()[counts.any(-1)])
        area = mean_area(np.concatenate(logits), np.concatenate(labels))
        found = name_classes(metric.compute(), self.names) | {"patch_auc": area}
        return Scores(found, metric.score_images(self.main_score) if self.intervals else None)

    def _metric(self) -> evaluate.Metric:
        return evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=len(self.names), ignore_index=IGNORE_INDEX)

    def read_for(self, backbone: Backbone, role: str) -> MaskedImages:
        """Return the samples of a split, `train` or `test`, with the input spec of the data or of the backbone."""
        samples = copy.copy(self.samples[role])
        if self.data.volumes is None:
            spec = backbone.reading(self.data.input_spec)
            samples.spec = None if spec is None else InputSpec.from_dict(spec)
        return samples

    def features(self, backbone: Backbone, role: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`, float32 `(images, rows, columns, width)`."""
        samples = self.read_for(backbone, role)
        if isinstance(samples, ImageFiles):
            images = [path for sample, _ in samples.rows for path in sample.images]
            parts = [window for _, window in samples.rows]
        else:
            images, parts = samples.rows, samples.image_columns
        return extract_maps(
            backbone,
            len(samples),
            partial(single_image, samples),
            self.depths,
            image_size,
            state_of(images, parts, samples.spec),
            folder,
            description=f"{backbone.name}, {role}",
            **loading,
        )


def single_image(samples: MaskedImages, index: int) -> torch.Tensor:
    """Return the image of a sample without its mask."""
    sample = samples[index]
    if len(sample["images"]) > 1:
        raise ValueError(f"Probes need samples of one image, got {sample['id']} with {len(sample['images'])} images.")
    return sample["images"][0]


def pixels_by_patch(mask: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return the number of pixels of each class in each patch, by their centers. Pixels without a class are ignored.

    Args:
        mask: class indices `(height, width)`.
        grid: rows and columns of patches, which span the image.
        num_classes: number of classes.

    Returns:
        float32 `(rows, columns, num_classes)`.
    """
    (rows, columns), (height, width) = grid, mask.shape
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    column = (2 * np.arange(width) + 1) * columns // (2 * width)
    bins = (row[:, None] * columns + column) * num_classes + mask
    counts = np.bincount(bins[mask != IGNORE_INDEX], minlength=rows * columns * num_classes)
    return counts.reshape(rows, columns, num_classes).astype(np.float32)


def interpolate(logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Interpolate logits of patches, `(rows, columns, classes)`, bilinearly to pixels, `(classes, height, width)`."""
    logits = logits.permute(2, 0, 1)[None]
    return F.interpolate(logits, shape, mode="bilinear", align_corners=False)[0]
