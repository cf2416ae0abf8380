"""A data set as a configuration describes it: classes, splits, and how the files are read."""

import colorsys
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..image_processing_vitp_dense import IGNORE_INDEX
from ..images.large import ranged
from ..images.pixels import to_pixels
from ..images.reading import (
    VALUES,
    Picture,
    Window,
    check_file,
    check_upright,
    read_image,
    read_picture,
    stored_size,
    whole_numbers,
    windows,
)
from ..images.volumes import VolumeSlices, check_cut, files_of
from ..input_spec import InputSpec
from ..instructions.rows import content_of, is_decoded
from ..training.arguments import check_type, is_of
from ..training.batching import share
from ..training.fine_tuning_data import (
    CASES,
    DataSettings,
    FileSample,
    check_shared_cases,
    find_samples,
    parts_of,
)

Color = tuple[int, int, int]
SPELLINGS = {"colour": "color"}  # of keys and values in configurations
LARGEST_VALUE = (1 << 24) - 1  # in masks by value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseClass:
    """A class.

    Args:
        name: as it is saved in the model's `id2label`.
        value: of its pixels in the masks, or the first and the last of several values; by default its place among the
            classes, from 0.
        color: red, green and blue, from 0 to 255: of its pixels in masks that are coded by colour, and in pictures.
    """

    name: str
    value: int | tuple[int, int]
    color: Color


