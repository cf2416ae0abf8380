"""Probes of classes of images: nearest neighbors and a linear layer."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers.image_utils import ChannelDimension

from ..hub.failures import retry
from ..images.pixels import to_pixels
from ..images.reading import image_files
from ..input_spec import InputSpec
from ..instructions.rows import load_images
from ..instructions.sources import folder_cache
from ..training.fine_tuning_data import check_no_shared_images, images_of_rows
from .backbones import Backbone, extract
from .few_labels import Labels
from .heads import fit_linear, nearest_neighbours


@dataclass
class Classification:
    """Classes of images, probed by nearest neighbors and a linear layer.

    Args:
        rows, labels, names: see [`~modeling_vitp.probing.classification.open_splits`].
        where: the data set, for errors.
        image_column: name of the column of images.
        input_spec: for all backbones; without it each reads images by its own.
        pooling: the feature of an image: `mean` (of the patch tokens), `cls`, or both, `cls_mean`.
        num_neighbours, temperature: see [`~modeling_vitp.probing.heads.nearest_neighbours`].
        l2: see [`~modeling_vitp.probing.heads.fit_linear`].
    """

    rows: dict[str, datasets.Dataset]
    labels: dict[str, np.ndarray]
    names: list[str]
    where: str
    image_column: str
    input_spec: dict | None
    pooling: str
    num_neighbours: int
    temperature: float
    l2: float

    shown = "accuracy"  # of the scores
    control_name = "largest class, whatever the image"

    @classmethod
    def open(cls, name: str, config: str | None, splits: dict, **settings) -> "Classification":
        opened = open_splits(name, config, image_column=settings["image_column"], **splits)
        return cls(*opened, name, **settings)

    @property
    def presence(self) -> np.ndarray:
        return np.eye(len(self.names), dtype=bool)[self.labels["train"]]

    def control(self) -> dict[str, float]:
        """Return the scores of always answering the most frequent class of the training images."""
        return self.scores(np.full(len(self.labels["test"]), np.bincount(self.labels["train"]).argmax()))

    def scores(self, predicted: np.ndarray) -> dict[str, float]:
        """`accuracy`, and `mean_class_accuracy` over the classes that the test has."""
        right = predicted == self.labels["test"]
        classes = [right[self.labels["test"] == label].mean() for label in np.unique(self.labels["test"])]
        return {"accuracy": float(right.mean()), "mean_class_accuracy": float(np.mean(classes))}

    def probe(
        self, backbone: Backbone, draws: dict[Labels, list[np.ndarray]], image_size: int | None, folder: Path, **loading
    ) -> dict[tuple[str, Labels], list[dict[str, float]]]:
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
        """Return the features of a split, `train` or `test`: float32 of shape `(images, width)`."""
        rows, spec = self.rows[split], backbone.reading(self.input_spec)
        return extract(
            backbone,
            LabelledImages(rows, f"{self.where}, {split}", self.image_column, spec),
            lambda pixels: backbone.pool(pixels, self.pooling),
            image_size,
            f"{rows._fingerprint} {self.image_column} {spec} {self.pooling}",
            folder,
            description=f"{backbone.name}, {split}",
            **loading,
        )


logger = logging.getLogger(__name__)


class LabelledImages(torch.utils.data.Dataset):
    """Images of the rows of a `datasets` data set; see [`~modeling_vitp.images.pixels.to_pixels`].

    Args:
        rows: with a column of images, which are not decoded yet.
        where: the data set and its split, for errors.
        image_column: its name.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].
    """

    def __init__(self, rows: datasets.Dataset, where: str, image_column: str, input_spec: dict | None = None):
        self.rows, self.where, self.column = rows, where, image_column
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the row and its file, for errors."""
        stored = self.rows[index][self.column]
        path = stored.get("path") if isinstance(stored, dict) else None
        return f"{self.where}, row {index}" + (f" ({path})" if path else "")

    def __getitem__(self, index: int) -> torch.Tensor:
        stored = self.rows[index][self.column]
        try:
            (image,) = load_images({"image": stored}, self.spec)
            return to_pixels(image, self.spec, ChannelDimension.FIRST)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name(index)}: {error}") from error


