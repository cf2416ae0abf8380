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
from ...images.seen import report_images
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
    options = ("depths",)
    reads_patches = True

    def __init__(
        self,
        data: DenseData,
        splits: Mapping[str, str],
        l2: float,
        depths: int = 1,
        intervals: bool = False,
    ):
        if splits["train"] == splits["test"]:
            raise ValueError(f"train_split and test_split must differ, got {splits['train']!r}.")
        self.data = data
        self.l2 = l2
        self.depths = depths
        self.intervals = intervals
        self.names = data.encoding.names
        self.samples = {}
        for role, name in splits.items():
            self.samples[role] = data.open([name])
        for role, name in splits.items():
            if self.samples[role].mask(0) is None:
                raise ValueError(f"Split {name!r} has no masks. Set `mask` in its settings.")
        data.check_disjoint(list(splits.values()))

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data`, whose classes and splits are inferred from its root if they are not given."""
        data = DenseData.from_dict(DenseData.complete(args.data))
        splits = {"train": args.train_split, "test": args.test_split}
        return cls(
            data,
            splits,
            args.l2,
            args.depths,
            args.intervals,
        )

    @cached_property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each class in each training image, int64 `(images, classes)`."""
        class_pixels = ClassPixels(self.samples["train"], len(self.names))
        pixels_of_images = []
        for index in tqdm(range(len(class_pixels)), desc="Reading masks"):
            pixels_of_images.append(class_pixels[index].numpy())
        pixels = np.stack(pixels_of_images)
        absent_classes = [name for name, count in zip(self.names, pixels.sum(0)) if not count]
        if absent_classes:
            logger.warning("No training images found for the classes %s.", absent_classes)
        return pixels

    @property
    def presence(self) -> np.ndarray:
        return self.pixels > 0

    def masks(self, role: str) -> Iterator[np.ndarray]:
        """Yield the masks of a split: class indices, uint8 `(height, width)`."""
        samples = self.samples[role]
        for index in range(len(samples)):
            yield samples.mask(index).numpy()

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction: the most frequent class of the training pixels."""
        metric = self._metric()
        most_frequent_class = int(self.pixels.sum(0).argmax())
        for mask in self.masks("test"):
            metric.add(prediction=np.full(mask.shape, most_frequent_class), reference=mask)
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
        features = self.features(
            backbone,
            "train",
            image_size,
            folder,
            **loading,
        )
        grid = features.shape[1:3]
        counts_of_images = []
        for mask in self.masks("train"):
            counts_of_images.append(pixels_by_patch(mask, grid, len(self.names)))
        counts = np.stack(counts_of_images)
        device = backbone.model.device
        heads = {}
        for labels, draws_of_images in draws.items():
            linear_heads = []
            for images in draws_of_images:
                linear_heads.append(
                    fit_linear(
                        features,
                        counts,
                        images,
                        self.l2,
                        device,
                    )
                )
            nonlinear_heads = []
            for images in draws_of_images:
                nonlinear_heads.append(
                    fit_nonlinear(
                        features,
                        counts,
                        images,
                        device=device,
                    )
                )
            heads["linear", labels] = linear_heads
            heads["nonlinear", labels] = nonlinear_heads
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
        heads = self.fit(
            backbone,
            draws,
            image_size,
            folder,
            **loading,
        )
        return self.score(
            heads,
            backbone,
            image_size,
            folder,
            **loading,
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
        features = self.features(
            backbone,
            "test",
            image_size,
            folder,
            **loading,
        )
        scores = {}
        for (probe, labels), heads_of_draws in heads.items():
            description = f"{backbone.name}, {probe}"
            scores[probe, labels] = [self._score(head, features, description) for head in heads_of_draws]
        return scores

    def _score(
        self,
        head: Head,
        features: np.ndarray,
        description: str,
    ) -> Scores:
        metric = self._metric()
        patch_logits = []
        patch_labels = []
        cases = self.samples["test"].cases
        masks = tqdm(self.masks("test"), desc=f"{description}, scoring", total=len(features))
        for index, (maps, mask) in enumerate(zip(features, masks, strict=True)):
            logits = head(torch.tensor(maps)).cpu()
            prediction = interpolate(logits, mask.shape).max(0).indices.numpy()
            metric.add_batch(predictions=[prediction], references=[mask], case_ids=[cases[index]])
            counts = pixels_by_patch(mask, logits.shape[:2], len(self.names))
            is_labeled = counts.any(-1)
            patch_labels.append(counts.argmax(-1)[is_labeled])
            patch_logits.append(logits.numpy()[is_labeled])
        area = mean_area(np.concatenate(patch_logits), np.concatenate(patch_labels))
        scores = name_classes(metric.compute(), self.names)
        scores["patch_auc"] = area
        resamples = metric.score_images(self.main_score) if self.intervals else None
        return Scores(scores, resamples)

    def _metric(self) -> evaluate.Metric:
        return evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=len(self.names), ignore_index=IGNORE_INDEX)

    def read_for(self, backbone: Backbone, role: str) -> MaskedImages:
        """Return the samples of a split, `train` or `test`, with the input spec of the data or of the backbone."""
        samples = copy.copy(self.samples[role])
        if self.data.volumes is None:
            spec = backbone.reading(self.data.input_spec)
            samples.spec = None if spec is None else InputSpec.from_dict(spec)
        return samples

    def features(
        self,
        backbone: Backbone,
        role: str,
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`, float32 `(images, rows, columns, width)`."""
        samples = self.read_for(backbone, role)
        if role == "train":
            report_images(len(samples), samples.source, samples.spec)
        if isinstance(samples, ImageFiles):
            images = []
            windows_or_columns = []
            for sample, window in samples.rows:
                images += sample.images
                windows_or_columns.append(window)
        else:
            images = samples.rows
            windows_or_columns = samples.image_columns
        return extract_maps(
            backbone,
            len(samples),
            partial(single_image, samples),
            self.depths,
            image_size,
            state_of(images, windows_or_columns, samples.spec),
            folder,
            description=f"{backbone.name}, {role}",
            **loading,
        )


def single_image(samples: MaskedImages, index: int) -> torch.Tensor:
    """Return the image of a sample without its mask."""
    sample = samples[index]
    images = sample["images"]
    if len(images) > 1:
        raise ValueError(f"Probes need samples of one image, got {sample['id']} with {len(images)} images.")
    return images[0]


def pixels_by_patch(
    mask: np.ndarray,
    grid: tuple[int, int],
    num_classes: int,
) -> np.ndarray:
    """Return the number of pixels of each class in each patch, by their centers. Pixels without a class are ignored.

    Args:
        mask: class indices `(height, width)`.
        grid: rows and columns of patches, which span the image.
        num_classes: number of classes.

    Returns:
        float32 `(rows, columns, num_classes)`.
    """
    rows, columns = grid
    height, width = mask.shape
    row_of_pixel = patch_of_centers(height, rows)
    column_of_pixel = patch_of_centers(width, columns)
    patch_of_pixel = row_of_pixel[:, None] * columns + column_of_pixel
    # Each patch has one bin for each class.
    bin_of_pixel = patch_of_pixel * num_classes + mask
    labeled_bins = bin_of_pixel[mask != IGNORE_INDEX]
    counts = np.bincount(labeled_bins, minlength=rows * columns * num_classes)
    return counts.reshape(rows, columns, num_classes).astype(np.float32)


def patch_of_centers(length: int, patches: int) -> np.ndarray:
    """Return the patch that has the center of each pixel along an axis."""
    doubled_centers = 2 * np.arange(length) + 1  # Integers, which are exact.
    return doubled_centers * patches // (2 * length)


def interpolate(logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Interpolate logits of patches, `(rows, columns, classes)`, bilinearly to pixels, `(classes, height, width)`."""
    channels_first = logits.permute(2, 0, 1)[None]
    return F.interpolate(
        channels_first,
        shape,
        mode="bilinear",
        align_corners=False,
    )[0]
