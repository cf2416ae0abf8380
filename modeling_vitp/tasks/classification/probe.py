"""Probes of image classes: nearest neighbors and a linear layer."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import evaluate
import numpy as np
import torch

from ...images.reading import image_files
from ...images.seen import report_images
from ...input_spec import InputSpec
from ...metrics import METRICS_FOLDER
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
        multi_label: whether an image may have any number of classes. Unknown classes are left out of the scores and of
            the loss, and have no votes.
    """

    samples: dict[str, ClassifiedImages]
    names: list[str]
    input_spec: dict | None
    pooling: str
    num_neighbours: int
    temperature: float
    l2: float
    intervals: bool = False
    multi_label: bool = False

    main_score = "accuracy"
    title = "accuracy"
    control_name = "most frequent class"
    options = ("pooling", "num_neighbours", "temperature")

    def __post_init__(self):
        self.labels = {role: samples.labels.numpy() for role, samples in self.samples.items()}
        self.cases = self.samples["test"].cases
        if self.multi_label:
            self.main_score = "mean_average_precision"
            self.title = "mean average precision"
            self.control_name = "share of each class"

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the images of `data` or `dataset_name`.

        Raises:
            ValueError: if the splits are the same, or images have several classes without `multi_label` in `data`.
        """
        multi_label = False
        if args.data is None:
            input_spec = args.input_spec
            samples, names = open_samples(
                args.dataset_name,
                args.dataset_config,
                args.train_split,
                args.test_split,
                args.test_share,
                args.columns,
            )
        else:
            data = ClassificationData.from_dict(args.data)
            if args.train_split == args.test_split:
                raise ValueError(f"train_split and test_split must differ, got {args.train_split!r}.")
            input_spec = data.input_spec
            multi_label = data.multi_label
            names = data.find_classes([args.train_split])
            data.check_disjoint([args.train_split, args.test_split])
            samples = {"train": data.open([args.train_split]), "test": data.open([args.test_split])}
        return cls(
            samples,
            names,
            input_spec,
            pooling=args.pooling,
            num_neighbours=args.num_neighbours,
            temperature=args.temperature,
            l2=args.l2,
            intervals=args.intervals,
            multi_label=multi_label,
        )

    @property
    def presence(self) -> np.ndarray:
        if self.multi_label:
            return self.labels["train"] == 1
        return np.eye(len(self.names), dtype=bool)[self.labels["train"]]

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction: the share of each class in the training images."""
        shares = self.presence.mean(axis=0)
        return self.scores(np.tile(shares, (len(self.labels["test"]), 1)))

    def scores(self, probabilities: np.ndarray) -> Scores:
        """Return `accuracy`, and `mean_class_accuracy` over the classes of the test images.

        With `multi_label`, return `mean_average_precision` and `macro_f1` of
        [`~modeling_vitp.metrics.classification.classification.Classification`].

        Args:
            probabilities: predicted probability of each class, `(images, classes)`.
        """
        labels = self.labels["test"]
        if self.multi_label:
            metric = evaluate.load(str(METRICS_FOLDER / "classification"), num_labels=len(self.names), multi_label=True)
            metric.add_batch(predictions=probabilities, references=labels, case_ids=self.cases)
            all_scores = metric.compute()
            scores = {name: all_scores[name] for name in ("mean_average_precision", "macro_f1")}
            return Scores(scores, metric.score_images() if self.intervals else None)
        is_correct = probabilities.argmax(axis=1) == labels
        accuracy = float(is_correct.mean())
        class_accuracies = [is_correct[labels == label].mean() for label in np.unique(labels)]
        scores = {"accuracy": accuracy, "mean_class_accuracy": float(np.mean(class_accuracies))}
        if not self.intervals:
            return Scores(scores)
        resampled = resample_mean(is_correct, self.cases).tolist()
        return Scores(scores, Score(accuracy, resampled, len(set(self.cases))))

    def probe(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of each draw of training images, by probe and labels."""
        train = self.features(backbone, "train", image_size, folder, **loading)
        test = self.features(backbone, "test", image_size, folder, **loading)
        counts = self.presence.astype(np.float32)
        if self.multi_label:
            counts = np.concatenate([counts, self.labels["train"] == 0], axis=1)
        device = backbone.model.device
        results = {}
        for labels, subsets in draws.items():
            neighbour_scores = []
            linear_scores = []
            for subset in subsets:
                votes = nearest_neighbours(
                    train[subset],
                    self.presence[subset],
                    test,
                    self.num_neighbours,
                    self.temperature,
                    device,
                )
                neighbour_scores.append(self.scores(votes))
                linear_layer = fit_linear(train, counts, subset, self.l2, device, multi_label=self.multi_label)
                logits = linear_layer(torch.tensor(test)).cpu()
                probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
                linear_scores.append(self.scores(probabilities.numpy()))
            results[f"{self.num_neighbours}-NN", labels] = neighbour_scores
            results["linear", labels] = linear_scores
        return results

    def features(self, backbone: Backbone, split: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the features of a split, `train` or `test`, float32 `(images, width)`."""
        spec = backbone.reading(self.input_spec)
        samples = copy.copy(self.samples[split])
        samples.spec = None if spec is None else InputSpec.from_dict(spec)
        if split == "train":
            report_images(len(samples), samples.source, samples.spec)
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
    columns: Mapping[str, str] | None = None,
) -> tuple[dict[str, ClassifiedImages], list[str]]:
    """Return the labeled training and test images, under `train` and `test`, and the names of the classes.

    Args:
        name: Hub id, or folder with Parquet files or with images at `SPLIT/CLASS/NAME`.
        config: configuration of the data set.
        train_split, test_split: names of the splits.
        test_share: share of each class of `train_split` that is held out and used instead of `test_split`.
        columns: names of the `image` and `label` columns, if they are not the usual ones.

    Raises:
        ValueError: If the data set, a split or a column is not found, a row has no class, or a class of the test images
            has no training images.
    """
    if test_share is None and train_split == test_split:
        raise ValueError(f"train_split and test_split must differ, got {train_split!r}. Change one or set test_share.")
    splits = [train_split, test_split] if test_share is None else [train_split]
    if has_class_folders(name, splits):
        data = ClassificationData(root=name, allow_shared_images=True)
    else:
        data = ClassificationData(
            dataset_name=name,
            dataset_config=config,
            columns=columns,
            allow_shared_images=True,
        )
    names = data.find_classes([train_split])
    train_images = data.open([train_split])
    if test_share is None:
        try:
            test_images = data.open([test_split])
        except ValueError as error:
            if not str(error).startswith("Unknown split"):  # of `datasets`
                raise
            raise ValueError(
                f"{name}: {error} Set test_split, or test_share to hold out a part of {train_split!r}."
            ) from error
        data.check_disjoint(splits)
    else:
        train_images, test_images = divide_images(train_images, name, names, test_share)
        check_held_out(data, train_images, test_images)
    trained_names = number_trained_classes(name, names, train_images, test_images)
    if len(trained_names) < 2:
        raise ValueError(f"{name}, split {train_split!r}: expected at least two classes, got {trained_names}.")
    return {"train": train_images, "test": test_images}, trained_names


