"""A data set as a configuration describes it: splits, classes, and how files or rows are read."""

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..hub.failures import retry
from ..images.pixels import on_one_grid, to_pixels
from ..images.reading import Picture, check_whole, image_files, read_image, read_picture
from ..input_spec import InputSpec
from ..instructions.rows import content_of, undecoded
from ..instructions.sources import folder_cache
from ..training.arguments import check_type
from ..training.fine_tuning_data import (
    CASES,
    FIELD,
    DataSettings,
    FileSample,
    check_shared_cases,
    find_samples,
    parts_of,
)

Label = str | int  # the name of a class, or its place among the classes


USUAL = {"image": ("image", "images", "img"), "label": ("label", "labels", "class", "fine_label")}


SEPARATORS = {".csv": ",", ".tsv": "\t"}
CLASS = "class"  # the field of a pattern that is the class
MOST_SHOWN = 3

logger = logging.getLogger(__name__)


def names_of(stored: Sequence[Sequence[Label]]) -> list[str]:
    """The classes that images have, in the order of their names; numbers are all places up to the largest."""
    found = {label for labels in stored for label in labels}
    numbers = [label for label in found if isinstance(label, Integral)]
    return sorted(found - {*numbers}) or [str(place) for place in range(max(numbers, default=-1) + 1)]


def encode(
    stored: Sequence[Sequence[Label]], names: Sequence[str], multi_label: bool, where: Callable[[int], str]
) -> torch.Tensor:
    """The classes of images as a model takes them.

    Args:
        stored: the classes of each image: one, or with `multi_label` any number.
        names: of all classes, in the order of the model.
        where: what an image is called in errors, by its place.

    Returns:
        int64 of shape `(images,)`; with `multi_label` float32 of shape `(images, classes)`, 1 for a class that an image
        has and 0 for the others.

    Raises:
        ValueError: names the first image whose classes are not as they should be.
    """
    places = {name: place for place, name in enumerate(names)}
    encoded = torch.zeros(len(stored), len(names))
    for index, labels in enumerate(stored):
        if len(labels) != 1 and not multi_label:
            kind = "has no class" if not labels else f"has {len(labels)} classes, {', '.join(map(str, labels))}"
            raise ValueError(f"{where(index)} {kind}: give one, or set `multi_label: true` in `data`.")
        for label in labels:
            place = label if isinstance(label, Integral) else places.get(label)
            if place is None or not 0 <= place < len(names):
                shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
                kind = f"the class {label!r}" if place is None else f"the label {label}"
                raise ValueError(
                    f"{where(index)} has {kind}, which is none of the {len(names)} classes that are trained on, from "
                    f"0: {shown}. Take it out, put images of it into training, or list it in `classes`."
                )
            encoded[index, place] = 1
    return encoded if multi_label else encoded.argmax(1)


def count(labels: torch.Tensor, names: Sequence[str]) -> dict[str, int]:
    """Images of each class, by name."""
    counts = labels.sum(0).long() if labels.ndim == 2 else labels.bincount(minlength=len(names))
    return dict(zip(names, counts.tolist()))


def check_trained(trained: Mapping[str, int], scored: Mapping[str, int], split: str, is_listed: bool) -> None:
    """Looks whether classes of images to score have images to train on.

    Args:
        trained, scored: images of each class, by name.
        split: that is scored.
        is_listed: whether the user has listed the classes, so that one without images is meant; it is only logged.

    Raises:
        ValueError: names the classes.
    """
    unknown = [name for name, number in scored.items() if number and not trained[name]]
    if unknown:
        said = f"Split {split!r} has images of the class(es) {', '.join(unknown)}, and no image to train on has these."
        if not is_listed:
            raise ValueError(f"{said} Take them out, put some into training, or list all `classes` in `data`.")
        logger.warning("%s", said)


