"""Image classification data sets that are described by a configuration: splits, classes, files or rows."""

import copy
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ...command.settings import from_mapping
from ...data.files import FIELD, FileSample, find_samples, hold_out, read_split
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, ChangePairs, ClassLayout, ClassTable, Masks, layouts_of, recognize_layout
from ...data.rows import cases_of_rows, check_image_columns, content_of, encoded_rows, find_columns, missing_column
from ...data.settings import DataSettings, parts_of
from ...data.tables import Label, LabelTable, Unknown, divided, labels_of_columns
from ...images.pixels import on_one_grid, to_pixels
from ...images.reading import Picture, check_whole, image_files, read_image, read_picture
from ...input_spec import InputSpec

USUAL = {"image": ("image", "images", "img"), "label": ("label", "labels", "class", "fine_label")}
CLASS = "class"  # Field of a path pattern that holds the class name.
MOST_SHOWN = 3
MOST_CLASSES = 100_000
UNKNOWN = -100  # Label of a class that an image may or may not have.

logger = logging.getLogger(__name__)


def names_of(stored: Sequence[Sequence[Label]]) -> list[str]:
    """Return the sorted class names of images. Integer labels give the names "0" to the largest label.

    Raises:
        ValueError: if an integer label is too large for a class index.
    """
    labels = set()
    for image_labels in stored:
        labels.update(image_labels)
    indices = {label for label in labels if isinstance(label, Integral)}
    largest_index = max(indices, default=-1)
    if largest_index >= MOST_CLASSES:
        raise ValueError(
            f"Expected class indices below {MOST_CLASSES}, got the label {largest_index}. Use class names."
        )
    names = sorted(labels - indices)
    return names or [str(index) for index in range(largest_index + 1)]


def encode(
    stored: Sequence[Sequence[Label]], names: Sequence[str], multi_label: bool, where: Callable[[int], str]
) -> torch.Tensor:
    """Convert the classes of images to label tensors.

    Args:
        stored: classes of each image: exactly one, or any number with `multi_label`.
        names: names of all classes, in the order of the model.
        where: function from the index of an image to its name in errors.

    Returns:
        Class indices, int64 of shape `(images,)`. With `multi_label`, float32 of shape `(images, classes)`, 1 for the
        classes of an image, -100 for an [`Unknown`] class and 0 for the others.

    Raises:
        ValueError: if an image has an unknown class or a wrong number of classes.
    """
    class_indices = {name: index for index, name in enumerate(names)}
    encoded = torch.zeros(len(stored), len(names))
    for row, labels in enumerate(stored):
        check_number_of_labels(labels, multi_label, where(row))
        for label in labels:
            class_index = label if isinstance(label, Integral) else class_indices.get(label)
            if class_index is None or not 0 <= class_index < len(names):
                first_names = ", ".join(names[:10])
                if len(names) > 10:
                    first_names += " …"
                unknown_label = f"class {label!r}" if class_index is None else f"label {label}"
                raise ValueError(
                    f"{where(row)} has the unknown {unknown_label}. The {len(names)} training classes, from 0: "
                    f"{first_names}. Remove the image, add training images of the class, or list it in `classes`."
                )
            encoded[row, class_index] = UNKNOWN if isinstance(label, Unknown) else 1
    return encoded if multi_label else encoded.argmax(1)


def check_number_of_labels(labels: Sequence[Label], multi_label: bool, where: str) -> None:
    """Raise a `ValueError` if the labels of an image are 1 or 0 for each class, or not one without `multi_label`."""
    has_repeated_labels = len(set(labels)) < len(labels)
    if has_repeated_labels and set(labels) <= {0, 1}:
        class_indices = [index for index, label in enumerate(labels) if label]
        raise ValueError(
            f"{where} has 1 or 0 for each class, {labels}, expected the indices of its classes, {class_indices}. Store "
            "these instead."
        )
    if len(labels) != 1 and not multi_label:
        classes = ", ".join(map(str, labels))
        problem = f"has {len(labels)} classes, {classes}" if labels else "has no class"
        raise ValueError(f"{where} {problem}. Give exactly one, or set `multi_label: true` in `data`.")


def count(labels: torch.Tensor, names: Sequence[str]) -> dict[str, int]:
    """Return the number of images of each class, by class name."""
    if labels.ndim == 2:
        counts = (labels == 1).sum(0)
    else:
        counts = labels.bincount(minlength=len(names))
    return dict(zip(names, counts.tolist()))