def has_class_folders(name: str, splits: Sequence[str]) -> bool:
    """Return whether a folder has images of each split, and raise a `ValueError` if one is not at SPLIT/CLASS/NAME."""
    folders = [Path(name) / split for split in splits]
    images_by_folder = {folder: image_files(folder) for folder in folders}
    if not all(images_by_folder.values()):
        return False
    for folder, paths in images_by_folder.items():
        for path in paths:
            if path.parent.parent != folder:
                raise ValueError(f"Expected images at SPLIT/CLASS/NAME in {name}, got {path}. Move the file.")
    return True


def divide_images(
    images: ClassifiedImages,
    name: str,
    names: Sequence[str],
    test_share: float,
) -> tuple[ClassifiedImages, ClassifiedImages]:
    """Return the training and the test images of a split, of which a share of each class is held out.

    Args:
        images: images of the split.
        name: name of the data set in errors.
        names: names of the classes.
        test_share: share of each class that becomes test images.

    Raises:
        ValueError: if no image is held out.
    """
    train_indices, test_indices = hold_out(images.labels.numpy(), images.cases, test_share)
    if not len(test_indices):
        raise ValueError(f"{name}: test_share={test_share} holds out no test images. Increase it.")
    train_images = images.subset(train_indices).set_classes(names, False)
    test_images = images.subset(test_indices).set_classes(names, False)
    return train_images, test_images


def number_trained_classes(
    name: str,
    names: Sequence[str],
    train_images: ClassifiedImages,
    test_images: ClassifiedImages,
) -> list[str]:
    """Remove the classes without training images from the labels of both sets of images, and return the names left.

    Raises:
        ValueError: if test images have a class without training images. The message begins with `name`, the data set.
    """
    train_counts = np.bincount(train_images.labels, minlength=len(names))
    test_counts = np.bincount(test_images.labels, minlength=len(names))
    untrained_classes = [names[label] for label in np.flatnonzero((test_counts > 0) & (train_counts == 0))]
    if untrained_classes:
        raise ValueError(f"{name}: no training images found for the classes {untrained_classes} of the test images.")
    new_labels = torch.from_numpy(np.cumsum(train_counts > 0) - 1)
    train_images.labels = new_labels[train_images.labels]
    test_images.labels = new_labels[test_images.labels]
    return [names[label] for label in np.flatnonzero(train_counts)]


def check_held_out(data: ClassificationData, train_images: ClassifiedImages, test_images: ClassifiedImages) -> None:
    """Raise a `ValueError` if test images that are held out of a split are copies of training images."""
    if isinstance(train_images, FileImages):
        data.check_files({"train": train_images.samples, "held out": test_images.samples})
    else:
        column = train_images.column
        data.check_rows({"train": (train_images.rows, [column]), "held out": (test_images.rows, [column])})


def hold_out(labels: np.ndarray, cases: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of training and test images: a random `share` of each class, with a fixed seed, is for testing.

    The images of a patient or another case stay together. The class of a case is that of its first image.
    """
    images_by_case = {}
    for index, case in enumerate(cases):
        images_by_case.setdefault(case, []).append(index)
    images_of_cases = list(images_by_case.values())
    case_labels = labels[[images[0] for images in images_of_cases]]
    order = np.random.default_rng(0).permutation(len(images_of_cases))
    test_images = []
    for label in np.unique(case_labels):
        cases_of_class = order[case_labels[order] == label]
        num_test_cases = int(share * len(cases_of_class) + 0.5)
        for case in cases_of_class[:num_test_cases]:
            test_images += images_of_cases[case]
    test_indices = np.sort(np.array(test_images, dtype=int))
    return np.setdiff1d(np.arange(len(cases)), test_indices), test_indices
