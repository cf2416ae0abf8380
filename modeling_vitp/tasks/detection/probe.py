"""Probe of boxes: a linear layer that predicts whether a patch contains the center of an object of a class."""

import copy
import logging
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ...images.seen import report_images
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
    options = ("depths",)
    reads_patches = True

    def __init__(
        self,
        data: DetectionData,
        splits: Mapping[str, str],
        l2: float,
        depths: int = 1,
        intervals: bool = False,
    ):
        if splits["train"] == splits["test"]:
            raise ValueError(f"train_split and test_split must differ, got {splits['train']!r}.")
        data.check_disjoint(list(splits.values()), "horizontal")
        self.data = data
        self.l2 = l2
        self.depths = depths
        self.intervals = intervals
        self.names = data.names.names
        self.samples = {role: data.open([name], "horizontal") for role, name in splits.items()}
        for samples in self.samples.values():
            for place in samples.places:
                if place.objects is None:
                    raise ValueError(f"No annotation found for {place.id}.")
        self.objects = {role: self._objects(role, name) for role, name in splits.items()}
        has_images = self.presence.any(0)
        classes_without_images = list(compress(self.names, ~has_images))
        if classes_without_images:
            logger.warning("No training images found for the classes %s.", classes_without_images)

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data`, whose classes and splits are inferred from its root if they are not given."""
        data = DetectionData.from_dict(DetectionData.complete(args.data))
        splits = {"train": args.train_split, "test": args.test_split}
        return cls(data, splits, args.l2, args.depths, args.intervals)

    def _objects(self, role: str, split: str) -> list[ImageObjects]:
        """Return the objects whose center is in each sample, in pixels of the sample, not clipped to a window."""
        places = self.samples[role].places
        if any(place.window is not None for place in places):
            whole_images = self.data.without_tiles().open([split], "horizontal").places
        else:
            whole_images = places
        objects_of_image = {place.image: place.objects for place in whole_images}
        objects_of_samples = []
        for place in places:
            objects = objects_of_image[place.image].moved_to(*place.start)
            centers = objects.corners.mean(1)
            is_inside = (centers >= 0) & (centers < place.extent)
            objects_of_samples.append(objects.take(is_inside.all(1)))
        return objects_of_samples

    @property
    def presence(self) -> np.ndarray:
        presence = np.zeros((len(self.samples["train"]), len(self.names)), dtype=bool)
        for index, objects in enumerate(self.objects["train"]):
            labels = objects.labels[~objects.crowd]
            presence[index, labels] = True
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
        grid_rows, grid_columns = grid
        samples = self.samples[role]
        counts = np.zeros((len(samples), grid_rows, grid_columns, len(self.names) + 1), dtype=np.float32)
        for image_counts, place, objects in zip(counts, samples.places, self.objects[role]):
            relative_centers = objects.corners.mean(1) / place.extent
            patches = np.floor(relative_centers * [grid_columns, grid_rows]).astype(int)
            columns, rows = patches.T
            is_single = ~objects.crowd
            # Unlike `+=`, `add.at` counts every one of several centers in one patch.
            places_of_centers = (
                rows[is_single],
                columns[is_single],
                objects.labels[is_single],
            )
            np.add.at(image_counts, places_of_centers, 1)
            has_center = image_counts.any(-1)
            image_counts[..., -1] = ~has_center
            image_counts[rows[objects.crowd], columns[objects.crowd]] = 0
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
        device = backbone.model.device
        train_features = self.features(backbone, "train", image_size, folder, **loading)
        test_features = self.features(backbone, "test", image_size, folder, **loading)
        train_counts = self.centres("train", train_features.shape[1:3])
        test_counts = self.centres("test", test_features.shape[1:3])
        is_scored = test_counts.any(-1)
        # Windows of an image, and images of a scene, are resampled together.
        case_names = [place.case for place in self.samples["test"].places]
        unique_cases, case_of_image = np.unique(case_names, return_inverse=True)
        image_of_patch = np.nonzero(is_scored)[0]
        case_of_patch = case_of_image[image_of_patch]
        number = len(unique_cases)
        repeats = [np.bincount(draw, minlength=number) for draw in resample(number, number=BOX_RESAMPLES)]
        scores = {}
        for labels, subsets in draws.items():
            scores["linear", labels] = []
            for subset in subsets:
                head = fit_linear(train_features, train_counts, subset, self.l2, device)
                logits = np.stack([head(torch.tensor(maps)).cpu().numpy() for maps in test_features])
                scores_of_draw = self._score(logits[is_scored], test_counts[is_scored], case_of_patch, repeats)
                scores["linear", labels].append(scores_of_draw)
        return scores

    def _score(
        self,
        logits: np.ndarray,
        counts: np.ndarray,
        case_of_patch: np.ndarray,
        repeats: list[np.ndarray],
    ) -> Scores:
        """Return the scores of patches.

        Args:
            logits: logits of the classes, `(patches, classes + 1)`.
            counts: numbers of centers, see [`centres`].
            case_of_patch: index of the case of each patch.
            repeats: how often each case is in each resample.
        """
        areas = {}
        precisions = {}
        resampled_areas = []
        for label, name in enumerate(self.names):
            has_center = counts[:, label] > 0
            if not has_center.any() or has_center.all():
                continue
            odds = log_odds(logits, label)
            areas[name] = area_under_curve(odds, has_center)
            precisions[name] = average_precision(odds, has_center)
            if self.intervals:
                weights = (repeats_of_case[case_of_patch] for repeats_of_case in repeats)
                resampled_areas.append(weighted_areas(odds, has_center, weights))
        if not areas:
            raise ValueError("The test images need patches with and without object centers of at least one class.")
        scores = {}
        for key, scores_of_classes in (("centre_auc", areas), ("centre_ap", precisions)):
            scores[key] = float(np.mean(list(scores_of_classes.values())))
            for name, score in scores_of_classes.items():
                scores[f"{key}/{name}"] = score
        if not self.intervals:
            return Scores(scores)
        means = mean_of_counted(np.array(resampled_areas), axis=0).tolist()
        number_of_cases = len(repeats[0])
        return Scores(scores, Score(scores[self.main_score], means, number_of_cases))

    def features(
        self,
        backbone: Backbone,
        role: str,
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`, float32 `(images, rows, columns, width)`."""
        samples = copy.copy(self.samples[role])
        spec = backbone.reading(self.data.input_spec)
        samples.spec = None if spec is None else InputSpec.from_dict(spec)
        if role == "train":
            report_images(len(samples), samples.source, samples.spec)
        images = []
        images_and_windows = []
        for place in samples.places:
            images.append(place.image)
            images_and_windows.append((place.image, place.window))
        if samples.rows is not None:
            images = samples.rows
        state = state_of(images, samples.column, images_and_windows, spec)
        return extract_maps(
            backbone,
            len(samples),
            samples.image,
            self.depths,
            image_size,
            state,
            folder,
            description=f"{backbone.name}, {role}",
            **loading,
        )