def divided(value: object, separator: str | None = None) -> list[Label]:
    """What a column has for an image as the list of its classes; of nothing, an empty one."""
    if isinstance(value, str):
        parts = [value] if separator is None else value.split(separator)
        return [part.strip() for part in parts if part.strip()]
    if hasattr(value, "__len__"):
        return list(value)
    if value is None or value != value:  # NaN stands for an empty field
        return []
    if int(value) != value:
        raise ValueError(f"{value} is no class: give whole numbers, or names.")
    return [int(value)]


class ClassifiedImages(torch.utils.data.Dataset):
    """Samples of one image with its class or classes.

    An item is a dictionary: `id`; `image`, see [`~modeling_vitp.images.pixels.to_pixels`]; and `label`,
    see [`~modeling_vitp.classification.data.encode`].

    Args:
        stored: the classes of each image, as they are stored.
        known: the names of all classes, where the data set tells them.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].

    Attributes:
        labels: of all images, once [`set_classes`] has been called.
    """

    labels: torch.Tensor

    def __init__(self, stored: Sequence[Sequence[Label]], known: Sequence[str] | None, input_spec: dict | None):
        self.stored, self.known = list(stored), known
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        return len(self.stored)

    def set_classes(self, names: Sequence[str], multi_label: bool) -> "ClassifiedImages":
        """Takes the classes of the images as those of a model; numbers of which the data set tells the names, by these
        unless none of them is the model's.
        """
        stored = self.stored
        if self.known is not None and not set(self.known).isdisjoint(names):
            stored = [[self.known[one] if isinstance(one, Integral) else one for one in labels] for labels in stored]
        self.labels = encode(stored, names, multi_label, self.where)
        return self

    def id(self, index: int) -> str:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """What an image is called in errors."""
        raise NotImplementedError

    def read(self, index: int) -> Picture:
        raise NotImplementedError

    def files_or_rows(self) -> Any:
        """Return the paths or rows that the samples are read from."""
        return self.rows

    def check_whole(self, index: int) -> None:
        """Raises an error, of many kinds, if what is stored is no whole image, see
        [`~modeling_vitp.images.reading.check_whole`]."""
        raise NotImplementedError

    def image(self, index: int) -> torch.Tensor:
        """Return the pixels of an image without its label."""
        try:
            return to_pixels(self.read(index), self.spec)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"{self.where(index)}: the image cannot be read: {error}") from error

    def __getitem__(self, index: int) -> dict:
        return {"id": self.id(index), "image": self.image(index), "label": self.labels[index]}


class FileImages(ClassifiedImages):
    """Files; of several files for a sample, each is a band. Bands with names may have pixels of different size: all are
    brought onto the grid of the one that has most.
    """

    def __init__(self, samples: Sequence[FileSample], stored: Sequence[Sequence[Label]], input_spec: dict | None):
        super().__init__(stored, None, input_spec)
        self.samples = list(samples)

    def id(self, index: int) -> str:
        return self.samples[index].id

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
            raise ValueError(f"its bands are of shapes {', '.join(str(array.shape) for array in arrays)}")
        return np.stack(arrays, axis=-1)

    def check_whole(self, index: int) -> None:
        for path in self.samples[index].images:
            with path.open("rb") as file:
                check_whole(file)

    def files_or_rows(self) -> list[Path]:
        return [path for sample in self.samples for path in sample.images]

    def subset(self, kept: Sequence[int]) -> "FileImages":
        self.samples = [self.samples[index] for index in kept]
        self.stored = [self.stored[index] for index in kept]
        return self