class LabelEncoding:
    """Masks as they are stored to class indices, and back.

    Args:
        classes: one mapping with `name`, `value` and `color` (see [`DenseClass`]) for each class, in the order of
            their indices. Without a colour one is chosen.
        by: `"value"`, also the index of a palette, or `"color"`.
        ignore: values or colours of the pixels without a class; of values also negative ones, as many rasters have
            them for "no data".

    Raises:
        ValueError: if the classes are not distinct, or not told completely.
    """

    def __init__(self, classes: Sequence[Mapping], by: str = "value", ignore: Sequence = ()):
        by = SPELLINGS.get(by, by)
        if by not in ("value", "color"):
            raise ValueError(f"mask_encoding={by!r} is neither 'value' nor 'color'.")
        if not 2 <= len(classes) < IGNORE_INDEX:
            raise ValueError(f"{len(classes)} classes are given; two or more are needed, background included.")
        self._negative = [item for item in ignore if by == "value" and is_of(item, int) and item < 0]
        ignore = [tuple(item) if isinstance(item, list) else item for item in ignore if item not in self._negative]
        self.by, self.ignore = by, ignore
        self.classes = []
        for index, settings in enumerate(classes):
            settings = {SPELLINGS.get(name, name): value for name, value in settings.items()}
            unknown = set(settings) - set(DenseClass.__dataclass_fields__)
            if unknown or "name" not in settings or (by == "color" and "color" not in settings):
                raise ValueError(f"Class {index}, {settings}, needs a name{', a color' * (by == 'color')}.")
            value, color = settings.get("value", index), settings.get("color", distinct_color(index, len(classes)))
            check_type(f"Class {index}: name", settings["name"], str)
            if not is_value(value) or not is_color(color):
                raise ValueError(
                    f"Class {index}, {settings}: `value` is a number from 0 to {LARGEST_VALUE}, or the first and the "
                    "last of several; `color` is red, green and blue from 0 to 255."
                )
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            self.classes.append(DenseClass(settings["name"], value, tuple(color)))
        wrong = [item for item in self.ignore if not (is_color if by == "color" else is_value)(item)]
        if wrong:
            raise ValueError(f"ignore: {str(wrong[0])[:80]!r} is no {by} of a mask.")
        repeated = {name for name in self.names if self.names.count(name) > 1}
        if repeated:
            raise ValueError(f"Two classes are called {sorted(repeated)[0]!r}.")
        self._lookup = self._table()

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.classes]

    @property
    def palette(self) -> np.ndarray:
        """The colours of the classes, uint8 of shape `(num_classes, 3)`."""
        return np.array([item.color for item in self.classes], dtype=np.uint8)

    def codes(self) -> list[tuple[int, int, int]]:
        """First code, last code and class index of all that a mask may hold; colours are coded as 0xRRGGBB."""
        if self.by == "color":
            known = [(pack(item.color), pack(item.color), index) for index, item in enumerate(self.classes)]
            return known + [(pack(color), pack(color), IGNORE_INDEX) for color in self.ignore]
        known = [(*span(item.value), index) for index, item in enumerate(self.classes)]
        return known + [(*span(value), IGNORE_INDEX) for value in self.ignore]

    def _table(self) -> dict[int, int] | np.ndarray:
        codes = self.codes()
        if self.by == "color":
            if len({first for first, _, _ in codes}) < len(codes):
                raise ValueError("Two classes, or a class and what is ignored, have one colour.")
            return {first: index for first, _, index in codes}
        table = np.full(max(last for _, last, _ in codes) + 1, -1, dtype=np.int16)
        for first, last, index in codes:
            if not 0 <= first <= last or (table[first : last + 1] != -1).any():
                raise ValueError(f"The value {first} to {last} is empty, negative, or stands for two things.")
            table[first : last + 1] = index
        return table

    def encode(self, mask: np.ndarray, name: str) -> np.ndarray:
        """A mask as class indices.

        Args:
            mask: integers of shape `(height, width)`, or colours of shape `(height, width, 3)`.
            name: of the file, for errors.

        Returns:
            uint8 of shape `(height, width)`, 255 where there is no class.

        Raises:
            ValueError: names the file and the values that stand for nothing.
        """
        if (mask.ndim == 3) != (self.by == "color"):
            kind, other = ("colours", "values") if mask.ndim == 3 else ("values", "colours")
            raise ValueError(f"The mask {name} holds {kind}, but mask_encoding says {other}.")
        if self.by == "color":
            codes = mask.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
            indices = np.full(codes.shape, -1, dtype=np.int16)
            for code, index in self._lookup.items():
                indices[codes == code] = index
        else:
            codes = mask
            inside = (codes >= 0) & (codes < len(self._lookup))
            indices = np.where(inside, self._lookup[np.where(inside, codes, 0)], -1)
            indices[np.isin(codes, self._negative)] = IGNORE_INDEX
        unknown = indices == -1
        if unknown.any():
            values = np.unique(codes[unknown])
            shown = [f"({value >> 16}, {value >> 8 & 255}, {value & 255})" for value in values[:5].tolist()]
            shown = ", ".join(shown if self.by == "color" else map(str, values[:5].tolist()))
            raise ValueError(
                f"The mask {name} has {unknown.sum()} pixel(s) of {len(values)} value(s) outside the classes: {shown}. "
                "Add them to `classes` or to `ignore`."
            )
        return indices.astype(np.uint8)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Class indices as a mask would store them: uint8 (or uint16) of shape `(height, width[, 3])`."""
        if self.by == "color":
            return self.palette[indices]
        values = [span(item.value)[1] for item in self.classes]
        return np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)[indices]


def span(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def is_value(value: object) -> bool:
    """Whether it is a code of a mask, or the first and the last of several."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return len(numbers) == (2 if numbers is value else 1) and all(
        is_of(number, int) and 0 <= number <= LARGEST_VALUE for number in numbers
    )


def is_color(color: object) -> bool:
    return isinstance(color, (list, tuple)) and len(color) == 3 and all(is_of(n, int) and 0 <= n <= 255 for n in color)


def pack(color: Color) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue


def distinct_color(index: int, number: int) -> Color:
    """Black for the first class, and hues at equal distances for the others."""
    if index == 0:
        return (0, 0, 0)
    hue = (index - 1) / (number - 1)
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.95 if index % 2 else 0.65))


