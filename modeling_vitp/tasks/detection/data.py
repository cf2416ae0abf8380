"""Detection data sets that are described by a configuration: files or rows, whole images or windows."""

import copy
import hashlib
import logging
import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from tqdm import tqdm

from ...command.settings import NonNegativeFloat, from_mapping
from ...data.classes import ClassNames
from ...data.files import FileSample, hold_out
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, layouts_about, recognize_layout
from ...data.rows import check_image_columns, content_of, encoded_rows
from ...data.settings import DataSettings
from ...data.windows import inside, object_windows
from ...images.large import ranged
from ...images.pixels import to_pixels
from ...images.reading import Picture, Window, cut, read_image, read_picture
from ...input_spec import InputSpec
from ...rotated_boxes import smallest_rectangles
from ...vrl import keyed_generator
from .annotations import (
    USUAL,
    AnnotatedFile,
    ImageObjects,
    ObjectSplit,
    ObjectTiles,
    collect,
    columns_of,
    read_files,
    read_rows,
)
from .arguments import VARIANTS

logger = logging.getLogger(__name__)
MOST_SHOWN = 5


@dataclass(frozen=True)
class Place:
    """Source of a sample: a file or row, or a window of it, with its annotated objects.

    Args:
        id: id of the sample.
        whole: id of the whole image, equal to `id` without a window.
        image: path of the file, or index of the row.
        size: height and width of the whole image.
        window: window of the image, or `None` for the whole image.
        objects: annotated objects, or `None` if the image has no annotation.
        case: case of the metrics that the sample belongs to: the whole image, or its scene.
    """

    id: str
    whole: str
    image: Path | int
    size: tuple[int, int]
    window: Window | None
    objects: ImageObjects | None
    case: str

    @property
    def start(self) -> tuple[int, int]:
        """Position x, y of the top left corner of the sample in the image."""
        return self.window[:2] if self.window else (0, 0)