def open_splits(
    name: str,
    config: str | None,
    train_split: str,
    test_split: str,
    test_share: float | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> tuple[dict[str, datasets.Dataset], dict[str, np.ndarray], list[str]]:
    """
    Args:
        name: Hub id, or a folder with Parquet files or with images as `split/class/name.png`.
        config: the data set's configuration, if it has several.
        test_share: where there is no test split, the share of `train_split` that is held out, of each class.

    Returns:
        Under `train` and `test`, the rows, with images undecoded, and their classes, int64 of shape `(rows,)`; and the
        names of the classes that training has.

    Raises:
        ValueError: if the data set, a split or a column is not there, a row has no class, or a class of the test is
            not in training.
    """
    cache = folder_cache(Path(name)) if Path(name).is_dir() else None
    wanted = [train_split] if test_share is not None else [train_split, test_split]
    # A class may be called train_station, which is no split.
    are_folders = all((Path(name) / split).is_dir() for split in wanted)
    files = {split: f"{split}/**" for split in wanted} if are_folders else None
    try:
        splits = retry(partial(datasets.load_dataset, name, config, data_files=files, cache_dir=cache))
    except (OSError, ValueError) as error:
        raise ValueError(f"The data set {name} cannot be opened: {str(error).splitlines()[0]}") from error
    for split in wanted:
        if split not in splits:
            raise ValueError(
                f"{name} has no split {split!r}, only {sorted(splits)}: give train_split and test_split, or test_share "
                "to hold out a part."
            )
        for role, column in (("image", image_column), ("label", label_column)):
            if column not in splits[split].column_names:
                stray = misplaced(Path(name), wanted) if are_folders and role == "label" else None
                if stray is not None:
                    raise ValueError(
                        f"{stray} is not at SPLIT/CLASS/NAME in {name}, so its class is not known: move it."
                    )
                raise ValueError(
                    f"{name} has no column {column!r}, only {splits[split].column_names}: give {role}_column."
                )
        if not isinstance(splits[split].features[image_column], datasets.Image):
            raise ValueError(f"The column {image_column!r} of {name} is no column of images.")
    opened = [splits[split].cast_column(image_column, datasets.Image(decode=False)) for split in wanted]
    if train_split == test_split and test_share is None:
        raise ValueError(f"Split {train_split!r} is trained and tested on: give another test_split, or test_share.")
    stored = [values_of(rows, label_column, f"{name}, split {split!r}") for rows, split in zip(opened, wanted)]
    names = sorted(set(stored[0]), key=lambda value: (str(type(value)), value))
    index = {value: place for place, value in enumerate(names)}
    unknown = sorted({str(value) for value in stored[-1] if value not in index})
    if unknown:
        raise ValueError(f"{name}: the classes {unknown} of split {test_split!r} have no image in {train_split!r}.")
    labels = [np.array([index[value] for value in values], dtype=np.int64) for values in stored]
    if len(names) < 2:
        raise ValueError(f"{name}, split {train_split!r}, has images of one class alone, {names[0]!r}.")
    if test_share is None:
        try:
            stored = {split: (rows, [image_column]) for split, rows in zip(wanted, opened)}
            check_no_shared_images(images_of_rows(stored))
        except ValueError as error:
            logger.warning("%s is probed with images of its training: %s", name, str(error).partition(": take it")[0])
    else:
        train, test = hold_out(labels[0], test_share)
        lost = [str(names[place]) for place in np.setdiff1d(labels[0], labels[0][train])]
        if lost:
            raise ValueError(f"{name}: test_share={test_share} leaves no image of the classes {lost} to train on.")
        if not len(test):
            raise ValueError(f"{name}: test_share={test_share} is less than an image of any class, to test on.")
        opened = [opened[0].select(train), opened[0].select(test)]
        labels = [labels[0][train], labels[0][test]]
    roles = ("train", "test")
    return dict(zip(roles, opened)), dict(zip(roles, labels)), [str(value) for value in names]


def misplaced(folder: Path, splits: list[str]) -> Path | None:
    """Return the first image that is not directly in the folder of a class."""
    places = ((folder / split, path) for split in splits for path in image_files(folder / split))
    return next((path for split, path in places if len(path.relative_to(split).parts) != 2), None)


def values_of(rows: datasets.Dataset, column: str, where: str) -> list:
    """Return the label of each row; the name of the class if the data set has names."""
    feature, values = rows.features[column], rows[column]
    for place, value in enumerate(values):
        if value is None or (isinstance(feature, datasets.ClassLabel) and value < 0):
            raise ValueError(f"{where}, row {place}, has no {column}.")
        if isinstance(value, (list, dict)) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{where}, row {place}: {column} is {str(value)[:80]}, but one class is needed.")
    return feature.int2str(list(values)) if isinstance(feature, datasets.ClassLabel) else list(values)


def hold_out(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the images to train and to test on, `share` of each class, by a draw that does not depend on the seed.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"test_share={share} must be above 0 and below 1.")
    order = np.random.default_rng(0).permutation(len(labels))
    test = [order[labels[order] == label] for label in np.unique(labels)]
    test = np.sort(np.concatenate([images[: int(share * len(images) + 0.5)] for images in test]))
    return np.setdiff1d(np.arange(len(labels)), test), test
