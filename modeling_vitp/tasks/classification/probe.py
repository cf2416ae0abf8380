"""Probes of image classes: nearest neighbors and a linear layer."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ...images.reading import image_files
from ...input_spec import InputSpec
from ...metrics.resampling import Score, Scores, resample_mean
from ...probing.arguments import ProbeArguments
from ...probing.backbones import Backbone, extract, state_of
from ...probing.base import Probe
from ...probing.few_labels import FewLabels
from ...probing.heads import fit_linear, nearest_neighbours
from .data import ClassificationData, ClassifiedImages, FileImages


@dataclass
class ClassificationProbe(Probe):
    """Probing task of image classes, with nearest neighbors and a linear layer.

    Args:
        samples: images under `train` and `test`, see [`open_samples`].
        names: names of the classes.
        input_spec: input spec for all backbones; by default each backbone uses its own.
        pooling: feature of an image: `mean` (of the patch tokens), `cls`, or both, `cls_mean`.
        num_neighbours, temperature: see [`~modeling_vitp.probing.heads.nearest_neighbours`].
        l2: weight decay, see [`~modeling_vitp.probing.heads.fit_linear`].
        intervals: whether scores have resamples, for intervals.
    """

    samples: dict[str, ClassifiedImages]
    names: list[str]
    input_spec: dict | None
    pooling: str
    num_neighbours: int
    temperature: float
    l2: float
    intervals: bool = False

    main_score = "accuracy"
    title = "accuracy"
    control_name = "most frequent class"
    options = ("pooling", "num_neighbours", "temperature")

    def __post_init__(self):
        self.labels = {role: samples.labels.numpy() for role, samples in self.samples.items()}
        self.cases = self.samples["test"].cases

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data` or `dataset_name`.

        Raises:
            ValueError: if images have several classes, or the splits are the same.
        """
        settings = (args.pooling, args.num_neighbours, args.temperature, args.l2, args.intervals)
        if args.data is None:
            columns = (args.image_column, args.label_column)
            samples, names = open_samples(
                args.dataset_name, args.dataset_config, args.train_split, args.test_split, args.test_share, *columns
            )
            return cls(samples, names, args.input_spec, *settings)
        data = ClassificationData.from_dict(args.data)
        if data.multi_label:
            raise ValueError("Probes need one class for each image, but `data` has multi_label: true.")
        if args.train_split == args.test_split:
            raise ValueError(f"train_split and test_split must differ, got {args.train_split!r}.")
        names = data.find_classes([args.train_split])
        data.check_disjoint([args.train_split, args.test_split])
        samples = {"train": data.open([args.train_split]), "test": data.open([args.test_split])}
        return cls(samples, names, data.input_spec, *settings)

    @property
    def presence(self) -> np.ndarray:
        return np.eye(len(self.names), dtype=bool)[self.labels["train"]]

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction: the most frequent class of the training images."""
        return self.scores(np.full(len(self.labels["test"]), np.bincount(self.labels["train"]).argmax()))

    def scores(self, predicted: np.ndarray) -> Scores:
        """Return `accuracy`, and `mean_class_accuracy` over the classes of the test images."""
        right = predicted == self.labels["test"]
        classes = [right[self.labels["test"] == label].mean() for label in np.unique(self.labels["test"])]
        scores = {"accuracy": float(right.mean()), "mean_class_accuracy": float(np.mean(classes))}
        if not self.intervals:
            return Scores(scores)
        resampled = resample_mean(right, self.cases).tolist()
        return Scores(scores, Score(scores["accuracy"], resampled, len(set(self.cases))))

    def probe(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of each draw of training images, by probe and labels."""
        train, test = (self.features(backbone, split, image_size, folder, **loading) for split in ("train", "test"))
        one_hot, device = self.presence.astype(np.float32), backbone.model.device
        results = {}
        for labels, subsets in draws.items():
            for used in subsets:
                known = (train[used], self.labels["train"][used])
                settings = (len(self.names), self.num_neighbours, self.temperature, device)
                neighbours = nearest_neighbours(*known, test, *settings)
                linear = fit_linear(train, one_hot, used, self.l2, device)(torch.tensor(test)).argmax(-1).cpu().numpy()
                for probe, predicted in ((f"{self.num_neighbours}-NN", neighbours), ("linear", linear)):
                    results.setdefault((probe, labels), []).append(self.scores(predicted))
        return results

    def features(self, backbone: Backbone, split: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the features of a split, `train` or `test`, float32 `(images, width)`."""
        samples, spec = copy.copy(self.samples[split]), backbone.reading(self.input_spec)
        samples.spec = None if spec is None else InputSpec.from_dict(spec)
        return extract(
            backbone,
            len(samples),
            samples.image,
            lambda pixels: backbone.pool(pixels, self.pooling),
            image_size,
            state_of(samples.files_or_rows(), getattr(samples, "column", None), spec, self.pooling),
            folder,
            description=f"{backbone.name}, {split}",
            **loading,
        )


def open_samples(
    name: str,
    config: str | None,
    train_split: str,
    test_split: str,
    test_share: float | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> tuple[dict[str, ClassifiedImages], list[str]]:
    """Return the labeled training and test images, under `train` and `test`, and the names of the classes.

    Args:
        name: Hub id, or folder with Parquet files or with images at `SPLIT/CLASS/NAME`.
        config: configuration of the data set.
        train_split, test_split: names of the splits.
        test_share: share of each class of `train_split` that is held out and used instead of `test_split`.
        image_column, label_column: columns of the data set.

    Raises:
        ValueError: If the data set, a split or a column is not found, a row has no class, or a class of the test images
            has no training images.
    """
    wanted = [train_split] if test_share is not None else [train_split, test_split]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"train_split and test_split must differ, got {train_split!r}. Change one or set test_share.")
    files = {Path(name) / split: image_files(Path(name) / split) for split in wanted}
    if all(files.values()):
        for folder, paths in files.items():
            stray = [path for path in paths if path.parent.parent != folder]
            if stray:
                raise ValueError(f"Expected images at SPLIT/CLASS/NAME in {name}, got {stray[0]}. Move the file.")
        source = {"root": name}
    else:
        columns = {"image": image_column, "label": label_column}
        source = {"dataset_name": name, "dataset_config": config, "columns": columns}
    data = ClassificationData(**source, allow_shared_images=True)
    names = data.find_classes([train_split])
    opened = [data.open([split]) for split in wanted]
    data.check_disjoint(wanted)
    if test_share is not None:
        train, test = hold_out(opened[0].labels.numpy(), opened[0].cases, test_share)
        opened = [opened[0].subset(kept).set_classes(names, False) for kept in (train, test)]
        if not len(test):
            raise ValueError(f"{name}: test_share={test_share} holds out no test images. Increase it.")
        parts = dict(zip(("train", "held out"), opened))
        if isinstance(opened[0], FileImages):
            data.check_files({role: part.samples for role, part in parts.items()})
        else:
            data.check_rows({role: (part.rows, [part.column]) for role, part in parts.items()})
    trained, tested = (np.bincount(part.labels, minlength=len(names)) for part in opened)
    unknown = [names[label] for label in np.flatnonzero((tested > 0) & (trained == 0))]
    if unknown:
        raise ValueError(f"{name}: no training images found for the classes {unknown} of the test images.")
    new_labels = torch.from_numpy(np.cumsum(trained > 0) - 1)
    for part in opened:
        part.labels = new_labels[part.labels]
    names = [names[label] for label in np.flatnonzero(trained)]
    if len(names) < 2:
        raise ValueError(f"{name}, split {train_split!r}: expected at least two classes, got {names}.")
    return dict(zip(("train", "test"), opened)), names


def hold_out(labels: np.ndarray, cases: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of training and test images: a random `share` of each class, with a fixed seed, is for testing.

    The images of a patient or another case stay together. The class of a case is that of its first image.
    """
    images_of = {}
    for index, case in enumerate(cases):
        images_of.setdefault(case, []).append(index)
    groups = [*images_of.values()]
    labels = labels[[images[0] for images in groups]]
    order = np.random.default_rng(0).permutation(len(groups))
    of_class = [order[labels[order] == label] for label in np.unique(labels)]
    held = np.concatenate([chosen[: int(share * len(chosen) + 0.5)] for chosen in of_class])
    test = np.sort(np.array([index for group in held for index in groups[group]], int))
    return np.setdiff1d(np.arange(len(cases)), test), test