class ObjectImages(torch.utils.data.Dataset):
    """Detection data set.

    An item is a dictionary with `id` and `image` (see [`~modeling_vitp.images.pixels.to_pixels`]). If the image is
    annotated, the item also has `labels`, int64 `(n,)`; `corners` in pixels, float32 `(n, 4, 2)`; `difficult` and
    `crowd`, bool `(n,)`; `area` in pixels, float64 `(n,)`, NaN if not annotated; and with `with_masks` also `masks`,
    uint8 `(n, height, width)`.

    Args:
        places: sources of the samples.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        with_masks: whether items have instance masks.
        rows: data set of rows, if the samples are rows instead of files.
        column: image column of `rows`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        input_spec: dict | None = None,
        with_masks: bool = False,
        rows: datasets.Dataset | None = None,
        column: str = "image",
    ):
        self.places, self.with_masks = list(places), with_masks
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        self.rows = None if rows is None else rows.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, chosen: Sequence[int]) -> "ObjectImages":
        """Return a data set with the samples at the given indices."""
        subset = copy.copy(self)
        subset.places = [self.places[index] for index in chosen]
        return subset

    def count(self, names: Sequence[str]) -> dict[str, int]:
        """Return the number of objects of each class, by class name, without crowd objects."""
        labels = [place.objects.labels[~place.objects.crowd] for place in self.places if place.objects is not None]
        return dict(zip(names, np.bincount(np.concatenate(labels), minlength=len(names)).tolist()))

    def hash_of_objects(self) -> str:
        """Return the SHA-256 hash of the annotations of all samples."""
        digest = hashlib.sha256()
        for place in self.places:
            objects = place.objects
            segmentations = None if objects is None else objects.segmentations
            digest.update(f"{place.id}\0{place.window}\0{segmentations}\0".encode())
            for array in () if objects is None else (objects.labels, objects.corners, objects.difficult, objects.crowd):
                digest.update(array.tobytes())
        return digest.hexdigest()

    def files_or_rows(self) -> dict[str, Any]:
        """Return the image files or rows, and the hash of the annotations, to detect changes."""
        images = sorted({place.image for place in self.places}) if self.rows is None else self.rows
        return {"images": images, "objects": self.hash_of_objects()}

    def image(self, index: int) -> torch.Tensor:
        """Return the image of a sample without its objects."""
        place = self.places[index]
        if isinstance(place.image, Path):
            name, picture = str(place.image), read_image(place.image, place.window, self.spec)
            spec = ranged(self.spec, place.image, place.window is not None)
        else:
            name, picture, spec = self._row(place)
        try:
            return to_pixels(picture, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _row(self, place: Place) -> tuple[str, Picture, InputSpec | None]:
        name = f"Row {place.id}"
        try:
            content = content_of(self.rows[place.image][self.column])
            picture = read_picture(content, self.spec)
            spec = ranged(self.spec, content, place.window is not None)
        except Exception as error:  # Pillow raises many error types for a broken file.
            raise ValueError(f"{name}: the image cannot be read: {error}") from error
        if place.window is None:
            return name, picture, spec
        return name, cut(picture, place.window) if isinstance(picture, np.ndarray) else picture.crop(place.window), spec

    def __getitem__(self, index: int) -> dict:
        place, image = self.places[index], self.image(index)
        item = {"id": place.id, "case": place.case, "image": image}
        if place.objects is None:
            return item
        objects = place.objects
        item |= {
            "labels": torch.from_numpy(objects.labels),
            "corners": torch.from_numpy(objects.moved_to(*place.start).corners).float(),
            "difficult": torch.from_numpy(objects.difficult),
            "crowd": torch.from_numpy(objects.crowd),
            "area": torch.from_numpy(objects.areas),
        }
        if self.with_masks:
            item["masks"] = torch.from_numpy(objects.masks(place.size, place.window))
        return item


@dataclass(frozen=True)
class RowSplit:
    """Settings of a split of rows: its name in `datasets`, and windows that its images are cut into."""

    split: str
    tile: ObjectTiles | None = None


@dataclass(kw_only=True)
class DetectionData(DataSettings):
    """Detection settings in `data` of a configuration, see [`DataSettings`].

    Args:
        classes: classes of the model, see [`ClassNames`].
        splits: settings of each split. For files: arguments of [`read_files`], and optionally `tile` for windows with
            `size` and `overlap` in pixels, `min_image_share` and `min_object_share` (see [`object_windows`] and
            [`inside`]). For `dataset_name`: name of the split in `datasets`, or a mapping with `split` and `tile`.
        format: layout of the annotation files: `"coco"`, `"voc"`, `"dota"`, `"yolo"`, `"geojson"` (GeoJSON or
            GeoPackage), or that of a plugin, see [`~modeling_vitp.data.layouts.register_layout`].
        class_property: property of `format="geojson"` with the class of a feature. Default: the first of `class`,
            `label`, `category`, `name` and `type` that a feature has, otherwise all features are of the class `object`.
        columns, box_format: column names and box format of rows, see [`read_rows`].
        leave_out: annotated class names that are ignored.
        bad_objects: `"raise"` raises an error for an object that has no area, lies outside its image, or lacks a
            required outline; `"skip"` leaves such objects out and logs their number.
        min_side: smallest side of an object in pixels. Smaller objects are left out.
    """

    infer_options = ("class_property",)
    roles = tuple(USUAL)
    template = (
        "data: {root: FOLDER, format: coco, splits: {train: {images: train/images, annotations: train.json}, "
        "test: {images: test/images, annotations: test.json}}, classes: [ship, plane]}"
    )

    classes: Sequence[str | Mapping]
    splits: Mapping[str, Mapping | str]
    format: str | None = None
    class_property: str | None = None
    columns: Mapping[str, str] | None = None
    box_format: Literal["xywh", "xyxy"] = "xywh"
    leave_out: Sequence[str] = ()
    bad_objects: Literal["raise", "skip"] = "raise"
    min_side: NonNegativeFloat = 0.0
    names: ClassNames = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        formats = layouts_about("objects")
        if self.format not in (*formats, None):
            raise ValueError(f"Expected format to be one of {', '.join(formats)}, got {self.format!r}.")
        if self.root is not None and self.format is None:
            raise ValueError(f"`format` is required for annotation files. Options: {', '.join(formats)}.")
        options = () if self.format is None else LAYOUTS[self.format].options
        if self.class_property is not None and "class_property" not in options:
            raise ValueError(f"`class_property` is for `format: geojson`, got the format {self.format!r}.")
        self.names = ClassNames(self.classes, self.leave_out)

    @classmethod
    def infer(cls, root, class_property: str | None = None):
        formats = layouts_about("objects")
        name = recognize_layout(root, formats)
        if name is None:
            raise cls.unknown_layout(root, f"annotations in one of the formats {', '.join(formats)}")
        has_property = class_property is not None and "class_property" in LAYOUTS[name].options
        options = {"class_property": class_property} if has_property else {}
        layout, splits = LAYOUTS[name](root, **options), {}
        for split, images in layout.splits().items():
            annotation_files = {layout.annotation_file(image_id, path) for image_id, (path,) in images.items()} - {None}
            settings = {"images": common_folder((path for (path,) in images.values()), root)}
            if layout.has_shared_files and len(annotation_files) == 1:
                (file,) = annotation_files
                settings["annotations"] = file.relative_to(root).as_posix()
            elif annotation_files:
                settings["annotations"] = common_folder(annotation_files, root)
            list_file = layout.split_list(split)
            if list_file is not None:
                settings["list"] = list_file.relative_to(root).as_posix()
            splits[split] = settings
        if splits.keys() in ({"train"}, {UNSPLIT}):
            (settings,), (images,) = splits.values(), layout.splits().values()
            splits = hold_out(settings, (path.stem for (path,) in images.values()))
        classes = {label.casefold(): label for label in layout.class_names()}
        found = {"root": str(root), "format": name, "splits": splits, "classes": list(classes.values())}
        found_property = getattr(layout, "class_property", None)
        return found if found_property is None else found | {"class_property": found_property}

    def without_tiles(self) -> "DetectionData":
        """Return the same settings with whole images in all splits."""
        splits = {
            name: {key: value for key, value in split.items() if key != "tile"} if isinstance(split, Mapping) else split
            for name, split in self.splits.items()
        }
        return replace(self, splits=splits)

    def _join(self, parts: list[ObjectImages]) -> ObjectImages:
        first = parts[0]
        if first.rows is None:
            return ObjectImages([place for part in parts for place in part.places], self.input_spec, first.with_masks)
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        places = [
            replace(place, image=place.image + int(start))
            for part, start in zip(parts, starts)
            for place in part.places
        ]
        rows = datasets.concatenate_datasets([part.rows for part in parts])
        return ObjectImages(places, self.input_spec, first.with_masks, rows, first.column)

    def _open(self, name: str, task: str) -> ObjectImages:
        """Return the samples of a split. All annotations are read and checked.

        Args:
            name: name of the split.
            task: `"horizontal"`, `"oriented"` or `"instances"`, which requires outlines.
        """
        if self.dataset_name is None:
            split = from_mapping(ObjectSplit, self.split_settings(name), f"Split {name!r}")
            found = read_files(self.root, self.format, split, name, self.class_property)
            return ObjectImages(self._places(found, split.tile, task, name), self.input_spec, VARIANTS[task].has_masks)
        split, rows, columns = self._read(name, task)
        if "labels" not in columns and len(self.names.names) > 1:
            raise ValueError(
                f"Split {name!r} has no column of labels for the classes {self.names.names}. Found: "
                f"{', '.join(sorted(rows.features))}. Set `columns`, such as {{labels: objects.FIELD}}."
            )
        found = read_rows(rows, columns, self.box_format, name)
        places = self._places(found, split.tile, task, name)
        return ObjectImages(places, self.input_spec, VARIANTS[task].has_masks, rows, columns["image"])

    def _read(self, name: str, task: str) -> tuple[RowSplit, datasets.Dataset, dict[str, str]]:
        """Return the settings, the rows and the columns of a split of `dataset_name`."""
        settings = self.split_settings(name)
        settings = settings if isinstance(settings, Mapping) else {"split": settings}
        split = from_mapping(RowSplit, settings, f"Split {name!r}")
        rows = encoded_rows(self.load_rows(split.split))
        columns = columns_of(rows.features, self.columns or {}, name, VARIANTS[task].is_oriented)
        check_image_columns(rows, [columns["image"]], name)
        return split, rows, columns

    def _places(self, found: Iterator[AnnotatedFile], tile: ObjectTiles | None, task: str, name: str) -> list[Place]:
        variant = VARIANTS[task]
        places, wrong = [], []
        for item in tqdm(found, desc=f"annotations of {name}", disable=None):
            objects = None
            if item.objects is not None:
                objects, bad = collect(item.objects, self.names, item.size, variant.has_masks, variant.is_oriented)
                wrong += bad
                objects = objects.take(shorter_sides(objects, variant.is_oriented) >= self.min_side)
            if wrong and self.bad_objects == "raise":
                raise ValueError(f"{wrong[0]} Repair it, or set `bad_objects: skip` in `data` to skip such objects.")
            places += list(cut_into_windows(item, objects, tile, variant.is_oriented))
        if not places:
            raise ValueError(f"Split {name!r} has no images.")
        if wrong:
            shown = " ".join(wrong[:MOST_SHOWN])
            logger.warning("Split %s: skipping %d invalid object(s): %s", name, len(wrong), shown)
        return places

    def check_disjoint(self, names: Sequence[str], task: str) -> None:
        """Raise a `ValueError` if two of the splits share rows, a file, a patient or a case.

        Unless the configuration allows it, images with equal content under different names are an error too.
        """
        if self.root is None:
            stored = {name: self._read(name, task)[1:] for name in names}
            self.check_splits({name: (rows, [columns["image"]]) for name, (rows, columns) in stored.items()})
            return
        samples = {}
        for name in names:
            images = {place.image: {"case": place.case} for place in self._open(name, task).places}
            has_cases = "cases" in self.split_settings(name)
            samples[name] = [
                FileSample(image.stem, case if has_cases else {}, (image,), None) for image, case in images.items()
            ]
        self.check_files(samples)


def common_folder(paths: Iterable[Path], root: Path) -> str:
    """Return the deepest folder that contains all files, relative to a root."""
    return Path(os.path.commonpath([path.parent for path in paths])).relative_to(root).as_posix()


def cut_into_windows(
    item: AnnotatedFile, objects: ImageObjects | None, tile: ObjectTiles | None, is_oriented: bool
) -> Iterator[Place]:
    """Yield the samples of an image: the whole image, or its windows, whose ids contain their position.

    A window has the objects with at least the share `min_object_share` of their area in it. If the share is 0, and for
    crowd regions, any part is enough. Upright boxes are clipped to the window. Oriented boxes may reach beyond it,
    because a clipped oriented box is not a rectangle.
    """
    case = item.id if item.case is None else item.case
    if tile is None:
        yield Place(item.id, item.id, item.image, item.size, None, objects, case)
        return
    for window in object_windows(item.size, tile.size, tile.overlap, tile.min_image_share):
        inner = objects
        if objects is not None:
            least = np.where(objects.crowd, 0, tile.min_object_share).clip(np.finfo(float).tiny)
            inner = objects.take(inside(objects.corners, window, tile.size, least))
            inner = inner if is_oriented else inner.clipped_to(window)
        name = f"{item.id}__{tile.size}__{window[0]}___{window[1]}"
        yield Place(name, item.id, item.image, item.size, window, inner, case)


def shorter_sides(objects: ImageObjects, is_oriented: bool) -> np.ndarray:
    """Return the shorter side of each object in pixels, for oriented boxes of the smallest rectangle around it."""
    if not len(objects):
        return np.zeros(0)
    if is_oriented:
        return smallest_rectangles(torch.from_numpy(objects.corners))[:, 3].numpy()
    boxes = objects.boxes()
    return (boxes[:, 2:] - boxes[:, :2]).min(1)


def with_few_empty(samples: ObjectImages, share: float, seed: int) -> ObjectImages:
    """Return all samples with objects, and a limited number of samples without objects.

    Args:
        samples: training samples.
        share: largest share of samples without objects in the result. 1 keeps all samples.
        seed: seed of the random choice.

    Raises:
        ValueError: if no sample has objects, or if a sample has no annotation.
    """
    unknown = [place.id for place in samples.places if place.objects is None]
    if unknown:
        raise ValueError(f"Expected annotations for every training sample, {unknown[0]} has none.")
    full = [index for index, place in enumerate(samples.places) if not place.objects.crowd.all()]
    empty = sorted(set(range(len(samples))) - set(full))
    most = len(empty) if share >= 1 else int(len(full) * share / (1 - share))
    order = torch.randperm(len(empty), generator=keyed_generator(seed, "images without objects")).tolist()
    chosen = sorted(full + [empty[index] for index in order[:most]])
    if not full:
        raise ValueError("The training data has no objects. Check `splits` and `leave_out` in `data`.")
    number = len(chosen) - len(full)
    logger.info("Training on %d images with objects and %d of %d without objects.", len(full), number, len(empty))
    return samples.subset(chosen)