def check_trained(trained: Mapping[str, int], scored: Mapping[str, int], split: str, is_listed: bool) -> None:
    """Check that the classes of an evaluation split have training images.

    Args:
        trained, scored: number of training and evaluation images of each class, by class name.
        split: name of the evaluation split.
        is_listed: whether the user has listed the classes. If so, a class without training images is only logged.

    Raises:
        ValueError: if a class of the evaluation split has no training images.
    """
    untrained_classes = [name for name, number in scored.items() if number and not trained[name]]
    if untrained_classes:
        message = f"Split {split!r} has images of classes without training images: {', '.join(untrained_classes)}."
        if not is_listed:
            raise ValueError(f"{message} Remove them, add training images, or list all `classes` in `data`.")
        logger.warning("%s", message)


class ClassifiedImages(torch.utils.data.Dataset):
    """Base class of image classification data sets, single-label or multi-label.

    An item is a dictionary with `id`, `image` (see [`~modeling_vitp.images.pixels.to_pixels`]) and `label`
    (see [`~modeling_vitp.tasks.classification.data.encode`]).

    Args:
        ids: id of each image.
        cases: case of the metrics that each image belongs to: its patient, scene or itself.
        stored: classes of each image, as stored in the data set.
        known: names of all classes, if the data set defines them.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].

    Attributes:
        labels: labels of all images. Available after a call of [`set_classes`].
    """

    labels: torch.Tensor

    def __init__(
        self,
        ids: Sequence[str],
        cases: Sequence[str],
        stored: Sequence[Sequence[Label]],
        known: Sequence[str] | None,
        input_spec: dict | None,
    ):
        self.ids = list(ids)
        self.cases = list(cases)
        self.stored = list(stored)
        self.known = known
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        return len(self.stored)

    def subset(self, chosen: Sequence[int]) -> Self:
        """Return a data set with the images at the given indices."""
        subset = copy.copy(self)
        for name in ("ids", "cases", "stored"):
            setattr(subset, name, [getattr(self, name)[index] for index in chosen])
        return subset

    def set_classes(self, names: Sequence[str], multi_label: bool) -> Self:
        """Encode the labels in the class order of a model, and return the data set.

        If the data set defines class names and the model has at least one of them, integer labels are matched by name.
        Otherwise integer labels are class indices of the model.
        """
        stored = self.stored
        if self.known is not None and not set(self.known).isdisjoint(names):
            stored = [self.names_of(labels) for labels in stored]
        self.labels = encode(stored, names, multi_label, self.where)
        return self

    def names_of(self, labels: Sequence[Label]) -> list[Label]:
        """Return the labels of an image with the names that the data set defines in place of integers."""
        return [self.known[label] if isinstance(label, Integral) else label for label in labels]

    def where(self, index: int) -> str:
        """Return the name of an image in errors."""
        raise NotImplementedError

    def read(self, index: int) -> Picture:
        raise NotImplementedError

    def source(self, index: int) -> Picture:
        """Return an image for [`~modeling_vitp.images.seen.describe_images`]."""
        return self.read(index)

    def files_or_rows(self) -> Any:
        """Return the paths or rows that the samples are read from."""
        return self.rows

    def check_whole(self, index: int) -> None:
        """Raise an error if a stored image is truncated or invalid, see [`~modeling_vitp.images.reading.check_whole`].

        The type of the error depends on the decoder.
        """
        raise NotImplementedError

    def image(self, index: int) -> torch.Tensor:
        """Return the pixels of an image without its label."""
        try:
            return to_pixels(self.read(index), self.spec)
        except Exception as error:  # Pillow raises many error types for a broken file.
            raise ValueError(f"{self.where(index)}: the image cannot be read: {error}") from error

    def __getitem__(self, index: int) -> dict:
        return {
            "id": self.ids[index],
            "case": self.cases[index],
            "image": self.image(index),
            "label": self.labels[index],
        }


class FileImages(ClassifiedImages):
    """Image files with their classes.

    If a sample has several files, each file is one band. Named bands may differ in resolution; all are resampled to the
    grid of the band with the most pixels.
    """

    def __init__(self, samples: Sequence[FileSample], stored: Sequence[Sequence[Label]], input_spec: dict | None):
        ids = [sample.id for sample in samples]
        cases = [sample.case for sample in samples]
        super().__init__(ids, cases, stored, known=None, input_spec=input_spec)
        self.samples = list(samples)

    def where(self, index: int) -> str:
        return str(self.samples[index].images[0])

    def read(self, index: int) -> Picture:
        bands = [read_image(path, None, self.spec) for path in self.samples[index].images]
        if len(bands) == 1:
            return bands[0]
        arrays = [np.asarray(band) for band in bands]
        if self.spec is not None and self.spec.band_names is not None:
            arrays = on_one_grid(arrays)
        if any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(f"expected bands of one shape (height, width), got {shapes}")
        return np.stack(arrays, axis=-1)

    def check_whole(self, index: int) -> None:
        for path in self.samples[index].images:
            with path.open("rb") as file:
                check_whole(file)

    def files_or_rows(self) -> list[Path]:
        paths = []
        for sample in self.samples:
            paths += sample.images
        return paths

    def subset(self, chosen: Sequence[int]) -> Self:
        subset = super().subset(chosen)
        subset.samples = [self.samples[index] for index in chosen]
        return subset