class RowImages(ClassifiedImages):
    """Rows of a `datasets` data set, of the Hub or of a folder.

    Args:
        rows: with a column of images and one of classes, and optionally `id` and `case`.
        columns: under `image` and `label` their names, if they are not among the usual ones; `label` may be the columns
            of all classes, with 1 for those that an image has and 0 for the others.
        name: of the split, for errors.
    """

    def __init__(self, rows: datasets.Dataset, input_spec: dict | None, columns: Mapping | None, name: str):
        self.name = name
        self.column = find_column(rows, "image", columns, name)
        label = find_column(rows, "label", columns, name)
        if not isinstance(rows.features[self.column], datasets.Image):
            raise ValueError(f"Split {name!r}: the column {self.column!r} is no column of images.")
        self.rows = rows.cast(undecoded(rows.features))
        stored, known = stored_labels(rows, label, name)
        super().__init__(stored, known, input_spec)

    def id(self, index: int) -> str:
        return str(self.rows[index]["id"]) if "id" in self.rows.column_names else str(index)

    def where(self, index: int) -> str:
        path = self.rows[index][self.column].get("path")
        return f"Row {index} of split {self.name!r}" + (f" ({path})" if path else "")

    def read(self, index: int) -> Picture:
        return read_picture(content_of(self.rows[index][self.column]), self.spec)

    def check_whole(self, index: int) -> None:
        check_whole(io.BytesIO(content_of(self.rows[index][self.column])))

    def subset(self, kept: Sequence[int]) -> "RowImages":
        self.rows = self.rows.select(kept)
        self.stored = [self.stored[index] for index in kept]
        return self


def find_column(rows: datasets.Dataset, role: str, columns: Mapping | None, name: str) -> str | list[str]:
    """The column of a role, or for classes the list of columns that is given."""
    given = (columns or {}).get(role)
    wanted = USUAL[role] if given is None else [given] if isinstance(given, str) else given
    found = [column for column in wanted if column in rows.column_names]
    if given is not None and not isinstance(given, str) and len(found) == len(wanted):
        return found
    if not found or len(found) < len(wanted) and given is not None:
        missing = sorted(set(wanted) - set(found)) if given is not None else role
        raise ValueError(f"Split {name!r} has no column {missing}, only {rows.column_names}: name it in `columns`.")
    return found[0]


def stored_labels(
    rows: datasets.Dataset, column: str | Sequence[str], name: str
) -> tuple[list[list[Label]], list[str] | None]:
    """The classes of each row, as they are stored; and the names of all, where the columns tell them."""
    if not isinstance(column, str):
        table = np.array([rows[one] for one in column], dtype=object)
        wrong = np.argwhere(~np.isin(table.astype(str), ["0", "1", "False", "True", "0.0", "1.0"]))
        if len(wrong):
            place, row = wrong[0]
            raise ValueError(f"Row {row} of split {name!r}: {column[place]} is {table[place, row]!r}, and not 0 or 1.")
        return [[one for one, value in zip(column, values) if float(value)] for values in table.T], list(column)
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    stored = [divided(value) for value in rows[column]]
    if not isinstance(feature, datasets.ClassLabel):
        return stored, None
    for row, labels in enumerate(stored):
        wrong = [label for label in labels if not -1 <= label < len(feature.names)]
        if wrong:
            raise ValueError(f"Row {row} of split {name!r} has the label {wrong[0]}, of {len(feature.names)} names.")
    # -1 stands for a row without a class.
    return [[label for label in labels if label != -1] for labels in stored], list(feature.names)


