"""Images with their classes: files, or rows of a `datasets` data set."""

import io
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

import datasets
import numpy as np
import torch

from ..images.pixels import on_one_grid, to_pixels
from ..images.reading import Picture, check_whole, read_image, read_picture
from ..input_spec import InputSpec
from ..instructions.rows import content_of, undecoded
from ..training.files import FileSample
from .classes import Label, encode
from .table import divided

USUAL = {"image": ("image", "images", "img"), "label": ("label", "labels", "class", "fine_label")}


class ClassifiedImages(torch.utils.data.Dataset):
    """Samples of one image with its class or classes.

    An item is a dictionary: `id`; `image`, see [`~modeling_vitp.images.pixels.to_pixels`]; and `label`,
    see [`~modeling_vitp.classification.classes.encode`].

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

    def check_whole(self, index: int) -> None:
        """Raises an error, of many kinds, if what is stored is no whole image, see
        [`~modeling_vitp.images.reading.check_whole`]."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        try:
            image = to_pixels(self.read(index), self.spec)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"{self.where(index)}: the image cannot be read: {error}") from error
        return {"id": self.id(index), "image": image, "label": self.labels[index]}


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

    def paths(self) -> list[Path]:
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
        stored, known = labels_of(rows, label, name)
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


def labels_of(
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