class RowImages(ClassifiedImages):
    """Rows of a `datasets` data set, from the Hub or from a folder.

    Args:
        rows: data set with an image column, a label column, and optionally `id` and `patient` or `case`.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        columns: names of the `image` and `label` columns, if they are not the usual ones. `label` may be a list with
            one column per class, 1 for the classes of an image and 0 for the others.
        name: name of the split in errors.
        label_values: see [`ClassificationData`].
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        input_spec: dict | None,
        columns: Mapping | None,
        name: str,
        label_values: Mapping | None = None,
    ):
        self.name = name
        columns_by_role = find_columns(rows.column_names, USUAL, columns or {}, name)
        for role in USUAL:
            if role not in columns_by_role:
                raise missing_column(rows.column_names, role, name)
        self.column = columns_by_role["image"]
        check_image_columns(rows, [self.column], name)
        self.rows = encoded_rows(rows)
        stored, known = stored_labels(rows, columns_by_role["label"], name, label_values)
        self.numbers = range(len(rows))  # Of the rows in the data set, also in a subset.
        row_names = [str(number) for number in self.numbers]
        ids = [str(row_id) for row_id in rows["id"]] if "id" in rows.column_names else row_names
        cases = cases_of_rows(rows) or row_names
        super().__init__(ids, cases, stored, known, input_spec)

    def where(self, index: int) -> str:
        row = f"Row {self.numbers[index]} of split {self.name!r}"
        path = self.stored_image(index).get("path")
        return f"{row} ({path})" if path else row

    def stored_image(self, index: int) -> dict:
        return self.rows[index][self.column] or {}  # An empty cell is an image without content, an error.

    def read(self, index: int) -> Picture:
        return read_picture(content_of(self.stored_image(index)), self.spec)

    def check_whole(self, index: int) -> None:
        check_whole(io.BytesIO(content_of(self.stored_image(index))))

    def subset(self, chosen: Sequence[int]) -> Self:
        subset = super().subset(chosen)
        subset.rows = self.rows.select(chosen)
        subset.numbers = [self.numbers[index] for index in chosen]
        return subset


def stored_labels(
    rows: datasets.Dataset, column: str | Sequence[str], name: str, label_values: Mapping | None
) -> tuple[list[list[Label]], list[str] | None]:
    """Return the classes of each row, and the names of all classes if the columns define them."""
    if not isinstance(column, str):
        table = pd.DataFrame({label: rows[label] for label in column})
        labels = labels_of_columns(table, label_values, lambda row: f"Row {row} of split {name!r}")
        return labels, list(column)
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    stored = [divided(value) for value in rows[column]]
    if not isinstance(feature, datasets.ClassLabel):
        return stored, None
    known_labels = []
    for row, labels in enumerate(stored):
        for label in labels:
            if not -1 <= label < len(feature.names):
                raise ValueError(
                    f"Row {row} of split {name!r}: expected a label below {len(feature.names)}, the number of class "
                    f"names, got {label}."
                )
        # The label -1 marks a row without a class.
        known_labels.append([label for label in labels if label != -1])
    return known_labels, list(feature.names)


@dataclass(kw_only=True)
class ClassificationData(DataSettings):
    """Classification settings in `data` of a configuration, see [`DataSettings`].

    Args:
        splits: settings of each split. For files: arguments of [`find_samples`] with the class as the field `{class}`,
            or with `where`, column values that select rows of the `table`, and `table`, settings of the table that
            differ for the split. A split that is not listed is `NAME/{class}/{name}.*`, where a name may contain dots.
            For `dataset_name`: name of the split in `datasets`, by default the same name.
        classes: class names in the order of the model. Default: the names that the data set defines, or else the sorted
            class names of the training images.
        multi_label: whether an image may have any number of classes.
        columns: column names, see [`RowImages`].
        table: table with the labels of the files, see [`LabelTable`].
        label_values: what other cells than 1 and 0 mean if `label` is a list of columns: 1, 0, or `None` if the label
            is unknown. Unknown labels are left out of the loss and the scores. The cell "" is an empty one.
        bad_images: `"raise"` raises an error for a file that is not an image, and for a truncated JPEG or PNG; `"skip"`
            leaves such files out and logs their number. Rows of `dataset_name` are checked with `"skip"` only.
    """

    roles = tuple(USUAL)

    classes: Sequence[str] | None = None
    multi_label: bool = False
    table: Mapping | None = None
    label_values: Mapping[str | int | float, int | None] | None = None
    bad_images: Literal["raise", "skip"] = "raise"

    def __post_init__(self):
        super().__post_init__()
        if self.classes is not None and len(set(self.classes)) < max(len(self.classes), 2):
            raise ValueError(f"`classes` must be two or more distinct names, got {list(self.classes)}.")
        columns = (self.table or self.columns or {}).get("label")
        if self.label_values and (not self.multi_label or columns is None or isinstance(columns, str)):
            raise ValueError("`label_values` needs `multi_label: true` and a list of columns as `label`.")
        if not {*(self.label_values or {}).values()} <= {1, 0, None}:
            raise ValueError(f"Expected the values 1, 0 and null in `label_values`, got {self.label_values}.")
        self.is_listed = self.classes is not None
        self._opened: dict[str, ClassifiedImages] = {}
        self._taken: dict[str, dict[int, tuple[str | None, Path]]] = {}  # Rows of each table that belong to a file.

    @classmethod
    def from_dict(cls, settings):
        return super().from_dict(cls.complete(settings) if isinstance(settings, Mapping) else settings)

    @classmethod
    def complete(cls, settings):
        """Return the settings; if they have a root with a table of classes only, with those of the table.

        Folders of classes need no settings: a split that is not listed is `NAME/{class}/{name}.*`.
        """
        root = settings.get("root")
        is_described = "splits" in settings or "table" in settings
        if is_described or not isinstance(root, str):
            return dict(settings)
        tables = layouts_of(ClassTable)
        # Other labels of the folder precede. They are searched in all of its files, and so only if it has a table.
        if recognize_layout(root, tables) is None or recognize_layout(root) not in tables:
            return dict(settings)
        completed = super().complete(settings)
        splits = completed["splits"]
        logger.info("Found in %s: the table %s, splits %s.", root, completed["table"]["file"], ", ".join(splits))
        for name, split in splits.items():
            if "part" in split:
                share = split["part"][1] - split["part"][0]
                logger.info("Split %s has %.0f%% of the images, by a hash of their names.", name, 100 * share)
        return completed

    @classmethod
    def infer(cls, root):
        name = recognize_layout(root, layouts_of(ClassLayout))
        if name is None:
            raise cls.unknown_layout(root, "a folder for each class, or a table with the classes of the images")
        settings = {"root": str(root), **LAYOUTS[name](root).data_settings()}
        if settings["splits"].keys() in ({"train"}, {UNSPLIT}):
            (split,) = settings["splits"].values()
            whole_data = cls(**{**settings, "splits": {"train": split}})
            settings["splits"] = hold_out(split, whole_data._read_files("train").cases)
        return settings

    def find_classes(self, train_splits: Sequence[str], of_model: Sequence[str] | None = None) -> list[str]:
        """Return the class names, and use them as the classes of this data set.

        Args:
            train_splits: names of the training splits, may be empty.
            of_model: classes of a fine-tuned model, used if no classes are listed and there are no training splits.

        Raises:
            ValueError: if fewer than two classes are found.
        """
        if self.classes is None and not train_splits:
            if of_model is None:
                raise ValueError(
                    "No class names found. Without training, use a fine-tuned classifier or list `classes` in `data`."
                )
            self.classes = list(of_model)
        if self.classes is None:
            names = None
            labels = []
            for split in train_splits:
                samples = self.open_split(split)
                names = names or samples.known
                labels += samples.stored
            names = names or names_of(labels)
            least_number = 1 if self.multi_label else 2
            if len(names) < least_number:
                raise ValueError(f"Split {train_splits[0]!r}: expected images of at least two classes, got {names}.")
            self.classes = names
        return list(self.classes)

    def open(self, names: Sequence[str]) -> Dataset:
        """Return the samples of one or several splits. All labels are read and checked.

        Call [`find_classes`] first.
        """
        samples = super().open(names)
        for split_samples in parts_of(samples):
            split_samples.set_classes(self.classes, self.multi_label)
        return samples

    def _open(self, name: str) -> ClassifiedImages:
        if name not in self._opened:
            if self.root is not None:
                samples = self._read_files(name)
            else:
                rows = self.load_rows(self.splits.get(name, name))
                samples = RowImages(rows, self.input_spec, self.columns, name, self.label_values)
            self._opened[name] = self._without_bad(samples, name)
        return self._opened[name]

    def _read_files(self, name: str) -> FileImages:
        root = Path(self.root)
        folders_of_classes = {"image": f"{name}/{{{CLASS}}}/{{name:[^/]+}}.*"}
        settings = self.splits.get(name, folders_of_classes)
        if name not in self.splits and recognize_layout(root, layouts_of(Masks, ChangePairs)):
            raise ValueError(
                f"Expected folders of classes in {root}, found images with masks. Use vitp finetune_segmentation or "
                "vitp finetune_change_detection."
            )
        where = None
        table_changes = {}
        if isinstance(settings, Mapping):
            settings = dict(settings)
            where = settings.pop("where", None)
            table_changes = settings.pop("table", {})
        samples = find_samples(root, settings, name, use_part=self.table is None)
        if self.table is not None:
            return self._read_table(samples, settings, where, table_changes, name)
        if CLASS not in samples[0].fields:
            raise ValueError(f"Split {name!r} has no labels. Use the field {{{CLASS}}} in the pattern, or a `table`.")
        check_folders(root, settings["image"], samples)
        labels = [[sample.fields[CLASS]] for sample in samples]
        return FileImages(samples, labels, self.input_spec)

    def _read_table(
        self,
        samples: Sequence[FileSample],
        settings: Mapping[str, Any] | str,
        where: Mapping[str, Any] | None,
        table_changes: Mapping[str, Any],
        name: str,
    ) -> FileImages:
        """Return the files of a split with the labels of the table.

        Args:
            samples: files that match the pattern of the split.
            settings: settings of the split, without those of the table.
            where: column values that select rows.
            table_changes: settings of the table that differ for the split.
            name: name of the split.
        """
        table = from_mapping(LabelTable, {**self.table, **table_changes}, "data: table")
        table = replace(table, file=table.file.replace("{split}", name))
        taken_rows = self._taken.setdefault(table.file, {})
        is_partial = isinstance(settings, dict) and "list" in settings
        samples, labels = table.labels_of(
            samples, Path(self.root), where, name, taken_rows, self.label_values, is_partial
        )
        images = FileImages(samples, labels, self.input_spec)
        split = read_split(settings, name)  # The table may have the patients, which are not divided.
        images = images.subset([index for index, case in enumerate(images.cases) if split.has_case(case)])
        if not images:
            raise ValueError(f"Split {name!r} has no sample left after `part`.")
        return images

    def _without_bad(self, samples: ClassifiedImages, name: str) -> ClassifiedImages:
        if self.root is None and self.bad_images == "raise":
            return samples
        problems = []
        readable = []
        for index in tqdm(range(len(samples)), desc=f"files of {name}", disable=None):
            try:
                samples.check_whole(index)
                readable.append(index)
            except Exception as error:  # Pillow raises many error types.
                problem = f"{samples.where(index)} cannot be read as an image: {error}."
                if self.bad_images == "raise":
                    raise ValueError(
                        f"{problem} Repair or remove it. Fine-tuning skips such files by `bad_images: skip` in `data`."
                    ) from error
                problems.append(problem)
        if not problems:
            return samples
        first_problems = " ".join(problems[:MOST_SHOWN])
        logger.warning("Split %s: skipping %d unreadable image(s): %s", name, len(problems), first_problems)
        return samples.subset(readable)

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if two of the splits share an image, even under different names, a patient or a case."""
        if len(names) < 2:
            return
        splits = {name: self.open_split(name) for name in names}
        if self.root is not None:
            self.check_files({name: images.samples for name, images in splits.items()})
        else:
            self.check_splits({name: (images.rows, [images.column]) for name, images in splits.items()})


def check_folders(root: Path, pattern: str | Sequence[str], samples: Sequence[FileSample]) -> None:
    """Raise a `ValueError` if the folder of a class has no images."""
    first_pattern = pattern if isinstance(pattern, str) else pattern[0]
    before, class_field, after = first_pattern.partition(f"{{{CLASS}}}")
    is_one_folder = not FIELD.search(before) and "*" not in before
    if not class_field or not after.startswith("/") or not is_one_folder:
        return
    classes = {sample.fields[CLASS] for sample in samples}
    for folder in sorted((root / before).iterdir()):
        is_class_folder = folder.is_dir() and not folder.name.startswith(".")
        if is_class_folder and folder.name not in classes and not image_files(folder):
            raise ValueError(f"No images in the folder of class {folder.name!r}: {folder}. Add images or remove it.")