@dataclass(frozen=True)
class LabelTable:
    """The `table` of a configuration's data.

    Args:
        file: below the root of the data set.
        name: the column that says which image a row is of: the path of its file below the root, the file's name, with
            or without its ending, or the value of a field of the pattern, which several files may share.
        label: the column of its class, or of its classes, in a list or as text with `separator` between them; or the
            columns of all classes, with 1 for those that it has and 0 for the others.
        separator: between the classes of a text.
        no_class: what the text is where an image has none of the classes; nothing may be empty then.
    """

    file: str
    name: str = "file_name"
    label: str | Sequence[str] = "label"
    separator: str | None = None
    no_class: str | None = None

    def read(self, root: Path) -> pd.DataFrame:
        """All rows.

        Raises:
            ValueError: if the file cannot be read, or has no such column.
        """
        path = root / self.file
        suffix = path.suffix.lower()
        if suffix not in (*SEPARATORS, ".parquet"):
            raise ValueError(f"table: {path} is none of {', '.join(SEPARATORS)}, .parquet.")
        try:
            if suffix == ".parquet":
                rows = pd.read_parquet(path)
            else:  # names may be numbers with zeros before them, and a class be called None
                as_they_are = {"dtype": {self.name: str}, "keep_default_na": False, "na_values": [""]}
                rows = pd.read_csv(path, sep=SEPARATORS[suffix], **as_they_are)
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise ValueError(f"table: {path} cannot be read: {error}") from error
        for column in (self.name, *([self.label] if isinstance(self.label, str) else self.label)):
            if column not in rows.columns:
                only = ", ".join(map(str, rows.columns))
                hint = " Save it with commas between its columns." if len(rows.columns) == 1 and ";" in only else ""
                raise ValueError(f"table: {path} has no column {column!r}, only {only}.{hint}")
        return rows

    def labels_of(
        self,
        samples: Sequence[FileSample],
        root: Path,
        where: Mapping | None,
        split: str,
        taken: dict[int, tuple[str | None, Path]],
    ) -> tuple[list[FileSample], list[list[Label]]]:
        """Samples with a row, and the classes of each.

        Args:
            where: values of columns by name, if only rows that have them are of the split; samples without such a row
                are not of it then.
            taken: the first file of each row, and the field that names it, if any; those of `samples` come to those of
                other splits.

        Raises:
            ValueError: names what has no row, or no file, and a row of which it cannot be told what file it names.
        """
        rows = self.read(root)
        for column, value in (where or {}).items():
            if column not in rows.columns:
                raise ValueError(f"Split {split!r}: where: {root / self.file} has no column {column!r}.")
            values = rows[column].astype(str)
            if pd.api.types.is_float_dtype(rows[column]):  # whole numbers too, where some are missing
                values = values.str.removesuffix(".0")
            known, rows = values.drop_duplicates().tolist(), rows[values == str(value)]
            if rows.empty:
                raise ValueError(
                    f"Split {split!r}: where: no row of {root / self.file} has {value!r} in {column!r}, but "
                    f"{', '.join(map(repr, known[:10]))}."
                )
        names = rows[self.name].astype(str)
        if names.duplicated().any():
            raise ValueError(f"table: {root / self.file} has {names[names.duplicated()].iloc[0]!r} in several rows.")
        stored = dict(zip(names, zip(rows.index, self._labels(rows, root))))
        kept, labels, used = [], [], set()
        for sample in samples:
            path = sample.images[0]
            names = path.relative_to(root).as_posix(), path.name, path.stem, sample.id
            cases = [(field, sample.fields[field]) for field in CASES if field in sample.fields]
            keys = (*cases, *((None, name) for name in names), *sample.fields.items())
            field, key = next((item for item in keys if item[1] in stored), (None, None))
            if key is not None:
                row, classes = stored[key]
                kept.append(sample)
                labels.append(classes)
                used.add(key)
                first_field, first = taken.setdefault(row, (field, path))
                if first != path and (field is None or field != first_field):
                    raise ValueError(
                        f"table: {root / self.file}, row {row}: {key!r} could be {first} or {path}: give "
                        "paths of files, or call the field that files of one row share `patient` or `case`."
                    )
            elif where is None:
                raise ValueError(f"{path} has no row in {root / self.file}: add one, or take the file out.")
        if where is not None and len(used) < len(stored):
            name, (row, _) = next(item for item in stored.items() if item[0] not in used)
            raise ValueError(f"table: {root / self.file}, row {row}: no file of split {split!r} is called {name!r}.")
        return kept, labels

    def _labels(self, rows: pd.DataFrame, root: Path) -> list[list[Label]]:
        if isinstance(self.label, str):
            stored = []
            for row, value in zip(rows.index, rows[self.label].tolist()):
                try:
                    stored.append(divided(value, self.separator))
                except ValueError as error:
                    raise ValueError(f"table: {root / self.file}, row {row}: {error}") from error
                if self.no_class is not None and not stored[-1]:
                    raise ValueError(
                        f"table: {root / self.file}, row {row}: {self.label!r} is empty: give {self.no_class!r} if it "
                        "has none of the classes, or take the row out."
                    )
            return [[label for label in labels if label != self.no_class] for labels in stored]
        values = rows[list(self.label)]
        odd = ~values.isin([0, 1]).all(axis=1)
        if odd.any():
            raise ValueError(f"table: {root / self.file}, row {odd.idxmax()}: a class is told by 0 or 1.")
        return [[name for name, value in zip(self.label, row) if value] for row in values.to_numpy()]


