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
from ...data.layouts import LAYOUTS, ObjectLayout, layouts_about, recognize_layout
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
        whole_id: id of the whole image, equal to `id` without a window.
        image: path of the file, or index of the row.
        size: height and width of the whole image.
        window: window of the image, or `None` for the whole image.
        objects: annotated objects, or `None` if the image has no annotation.
        case: case of the metrics that the sample belongs to: the whole image, or its scene.
    """

    id: str
    whole_id: str
    image: Path | int
    size: tuple[int, int]
    window: Window | None
    objects: ImageObjects | None
    case: str

    @property
    def start(self) -> tuple[int, int]:
        """Position x, y of the top left corner of the sample in the image."""
        if self.window is None:
            return (0, 0)
        return self.window[:2]

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the sample in pixels of the image."""
        if self.window is None:
            height, width = self.size
            return (width, height)
        x1, y1, x2, y2 = self.window
        return (x2 - x1, y2 - y1)


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
        self.places = list(places)
        self.with_masks = with_masks
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        self.rows = None if rows is None else rows.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, indices: Sequence[int]) -> "ObjectImages":
        """Return a data set with the samples at the given indices."""
        subset = copy.copy(self)
        subset.places = [self.places[index] for index in indices]
        return subset

    def count(self, names: Sequence[str]) -> dict[str, int]:
        """Return the number of objects of each class, by class name, without crowd objects."""
        labels_of_samples = []
        for place in self.places:
            if place.objects is not None:
                is_single = ~place.objects.crowd
                labels_of_samples.append(place.objects.labels[is_single])
        labels = np.concatenate(labels_of_samples)
        counts = np.bincount(labels, minlength=len(names))
        return dict(zip(names, counts.tolist()))

    def hash_of_objects(self) -> str:
        """Return the SHA-256 hash of the annotations of all samples."""
        digest = hashlib.sha256()
        for place in self.places:
            objects = place.objects
            segmentations = None if objects is None else objects.segmentations
            digest.update(f"{place.id}\0{place.window}\0{segmentations}\0".encode())
            if objects is not None:
                digest.update(objects.labels.tobytes())
                digest.update(objects.corners.tobytes())
                digest.update(objects.difficult.tobytes())
                digest.update(objects.crowd.tobytes())
        return digest.hexdigest()

    def files_or_rows(self) -> dict[str, Any]:
        """Return the image files or rows, and the hash of the annotations, to detect changes."""
        if self.rows is None:
            images = sorted({place.image for place in self.places})
        else:
            images = self.rows
        return {"images": images, "objects": self.hash_of_objects()}

    def source(self, index: int) -> Path | bytes:
        """Return the file or the content of an image for [`~modeling_vitp.images.seen.describe_images`]."""
        image = self.places[index].image
        return image if isinstance(image, Path) else content_of(self.rows[image][self.column])

    def image(self, index: int) -> torch.Tensor:
        """Return the image of a sample without its objects."""
        place = self.places[index]
        if isinstance(place.image, Path):
            name = str(place.image)
            picture = read_image(place.image, place.window, self.spec)
            spec = ranged(self.spec, place.image, place.window is not None)
        else:
            name = f"Row {place.id}"
            picture, spec = self._read_row(place)
        try:
            return to_pixels(picture, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _read_row(self, place: Place) -> tuple[Picture, InputSpec | None]:
        """Return the image of a row, cut to the window, and the input spec with the value range of the whole image."""
        try:
            content = content_of(self.rows[place.image][self.column])
            picture = read_picture(content, self.spec)
            spec = ranged(self.spec, content, place.window is not None)
        except Exception as error:  # Pillow raises many error types for a broken file.
            raise ValueError(f"Row {place.id}: the image cannot be read: {error}") from error
        if place.window is None:
            return picture, spec
        if isinstance(picture, np.ndarray):
            return cut(picture, place.window), spec
        return picture.crop(place.window), spec

    def __getitem__(self, index: int) -> dict:
        place = self.places[index]
        item = {"id": place.id, "case": place.case, "image": self.image(index)}
        objects = place.objects
        if objects is None:
            return item
        corners = objects.moved_to(*place.start).corners
        item["labels"] = torch.from_numpy(objects.labels)
        item["corners"] = torch.from_numpy(corners).float()
        item["difficult"] = torch.from_numpy(objects.difficult)
        item["crowd"] = torch.from_numpy(objects.crowd)
        item["area"] = torch.from_numpy(objects.areas)
        if self.with_masks:
            masks = objects.masks(place.size, place.window)
            item["masks"] = torch.from_numpy(masks)
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
        options_of_format = [] if self.format is None else LAYOUTS[self.format].options
        if self.class_property is not None and "class_property" not in options_of_format:
            raise ValueError(f"`class_property` is for `format: geojson`, got the format {self.format!r}.")
        self.names = ClassNames(self.classes, self.leave_out)

    @classmethod
    def infer(cls, root, class_property: str | None = None):
        formats = layouts_about("objects")
        name = recognize_layout(root, formats)
        if name is None:
            raise cls.unknown_layout(root, f"annotations in one of the formats {', '.join(formats)}")
        options = {}
        if class_property is not None and "class_property" in LAYOUTS[name].options:
            options["class_property"] = class_property
        layout = LAYOUTS[name](root, **options)
        splits = {}
        stems = {}
        for split, files_of_images in layout.splits().items():
            images = {image_id: path for image_id, (path,) in files_of_images.items()}
            splits[split] = inferred_split(layout, split, images, root)
            stems[split] = [path.stem for path in images.values()]
        if splits.keys() in ({"train"}, {UNSPLIT}):
            (split,) = splits
            splits = hold_out(splits[split], stems[split])
        # Names that differ in upper and lower case only are one class.
        class_of_name = {label.casefold(): label for label in layout.class_names()}
        settings = {
            "root": str(root),
            "format": name,
            "splits": splits,
            "classes": list(class_of_name.values()),
        }
        inferred_property = getattr(layout, "class_property", None)
        if inferred_property is not None:
            settings["class_property"] = inferred_property
        return settings

    def without_tiles(self) -> "DetectionData":
        """Return the same settings with whole images in all splits."""
        splits = {}
        for name, settings in self.splits.items():
            if isinstance(settings, Mapping):
                settings = dict(settings)
                settings.pop("tile", None)
            splits[name] = settings
        return replace(self, splits=splits)

    def _join(self, parts: list[ObjectImages]) -> ObjectImages:
        with_masks = parts[0].with_masks
        places = []
        if parts[0].rows is None:
            for samples in parts:
                places += samples.places
            return ObjectImages(places, self.input_spec, with_masks)
        previous_rows = 0
        for samples in parts:
            for place in samples.places:
                places.append(replace(place, image=place.image + previous_rows))
            previous_rows += len(samples.rows)
        rows = datasets.concatenate_datasets([samples.rows for samples in parts])
        return ObjectImages(places, self.input_spec, with_masks, rows, parts[0].column)

    def _open(self, name: str, task: str) -> ObjectImages:
        """Return the samples of a split. All annotations are read and checked.

        Args:
            name: name of the split.
            task: `"horizontal"`, `"oriented"` or `"instances"`, which requires outlines.
        """
        with_masks = VARIANTS[task].has_masks
        if self.dataset_name is None:
            split = from_mapping(ObjectSplit, self.split_settings(name), f"Split {name!r}")
            images = read_files(self.root, self.format, split, name, self.class_property)
            places = self._places(images, split.tile, task, name)
            return ObjectImages(places, self.input_spec, with_masks)
        split, rows, columns = self._read_split(name, task)
        if "labels" not in columns and len(self.names.names) > 1:
            raise ValueError(
                f"Split {name!r} has no column of labels for the classes {self.names.names}. Found: "
                f"{', '.join(sorted(rows.features))}. Set `columns`, such as {{labels: objects.FIELD}}."
            )
        images = read_rows(rows, columns, self.box_format, name)
        places = self._places(images, split.tile, task, name)
        return ObjectImages(places, self.input_spec, with_masks, rows, columns["image"])

    def _read_split(self, name: str, task: str) -> tuple[RowSplit, datasets.Dataset, dict[str, str]]:
        """Return the settings, the rows and the columns of a split of `dataset_name`."""
        settings = self.split_settings(name)
        if not isinstance(settings, Mapping):
            settings = {"split": settings}
        split = from_mapping(RowSplit, settings, f"Split {name!r}")
        rows = encoded_rows(self.load_rows(split.split))
        is_oriented = VARIANTS[task].is_oriented
        columns = columns_of(rows.features, self.columns or {}, name, is_oriented)
        check_image_columns(rows, [columns["image"]], name)
        return split, rows, columns

    def _places(
        self,
        images: Iterator[AnnotatedFile],
        tile: ObjectTiles | None,
        task: str,
        name: str,
    ) -> list[Place]:
        """Return the samples of a split with their checked objects."""
        is_oriented = VARIANTS[task].is_oriented
        with_masks = VARIANTS[task].has_masks
        places = []
        messages = []
        for image in tqdm(images, desc=f"annotations of {name}", disable=None):
            objects = None
            if image.objects is not None:
                objects, messages_of_image = collect(image.objects, self.names, image.size, with_masks, is_oriented)
                messages += messages_of_image
                is_large_enough = shorter_sides(objects, is_oriented) >= self.min_side
                objects = objects.take(is_large_enough)
            if messages and self.bad_objects == "raise":
                remedy = "Repair it, or set `bad_objects: skip` in `data` to skip such objects."
                if with_masks and not any(item.segmentation for item in image.objects):
                    remedy = "No object of the image has one: set --task oriented or horizontal."
                raise ValueError(f"{messages[0]} {remedy}")
            places += cut_into_windows(image, objects, tile, is_oriented)
        if not places:
            raise ValueError(f"Split {name!r} has no images.")
        if messages:
            examples = " ".join(messages[:MOST_SHOWN])
            logger.warning("Split %s: skipping %d invalid object(s): %s", name, len(messages), examples)
        return places

    def check_disjoint(self, names: Sequence[str], task: str) -> None:
        """Raise a `ValueError` if two of the splits share rows, a file, a patient or a case.

        Unless the configuration allows it, images with equal content under different names are an error too.
        """
        if self.root is None:
            rows_and_columns = {}
            for name in names:
                _, rows, columns = self._read_split(name, task)
                rows_and_columns[name] = (rows, [columns["image"]])
            self.check_splits(rows_and_columns)
            return
        samples = {}
        for name in names:
            has_cases = "cases" in self.split_settings(name)
            case_of_image = {place.image: place.case for place in self._open(name, task).places}
            samples[name] = []
            for image, case in case_of_image.items():
                fields = {"case": case} if has_cases else {}
                samples[name].append(FileSample(image.stem, fields, (image,), None))
        self.check_files(samples)


def inferred_split(
    layout: ObjectLayout,
    split: str,
    images: Mapping[str, Path],
    root: Path,
) -> dict[str, str]:
    """Return the settings of a split of a folder, with the images by their ids."""
    annotation_files = set()
    for image_id, path in images.items():
        annotation_file = layout.annotation_file(image_id, path)
        if annotation_file is not None:
            annotation_files.add(annotation_file)
    settings = {"images": common_folder(images.values(), root)}
    if layout.has_shared_files and len(annotation_files) == 1:
        (annotation_file,) = annotation_files
        settings["annotations"] = annotation_file.relative_to(root).as_posix()
    elif annotation_files:
        settings["annotations"] = common_folder(annotation_files, root)
    list_file = layout.split_list(split)
    if list_file is not None:
        settings["list"] = list_file.relative_to(root).as_posix()
    return settings


def common_folder(paths: Iterable[Path], root: Path) -> str:
    """Return the deepest folder that contains all files, relative to a root."""
    folder = os.path.commonpath([path.parent for path in paths])
    return Path(folder).relative_to(root).as_posix()


def cut_into_windows(
    image: AnnotatedFile,
    objects: ImageObjects | None,
    tile: ObjectTiles | None,
    is_oriented: bool,
) -> Iterator[Place]:
    """Yield the samples of an image: the whole image, or its windows, whose ids contain their position.

    A window has the objects with at least the share `min_object_share` of their area in it. If the share is 0, and for
    crowd regions, any part is enough. Upright boxes are clipped to the window. Oriented boxes may reach beyond it,
    because a clipped oriented box is not a rectangle.
    """
    case = image.id if image.case is None else image.case
    if tile is None:
        yield Place(
            id=image.id,
            whole_id=image.id,
            image=image.image,
            size=image.size,
            window=None,
            objects=objects,
            case=case,
        )
        return
    for window in object_windows(image.size, tile.size, tile.overlap, tile.min_image_share):
        objects_in_window = None
        if objects is not None:
            # An object without any part in the window has the share 0, which must not be enough.
            min_shares = np.where(objects.crowd, 0, tile.min_object_share).clip(np.finfo(float).tiny)
            is_inside = inside(objects.corners, window, tile.size, min_shares)
            objects_in_window = objects.take(is_inside)
            if not is_oriented:
                objects_in_window = objects_in_window.clipped_to(window)
        x, y, *_ = window
        yield Place(
            id=f"{image.id}__{tile.size}__{x}___{y}",
            whole_id=image.id,
            image=image.image,
            size=image.size,
            window=window,
            objects=objects_in_window,
            case=case,
        )


def shorter_sides(objects: ImageObjects, is_oriented: bool) -> np.ndarray:
    """Return the shorter side of each object in pixels, for oriented boxes of the smallest rectangle around it."""
    if not len(objects):
        return np.zeros(0)
    if is_oriented:
        rotated_boxes = smallest_rectangles(torch.from_numpy(objects.corners))
        return rotated_boxes[:, 3].numpy()
    boxes = objects.boxes()
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides.min(1)


def with_few_empty(samples: ObjectImages, share: float, seed: int) -> ObjectImages:
    """Return all samples with objects, and a limited number of samples without objects.

    Args:
        samples: training samples.
        share: largest share of samples without objects in the result. 1 keeps all samples.
        seed: seed of the random choice.

    Raises:
        ValueError: if no sample has objects, or if a sample has no annotation.
    """
    full = []
    empty = []
    for index, place in enumerate(samples.places):
        if place.objects is None:
            raise ValueError(f"Expected annotations for every training sample, {place.id} has none.")
        # An image with crowd regions only has no object to train on.
        if place.objects.crowd.all():
            empty.append(index)
        else:
            full.append(index)
    if not full:
        raise ValueError("The training data has no objects. Check `splits` and `leave_out` in `data`.")
    if share >= 1:
        limit = len(empty)
    else:
        limit = int(len(full) * share / (1 - share))
    order = torch.randperm(len(empty), generator=keyed_generator(seed, "images without objects"))
    selected_empty = [empty[position] for position in order[:limit].tolist()]
    logger.info(
        "Training on %d images with objects and %d of %d without objects.",
        len(full),
        len(selected_empty),
        len(empty),
    )
    return samples.subset(sorted(full + selected_empty))