class MaskedImages(torch.utils.data.Dataset):
    """Samples of one image, or two of a pair, with a mask.

    An item is a dictionary: `id`; `case`, what is scored as one where a metric is by case; `images`, see
    [`~modeling_vitp.images.pixels.to_pixels`]; and, unless there is none, `mask`, class indices, uint8 of shape
    `(height, width)`.

    Args:
        encoding: of the masks.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].
    """

    def __init__(self, encoding: LabelEncoding, input_spec: dict | None = None):
        self.encoding = encoding
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        raise NotImplementedError

    def case(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, list[tuple[str, Picture, InputSpec | None]], tuple[str, Picture] | None]:
        """The id, the images and the mask of a sample, each with its name for errors; of an image also how its values
        are read."""
        raise NotImplementedError

    def read_mask(self, index: int) -> tuple[str, Picture] | None:
        raise NotImplementedError

    def files_or_rows(self) -> Any:
        """Return the paths or rows that the samples are read from."""
        return getattr(self, "rows", None)

    def __getitem__(self, index: int) -> dict:
        name, images, mask = self.read(index)
        tensors = [self.to_pixels(*image) for image in images]
        for (image_name, *_), tensor in zip(images, tensors):
            if tensor.shape != tensors[0].shape:
                raise ValueError(f"{image_name} is {size(tensor)}, but {images[0][0]} {size(tensors[0])}.")
        item = {"id": name, "case": self.case(index), "images": tensors}
        if mask is not None:
            item["mask"] = torch.from_numpy(self.encode(mask))
            if item["mask"].shape != tensors[0].shape[-2:]:
                raise ValueError(
                    f"The mask {mask[0]} is {size(item['mask'])}, but its image {images[0][0]} {size(tensors[0])}."
                )
        return item

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask of a sample alone."""
        mask = self.read_mask(index)
        return None if mask is None else torch.from_numpy(self.encode(mask))

    def encode(self, mask: tuple[str, Picture]) -> np.ndarray:
        name, values = mask
        if isinstance(values, PIL.Image.Image):
            # By color, grey and palettes of 8 bits are colors too.
            is_plain = values.mode in (VALUES if self.encoding.by == "value" else ("I", "I;16", "I;16B", "F"))
            values = np.asarray(values if is_plain else values.convert("RGB"))
        if values.ndim == 3 and self.encoding.by == "value" and (values == values[..., :1]).all():
            values = values[..., 0]  # grey, saved with three channels
        return self.encoding.encode(whole_numbers(values, name).astype(np.int32), name)

    def to_pixels(self, name: str, image: Picture, spec: InputSpec | None) -> torch.Tensor:
        try:
            return to_pixels(image, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def size(maps: torch.Tensor) -> str:
    return f"{maps.shape[-1]} x {maps.shape[-2]} pixels"


class ImageFiles(MaskedImages):
    """Files, each read whole or in overlapping windows that are cut when they are asked for.

    Args:
        samples: the files.
        tile: `size` of square windows in pixels and their `overlap`; the last of a row ends at the image's border.
            Smaller images stay whole.
    """

    def __init__(
        self,
        samples: Sequence[FileSample],
        encoding: LabelEncoding,
        input_spec: dict | None = None,
        tile: dict | None = None,
    ):
        super().__init__(encoding, input_spec)
        self.rows: list[tuple[FileSample, Window | None]] = []
        for sample in samples:
            places = [None] if tile is None else windows(stored_size(sample.images[0]), **tile)
            self.rows += [(sample, window) for window in places]

    def __len__(self) -> int:
        return len(self.rows)

    def case(self, index: int) -> str:
        return self.rows[index][0].case

    def files_or_rows(self) -> list[Path]:
        files = {sample.id: sample for sample, _ in self.rows}
        return [path for sample in files.values() for path in (*sample.images, sample.mask) if path is not None]

    def check_files(self, name: str) -> None:
        """Reads the header and the end of every image and mask.

        Args:
            name: of the split.

        Raises:
            ValueError: names the file that is not whole, is stored with an orientation other than upright, or differs
                from the image of its sample in size.
        """
        samples = {sample.id: sample for sample, _ in self.rows}
        for sample in tqdm(samples.values(), desc=f"files of {name}", disable=None):
            first, *others = (*sample.images, *([] if sample.mask is None else [sample.mask]))
            for path in (first, *others):
                check_file(path)
                check_upright(path)
                if stored_size(path) != stored_size(first):
                    sizes = ["{1} x {0} pixels".format(*stored_size(file)) for file in (path, first)]
                    names = (f"The mask {path}", f"its image {first}") if path == sample.mask else (path, first)
                    raise ValueError(f"{names[0]} is {sizes[0]}, but {names[1]} {sizes[1]}.")

    def read(self, index: int):
        sample, window = self.rows[index]
        name = sample.id if window is None else f"{sample.id}/{window[0]}_{window[1]}"
        images = [
            (str(path), read_image(path, window, self.spec), ranged(self.spec, path, window is not None))
            for path in sample.images
        ]
        mask = self.read_mask(index)
        if mask is not None and window is not None and stored_size(sample.mask) != stored_size(sample.images[0]):
            raise ValueError(f"The mask {sample.mask} and its image {sample.images[0]} are of different size.")
        return name, images, mask

    def read_mask(self, index: int):
        sample, window = self.rows[index]
        # A mask in DICOM has the numbers of classes for its units.
        return None if sample.mask is None else (str(sample.mask), read_image(sample.mask, window, as_stored=True))


class Rows(MaskedImages):
    """Rows of a `datasets` data set, of the Hub or made from volumes.

    Args:
        rows: with columns for the images and the mask, and optionally `id` and `patient` or `case`.
        columns: names of the columns under `image` (or `before` and `after`) and `mask`, if they are not these; for
            the mask also `label`, `annotation` and `segmentation` are tried.
        name: of the split, for errors.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        encoding: LabelEncoding,
        input_spec: dict | None = None,
        columns: dict | None = None,
        name: str = "",
    ):
        super().__init__(encoding, input_spec)
        rows = rows.select_columns(rows.column_names)
        # The decoding of `datasets` would lose what 16-bit images and TIFF have more than 8-bit ones.
        rows.info.features = datasets.Features(
            {
                column: datasets.Image(decode=False) if is_decoded(feature) else feature
                for column, feature in rows.features.items()
            }
        )
        self.rows, self.name, columns = rows, name, columns or {}
        known = rows.column_names

        def column(role: str, *others: str) -> str | None:
            return columns.get(role) or next((other for other in (role, *others) if other in known), None)

        images = [column("before"), column("after")] if column("before") else [column("image")]
        self.mask_column = column("mask", "label", "annotation", "segmentation")
        self.image_columns = images
        missing = {*images, self.mask_column} - {*known, None}
        if None in images or missing:
            raise ValueError(f"Split {name!r} has no column {missing or 'image'}, only {known}: name it in `columns`.")
        self.cases = next((rows[name] for name in CASES if name in known), None)

    def __len__(self) -> int:
        return len(self.rows)

    def case(self, index: int) -> str:
        return str(index) if self.cases is None else self.cases[index]

    def read(self, index: int):
        row = self.rows[index]
        name = str(row.get("id", index))
        images = [self._picture(name, row, column) for column in self.image_columns]
        return name, images, self._mask(name, row)

    def __getitem__(self, index: int) -> dict:
        """With `place` and `spacing` of a slice, see [`~modeling_vitp.dense.data.slice_volumes`]."""
        item, of_volume = super().__getitem__(index), ["place", "spacing"]
        if not {*of_volume} <= {*self.rows.column_names}:
            return item
        return item | self.rows.select_columns(of_volume)[index]

    def read_mask(self, index: int):
        if self.mask_column is None:
            return None
        columns = [name for name in (self.mask_column, "id") if name in self.rows.column_names]
        row = self.rows.select_columns(columns)[index]
        return self._mask(str(row.get("id", index)), row)

    def _mask(self, name: str, row: dict):
        if self.mask_column is None:
            return None
        return self._picture(name, row, self.mask_column)[:2]

    def _picture(self, name: str, row: dict, column: str) -> tuple[str, Picture, InputSpec | None]:
        stored, where = row[column], f"{name} ({column})"
        if stored is None:
            raise ValueError(f"Row {name} of split {self.name!r} has no {column}.")
        if not isinstance(stored, dict):
            return where, stored, self.spec
        try:
            content = content_of(stored)
            if column == self.mask_column:
                return where, read_picture(content, as_stored=True), None
            return where, read_picture(content, self.spec), ranged(self.spec, content, False)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"Row {name} of split {self.name!r}: {column} cannot be read: {error}") from error


