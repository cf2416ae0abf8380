"""Probe of boxes: a linear layer that predicts whether a patch contains the center of an object of a class."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ...input_spec import InputSpec
from ...metrics.pixel_metrics import mean_of_counted
from ...metrics.ranking import area_under_curve, average_precision, log_odds, weighted_areas
from ...metrics.resampling import BOX_RESAMPLES, Score, Scores, resample
from ...probing.arguments import ProbeArguments
from ...probing.backbones import Backbone, extract_maps, state_of
from ...probing.base import Probe
from ...probing.few_labels import FewLabels
from ...probing.heads import fit_linear
from .annotations import ImageObjects
from .data import DetectionData

logger = logging.getLogger(__name__)


class DetectionProbe(Probe):
    """Probing task of object centers, with a linear layer on each patch.

    Args:
        data: images with boxes, see [`~modeling_vitp.tasks.detection.data.DetectionData`]. Its input spec
            is used for all backbones; by default each backbone uses its own.
        splits: names of the splits under `train` and `test`.
        l2: weight decay, see [`~modeling_vitp.probing.heads.fit_linear`].
        depths: number of depths, see [`~modeling_vitp.probing.backbones.Backbone.maps`].
        intervals: whether scores have resamples, for intervals.

    Raises:
        ValueError: If a split is not found, the splits share an image, or an image has no annotation.
    """

    main_score = "centre_auc"
    title = "AUC of patches with the center of an object"
    control_name = "constant score"
    options = ("pixel_control", "depths")
    reads_patches = True

    def __init__(
        self, data: DetectionData, splits: Mapping[str, str], l2: float, depths: int = 1, intervals: bool = False
    ):
        if splits["train"] == splits["test"]:
            raise ValueError(f"train_split and test_split must differ, got {splits['train']!r}.")
        data.check_disjoint(list(splits.values()), "horizontal")
        self.data, self.l2, self.depths, self.intervals = data, l2, depths, intervals
        self.names = data.names.names
        self.samples = {role: data.open([name], "horizontal") for role, name in splits.items()}
        for samples in self.samples.values():
            unknown = [place.id for place in samples.places if place.objects is None]
            if unknown:
                raise ValueError(f"No annotation found for {unknown[0]}.")
        self.objects = {role: self._objects(role, name) for role, name in splits.items()}
        absent = [name for name, images in zip(self.names, self.presence.sum(0)) if not images]
        if absent:
            logger.warning("No training images found for the classes %s.", absent)

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data`, whose classes and splits are inferred from its root if they are not given."""
        data = DetectionData.from_dict(DetectionData.complete(args.data))
        splits = {"train": args.train_split, "test": args.test_split}
        return cls(data, splits, args.l2, args.depths, args.intervals)

    def _objects(self, role: str, split: str) -> list[ImageObjects]:
        """Return the objects whose center is in each sample, in pixels of the sample, not clipped to a window."""
        places = self.samples[role].places
        whole = {place.image: place.objects for place in places}
        if any(place.window is not None for place in places):
            whole = {
                place.image: place.objects for place in self.data.without_tiles().open([split], "horizontal").places
            }
        found = []
        for place in places:
            left, top, right, bottom = place.window or (0, 0, *place.size[::-1])
            objects = whole[place.image].moved_to(left, top)
            centers = objects.corners.mean(1)
            found.append(objects.take(((centers >= 0) & (centers < [right - left, bottom - top])).all(1)))
        return found

    @property
    def presence(self) -> np.ndarray:
        presence = np.zeros((len(self.samples["train"]), len(self.names)), dtype=bool)
        for found, objects in zip(presence, self.objects["train"]):
            found[objects.labels[~objects.crowd]] = True
        return presence

    def centres(self, role: str, grid: tuple[int, int]) -> np.ndarray:
        """Return the number of object centers of each class in each patch.

        Args:
            role: `train` or `test`.
            grid: rows and columns of patches, which span each image.

        Returns:
            float32 `(images, rows, columns, classes + 1)`. The last class is 1 for patches without a center. All
            classes are 0 for patches with the center of a crowd, which are ignored.
        """
        samples = self.samples[role]
        counts = np.zeros((len(samples), *grid, len(self.names) + 1), dtype=np.float32)
        for found, place, objects in zip(counts, samples.places, self.objects[role]):
            left, top, right, bottom = place.window or (0, 0, *place.size[::-1])
            shares = objects.corners.mean(1) / [right - left, bottom - top]
            columns, rows = np.floor(shares * grid[::-1]).astype(int).T
            is_single, is_crowd = ~objects.crowd, objects.crowd
            np.add.at(found, (rows[is_single], columns[is_single], objects.labels[is_single]), 1)
            found[..., -1] = ~found.any(-1)
            found[rows[is_crowd], columns[is_crowd]] = 0
        return counts

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction."""
        return {"centre_auc": 0.5}

    def probe(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of each draw of training images, by probe and labels.

        `centre_auc` is the probability that a patch with an object center of a class has higher odds of the class than
        a patch without. `centre_ap` is the average precision of the patches ranked by these odds. It depends on the
        share of patches with a center, and is therefore comparable on the same grid only. Both are means over the
        classes of the test images.
        """
        train = self.features(backbone, "train", image_size, folder, **loading)
        test = self.features(backbone, "test", image_size, folder, **loading)
        known, wanted = self.centres("train", train.shape[1:3]), self.centres("test", test.shape[1:3])
        counted = wanted.any(-1)
        # Windows of an image, and images of a scene, are resampled together.
        cases = np.unique([place.case for place in self.samples["test"].places], return_inverse=True)[1]
        number, case_of_patch = cases.max() + 1, cases[np.nonzero(counted)[0]]
        repeats = [np.bincount(draw, minlength=number) for draw in resample(number, number=BOX_RESAMPLES)]
        scores = {}
        for labels, subsets in draws.items():
            heads = [fit_linear(train, known, used, self.l2, backbone.model.device) for used in subsets]
            found = [np.stack([head(torch.tensor(maps)).cpu().numpy() for maps in test]) for head in heads]
            scores["linear", labels] = [
                self._score(logits[counted], wanted[counted], case_of_patch, repeats) for logits in found
            ]
        return scores

    def _score(
        self, logits: np.ndarray, wanted: np.ndarray, case_of_patch: np.ndarray, repeats: list[np.ndarray]
    ) -> Scores:
        areas, precisions, resampled = {}, {}, []
        for label, name in enumerate(self.names):
            is_center = wanted[:, label] > 0
            if is_center.any() and not is_center.all():
                odds = log_odds(logits, label)
                areas[name] = area_under_curve(odds, is_center)
                precisions[name] = average_precision(odds, is_center)
                if self.intervals:
                    resampled.append(weighted_areas(odds, is_center, (number[case_of_patch] for number in repeats)))
        if not areas:
            raise ValueError("The test images need patches with and without object centers of at least one class.")
        scores = {}
        for key, values in (("centre_auc", areas), ("centre_ap", precisions)):
            scores |= {key: float(np.mean(list(values.values())))}
            scores |= {f"{key}/{name}": value for name, value in values.items()}
        if not self.intervals:
            return Scores(scores)
        means = mean_of_counted(np.array(resampled), axis=0).tolist()
        return Scores(scores, Score(scores[self.main_score], means, len(repeats[0])))

    def features(self, backbone: Backbone, role: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`, float32 `(images, rows, columns, width)`."""
        samples, spec = copy.copy(self.samples[role]), backbone.reading(self.data.input_spec)
        samples.spec = None if spec is None else InputSpec.from_dict(spec)
        places = [(place.image, place.window) for place in samples.places]
        images = [image for image, _ in places] if samples.rows is None else samples.rows
        return extract_maps(
            backbone,
            len(samples),
            samples.image,
            self.depths,
            image_size,
            state_of(images, samples.column, places, spec),
            folder,
            description=f"{backbone.name}, {role}",
            **loading,
        )