@dataclass(kw_only=True)
class ClassificationData(DataSettings):
    """The `data` of a configuration, see [`DataSettings`].

    Args:
        splits: of files, what [`find_samples`] takes, with the class as the field `{class}`, or `where` with values of
            columns of the `table`; a split that is not here is `NAME/{class}/{name}.*`, where a name may have dots. Of
            `dataset_name`, what `datasets` calls the split, by default the same.
        classes: their names, in the order of the model. If not given, what the data set knows, or else what the images
            to train on have, in the order of their names.
        multi_label: whether an image may have any number of classes.
        columns: see [`RowImages`].
        table: the classes of files, see [`LabelTable`].
        bad_images: `"raise"`, a file that is no image, or of JPEG or PNG is cut off, is an error; `"skip"`, it is left
            out, and how many are is said. Rows are looked at only to skip them.
    """

    choices = {"bad_images": ("raise", "skip")}

    classes: Sequence[str] | None = None
    multi_label: bool = False
    table: Mapping | None = None
    bad_images: str = "raise"

    def __post_init__(self):
        super().__post_init__()
        if self.classes is not None and len(set(self.classes)) < max(len(self.classes), 2):
            raise ValueError(f"data: classes={list(self.classes)}: give two or more, each once.")
        self.is_listed = self.classes is not None
        self._opened: dict[str, ClassifiedImages] = {}
        self._taken: dict[int, tuple[str | None, Path]] = {}  # rows of the table

    def find_classes(self, train_splits: Sequence[str], of_model: Sequence[str] | None = None) -> list[str]:
        """The names of the classes, which are then those of this data set.

        Args:
            train_splits: what is trained on, if anything is.
            of_model: the classes of a fine-tuned model, which apply where nothing is listed and trained on.

        Raises:
            ValueError: if there are fewer than two, or none are known.
        """
        if self.classes is None and not train_splits:
            if of_model is None:
                raise ValueError("do_train is false, and neither the model nor `classes` in `data` names classes.")
            self.classes = list(of_model)
        if self.classes is None:
            parts = [self.open_split(name) for name in train_splits]
            known = next((part.known for part in parts if part.known is not None), None)
            names = known or names_of([labels for part in parts for labels in part.stored])
            if len(names) < (1 if self.multi_label else 2):
                raise ValueError(f"Split {train_splits[0]!r} has images of too few classes, {names}: two are needed.")
            self.classes = names
        return list(self.classes)

    def open(self, names: Sequence[str]) -> Dataset:
        """Return the samples of one or several splits, whose labels are all read, and so checked. Needs the classes,
        see [`find_classes`].
        """
        samples = super().open(names)
        for part in parts_of(samples):
            part.set_classes(self.classes, self.multi_label)
        return samples

    def _open(self, name: str) -> ClassifiedImages:
        if name not in self._opened:
            samples = self._read_files(name) if self.root is not None else self._read_rows(name)
            self._opened[name] = self._without_bad(samples, name)
        return self._opened[name]

    def _read_rows(self, name: str) -> RowImages:
        folder = Path(self.dataset_name)
        cache = folder_cache(folder) if folder.is_dir() else None
        split = self.splits.get(name, name)
        open_rows = partial(datasets.load_dataset, self.dataset_name, self.dataset_config, cache_dir=cache, split=split)
        return RowImages(retry(open_rows), self.input_spec, self.columns, name)

    def _read_files(self, name: str) -> FileImages:
        root = Path(self.root)
        settings = self.splits.get(name, {"image": f"{name}/{{{CLASS}}}/{{name:[^/]+}}.*"})
        settings = dict(settings) if isinstance(settings, Mapping) else settings
        where = settings.pop("where", None) if isinstance(settings, dict) else None
        samples = find_samples(root, settings, name)
        if self.table is not None:
            check_type("data: table", self.table, Mapping[str, str | Sequence[str]])
            unknown = sorted(set(self.table) - set(LabelTable.__dataclass_fields__))
            if unknown or "file" not in self.table:
                raise ValueError(f"data: table: unknown {unknown}; it has {sorted(LabelTable.__dataclass_fields__)}.")
            samples, stored = LabelTable(**self.table).labels_of(samples, root, where, name, self._taken)
            return FileImages(samples, stored, self.input_spec)
        if CLASS not in samples[0].fields:
            raise ValueError(f"Split {name!r}: nothing says the class: give the field {{{CLASS}}}, or a `table`.")
        check_folders(root, settings["image"], samples)
        return FileImages(samples, [[sample.fields[CLASS]] for sample in samples], self.input_spec)

    def _without_bad(self, samples: ClassifiedImages, name: str) -> ClassifiedImages:
        if self.root is None and self.bad_images == "raise":
            return samples
        wrong = {}
        for index in tqdm(range(len(samples)), desc=f"files of {name}", disable=None):
            try:
                samples.check_whole(index)
            except Exception as error:  # Pillow raises many kinds
                wrong[index] = f"{samples.where(index)} is no image that can be read: {error}."
                if self.bad_images == "raise":
                    raise ValueError(
                        f"{wrong[index]} Mend it or take it out, or leave such files out: `bad_images: skip` in `data`."
                    ) from error
        if not wrong:
            return samples
        logger.warning("%s: %d file(s) are left out: %s", name, len(wrong), " ".join([*wrong.values()][:MOST_SHOWN]))
        return samples.subset([index for index in range(len(samples)) if index not in wrong])

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if two of the splits share an image, under whatever name, a patient or a case."""
        if len(names) < 2:
            return
        parts = {name: self.open_split(name) for name in names}
        if self.root is not None:
            self.check_files({name: part.samples for name, part in parts.items()})
            return
        if len({self.splits.get(name, name) for name in names}) < len(names):
            raise ValueError(f"Two of the splits {list(names)} are the same.")
        known = {name: [case for case in CASES if case in part.rows.column_names] for name, part in parts.items()}
        check_shared_cases({name: parts[name].rows[columns[0]] for name, columns in known.items() if columns})
        self.check_rows({name: (part.rows, [part.column]) for name, part in parts.items()})


def check_folders(root: Path, pattern: str | Sequence[str], samples: Sequence[FileSample]) -> None:
    """Raises a `ValueError` that names a folder of a class without an image."""
    before, found, after = (pattern if isinstance(pattern, str) else pattern[0]).partition(f"{{{CLASS}}}")
    if not found or not after.startswith("/") or FIELD.search(before) or "*" in before:
        return
    classes = {sample.fields[CLASS] for sample in samples}
    for folder in sorted((root / before).iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in classes:
            if not image_files(folder):
                raise ValueError(f"The folder of the class {folder.name!r} has no image: {folder}. Fill or remove it.")


logger = logging.getLogger(__name__)