def slice_volumes(
    samples: Sequence[FileSample],
    encoding: LabelEncoding,
    plane: str = "axial",
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    foreground_only: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """The slices of volumes as rows with `id`, `case`, the volume's id, `image`, if there are masks `mask`, and unless
    only those with foreground are there, `place` among the slices of the volume and `spacing` (see
    [`~modeling_vitp.images.volumes.Volume.spacing`]).

    A slice is as [`~modeling_vitp.images.volumes.Volume`] cuts it.

    Args:
        samples: with one file (NIfTI, or the folder of a DICOM series), whose values become grey, or three, which
            become the channels of an image.
        encoding: by which it is told whether a slice has foreground.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value of the volume's own units, which become black and white.
        percentiles: instead, low and high in [0, 100] of each volume's values that are not 0.
        foreground_only: leaves out slices without a pixel of a class other than the first.
        num_proc: processes that cut.

    Raises:
        ValueError: names the volume that cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), is of
            another shape or place than its mask or the other channels, or has a mask that is not of whole numbers.
    """
    check_cut(plane, window, percentiles)
    features = {"id": datasets.Value("string"), "case": datasets.Value("string"), "image": datasets.Image()}
    if samples[0].mask is not None:
        features["mask"] = datasets.Image()
    if not foreground_only:
        features |= {"place": datasets.Value("int32"), "spacing": datasets.List(datasets.Value("float64"), length=3)}
    # With times of change, so that the cache is not used for files that are no longer the same.
    files = [
        (sample, [file.stat().st_mtime_ns for path in (*sample.images, sample.mask) if path for file in files_of(path)])
        for sample in samples
    ]
    settings = {"plane": plane, "window": window, "percentiles": percentiles, "foreground_only": foreground_only}
    settings |= {"classes": [(item.value, item.name) for item in encoding.classes], "ignore": encoding.ignore}
    try:
        return datasets.Dataset.from_generator(
            slices,
            features=datasets.Features(features),
            gen_kwargs={"files": files, "settings": settings},
            num_proc=min(num_proc, len(files)) if num_proc else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None


def slices(files: list[tuple[FileSample, list[int]]], settings: Mapping) -> Iterator[dict]:
    classes = [{"name": name, "value": value} for value, name in settings["classes"]]
    encoding = LabelEncoding(classes, ignore=settings["ignore"])
    plane = settings["plane"]
    for sample, _ in files:
        cuts = VolumeSlices(sample.images, plane, settings["window"], settings["percentiles"], sample.mask)
        for index in range(len(cuts)):
            row = {"id": f"{sample.id}/{plane}_{index:04d}", "case": sample.id, "image": cuts.image(index)}
            if sample.mask is not None:
                labels = cuts.mask(index)
                indices = encoding.encode(labels.astype(np.int32), str(sample.mask))
                if settings["foreground_only"] and not ((indices > 0) & (indices < len(classes))).any():
                    continue
                row["mask"] = PIL.Image.fromarray(labels)
            if not settings["foreground_only"]:
                row |= {"place": index, "spacing": cuts.volumes[0].spacing(plane)}
            yield row


@dataclass(kw_only=True)
class DenseData(DataSettings):
    """The `data` of a configuration, see [`DataSettings`].

    Args:
        classes: see [`LabelEncoding`].
        splits: of files, what [`find_samples`] takes, with `tile` (see [`ImageFiles`]) for windows, and for volumes
            `foreground_only`; of `dataset_name`, what `datasets` calls the split.
        columns: see [`Rows`].
        mask_encoding, ignore: see [`LabelEncoding`].
        volumes: `plane`, and `window` or `percentiles`, where files are volumes, NIfTI or folders of DICOM series; see
            [`slice_volumes`].
    """

    classes: Sequence[Mapping]
    splits: Mapping[str, Mapping | str]
    columns: Mapping[str, str] | None = None
    mask_encoding: str = "value"
    ignore: Sequence = ()
    volumes: Mapping | None = None
    encoding: LabelEncoding = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        self.encoding = LabelEncoding(self.classes, self.mask_encoding, self.ignore)

    @property
    def image_spec(self) -> dict | None:
        """Input spec of the model's image processor: that of the volumes, or else that of the images."""
        names = [name for name in ("window", "percentiles") if (self.volumes or {}).get(name) is not None]
        return {name: self.volumes[name] for name in names} or self.input_spec

    def _open(self, name: str) -> MaskedImages:
        settings = self.split_settings(name)
        if self.dataset_name is not None:
            rows = datasets.load_dataset(self.dataset_name, self.dataset_config, split=settings)
            return Rows(rows, self.encoding, self.input_spec, self.columns, name)
        samples = find_samples(self.root, settings, name)
        if self.volumes is None:
            files = ImageFiles(samples, self.encoding, self.input_spec, settings.get("tile"))
            files.check_files(name)
            return files
        with PartialState().main_process_first():
            rows = slice_volumes(
                samples, self.encoding, foreground_only=settings.get("foreground_only", False), **self.volumes
            )
        return Rows(rows, self.encoding, name=name)

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if two of the splits share an image, under whatever name, a patient or a case."""
        if self.root is not None:
            self.check_files({name: find_samples(self.root, self.splits[name], name) for name in names})
        elif len({self.splits[name] for name in names}) < len(names):
            raise ValueError(f"Two of the splits {list(names)} are the same.")
        elif len(names) > 1:
            opened = {name: self._open(name) for name in names}
            check_shared_cases({name: rows.cases or () for name, rows in opened.items()})
            self.check_rows({name: (part.rows, part.image_columns) for name, part in opened.items()})


class ClassPixels(Dataset):
    """Pixels of each class in the mask of each sample, int64 of shape `(num_classes,)`."""

    def __init__(self, samples: Dataset, num_classes: int):
        self.places = [(part, index) for part in parts_of(samples) for index in range(len(part))]
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        part, place = self.places[index]
        mask = part.mask(place)
        if mask is None:
            raise ValueError("A split to train on has no masks: give `mask` in its settings.")
        return mask.flatten().bincount(minlength=IGNORE_INDEX + 1)[: self.num_classes]


def count_pixels(samples: Dataset, names: Sequence[str], num_workers: int = 0) -> dict[str, int]:
    """Pixels of each class over a data set, by name. Every mask is read, and so checked; processes share the work.

    A warning names the classes that never occur.

    Raises:
        ValueError: if a mask is missing, cannot be read or holds values outside the classes, or if there is no pixel
            of a class at all.
    """
    state, masks = PartialState(), ClassPixels(samples, len(names))
    mine = Subset(masks, share(range(len(masks)), state.num_processes, state.process_index))
    loader = DataLoader(mine, batch_size=None, num_workers=num_workers)
    counts = torch.zeros(len(names), dtype=torch.int64)
    for pixels in tqdm(loader, desc="Reading masks", disable=not state.is_main_process):
        counts += pixels
    if state.num_processes > 1:
        counts = sum(gather_object([counts]))
    if not counts.any():
        raise ValueError("No mask to train on has a pixel of a class: all are to be ignored.")
    absent = [name for name, count in zip(names, counts.tolist()) if not count]
    if absent:
        logger.warning("The classes %s never occur in what is trained on.", absent)
    return dict(zip(names, counts.tolist()))


def balanced_weights(pixels: Mapping[str, int]) -> list[float]:
    """Weights of the classes by the inverse of their number of pixels; over all pixels their mean is 1.

    Raises:
        ValueError: if a class never occurs.
    """
    absent = [name for name, count in pixels.items() if not count]
    if absent:
        raise ValueError(f"class_weights: 'balanced' needs pixels of every class, but {absent} never occur.")
    return [sum(pixels.values()) / (len(pixels) * count) for count in pixels.values()]


def weigh_classes(
    samples: Dataset, names: Sequence[str], weights: Sequence[str] | None, num_workers: int = 0
) -> tuple[dict[str, int], list[float] | None]:
    """Pixels of each class, see [`count_pixels`], and the weights of the classes in the loss.

    Args:
        weights: a number for each class, or `["balanced"]`, see [`balanced_weights`].
    """
    pixels = count_pixels(samples, names, num_workers)
    return pixels, balanced_weights(pixels) if weights == ["balanced"] else weights and [float(w) for w in weights]
