"""Data set of images with objects: samples, windows of large images, and the `data` of a configuration."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm

from ..images.large import ranged
from ..images.pixels import to_pixels
from ..images.reading import Picture, Window, cut, read_image, read_picture, windows
from ..input_spec import InputSpec
from ..instructions.rows import content_of, undecoded
from ..rotated_boxes import smallest_rectangles
from ..training.arguments import check_type
from ..training.fine_tuning_data import (
    DataSettings,
    FileSample,
)
from ..vrl import keyed_generator
from .annotations import (
    BOX_FORMATS,
    FORMATS,
    AnnotatedFile,
    ClassNames,
    ImageObjects,
    collect,
    find_columns,
    read_files,
    read_rows,
)

logger = logging.getLogger(__name__)
MIN_IMAGE_SHARE, MIN_OBJECT_SHARE = 0.6, 0.7
MOST_SHOWN = 5
TILE = {"size": int, "overlap": int, "min_image_share": float, "min_object_share": float}


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: a file or a row, or a window of it; and what is in it, `None` if that is not known."""

    id: str
    whole: str  # the id of the image that it is a window of, or its own
    image: Path | int
    size: tuple[int, int]  # of the whole image
    window: Window | None
    objects: ImageObjects | None

    @property
    def start(self) -> tuple[int, int]:
        """x and y of the sample's top left corner in the image."""
        return self.window[:2] if self.window else (0, 0)


class ObjectImages(torch.utils.data.Dataset):
    """Samples of one image with its objects.

    An item is a dictionary: `id`; `image`, see [`~modeling_vitp.images.pixels.to_pixels`]; and, unless it is not known
    what is in the image, `labels`, int64 `(n,)`, `corners`, float32 `(n, 4, 2)` in pixels, `difficult` and `crowd`,
    bool `(n,)`, `area` as annotated, float64 `(n,)` with NaN where it is not, and `masks`, uint8 `(n, height, width)`,
    if there are any.

    Args:
        places: the samples.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].
        with_masks: whether there are outlines.
        rows: what the numbers of rows in `places` are of, and
        column: which of its columns has the images.
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
        """Some of the samples, by their places."""
        subset = ObjectImages([self.places[index] for index in chosen], None, self.with_masks, self.rows, self.column)
        subset.spec = self.spec
        return subset

    def count(self, names: Sequence[str]) -> dict[str, int]:
        """Objects of each class, by name, without crowds."""
        labels = [place.objects.labels[~place.objects.crowd] for place in self.places if place.objects is not None]
        return dict(zip(names, np.bincount(np.concatenate(labels), minlength=len(names)).tolist()))

    def hash_of_objects(self) -> str:
        """The SHA-256 of what is annotated in the samples."""
        seen = hashlib.sha256()
        for place in self.places:
            objects = place.objects
            seen.update(f"{place.id}\0{place.window}\0{None if objects is None else objects.segmentations}\0".encode())
            for array in () if objects is None else (objects.labels, objects.corners, objects.difficult, objects.crowd):
                seen.update(array.tobytes())
        return seen.hexdigest()

    def image(self, index: int) -> torch.Tensor:
        """The image of a sample alone."""
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
        stored, name = self.rows[place.image][self.column], f"Row {place.id}"
        picture, spec = stored, self.spec
        try:
            if isinstance(stored, dict):
                content = content_of(stored)
                picture = read_picture(content, self.spec)
                spec = ranged(self.spec, content, place.window is not None)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"{name}: the image cannot be read: {error}") from error
        if place.window is None:
            return name, picture, spec
        return name, cut(picture, place.window) if isinstance(picture, np.ndarray) else picture.crop(place.window), spec

    def __getitem__(self, index: int) -> dict:
        place, image = self.places[index], self.image(index)
        item = {"id": place.id, "image": image}
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


@dataclass(kw_only=True)
class DetectionData(DataSettings):
    """The `data` of a configuration, see [`DataSettings`].

    Args:
        classes: see [`ClassNames`].
        splits: of files, what [`read_files`] takes, with `tile` for windows: `size` and `overlap` in pixels, and as for
            DOTA `min_image_share` and `min_object_share`, see [`object_windows`] and [`inside`]; of `dataset_name`,
            what `datasets` calls the split, or a mapping with that as `split`, and `tile`.
        format: of the annotation files: `"coco"`, `"voc"`, `"dota"`, or a name of [`register_format`].
        columns, box_format: of rows, see [`read_rows`].
        leave_out: annotated names of objects that do not count.
        bad_objects: `"raise"`, an object without an area, outside its image or without the outline that is asked for is
            an error; `"skip"`, it is left out, and how many are is said.
        min_side: objects with a shorter side, in pixels, are left out.
    """

    choices = {"format": FORMATS, "box_format": BOX_FORMATS, "bad_objects": ("raise", "skip")}

    classes: Sequence[str | Mapping]
    splits: Mapping[str, Mapping | str]
    format: str | None = None
    columns: Mapping[str, str] | None = None
    box_format: str = "xywh"
    leave_out: Sequence[str] = ()
    bad_objects: str = "raise"
    min_side: float = 0.0
    names: ClassNames = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.root is not None and self.format is None:
            raise ValueError(f"data: files need a `format`: {', '.join(FORMATS)}.")
        self.names = ClassNames(self.classes, self.leave_out)

    def without_tiles(self) -> "DetectionData":
        """The same with whole images in all splits."""
        splits = {
            name: {key: value for key, value in split.items() if key != "tile"} if isinstance(split, Mapping) else split
            for name, split in self.splits.items()
        }
        whole = replace(self, splits=splits)
        whole.names = self.names
        return whole

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
        """Return the samples of a split; all annotations are read, and so checked.

        Args:
            task: `"horizontal"`, `"oriented"` or `"instances"`, which needs outlines.
        """
        if self.dataset_name is None:
            settings = self.split_settings(name)
            found = read_files(self.root, self.format, settings, name)
            return ObjectImages(self._places(found, settings, task, name), self.input_spec, task == "instances")
        settings, rows = self._read(name)
        rows = rows.cast(undecoded(rows.features))
        columns = find_columns(rows.features, self.columns or {}, name, task == "oriented")
        found = read_rows(rows, columns, self.box_format, name)
        places = self._places(found, settings, task, name)
        return ObjectImages(places, self.input_spec, task == "instances", rows, columns["image"])

    def _read(self, name: str) -> tuple[Mapping[str, Any], datasets.Dataset]:
        """What the configuration says of a split of `dataset_name`, and its rows."""
        settings = self.split_settings(name)
        settings = settings if isinstance(settings, Mapping) else {"split": settings}
        if "split" not in settings or set(settings) - {"split", "tile"}:
            raise ValueError(f"Split {name!r} of `dataset_name` has `split`, and may have `tile`: {dict(settings)}.")
        return settings, datasets.load_dataset(self.dataset_name, self.dataset_config, split=settings["split"])

    def _places(self, found: Iterator[AnnotatedFile], settings: Mapping, task: str, name: str) -> list[Place]:
        places, wrong = [], []
        tile = read_tile(settings.get("tile") if isinstance(settings, Mapping) else None, name)
        for item in tqdm(found, desc=f"annotations of {name}", disable=None):
            objects = None
            if item.found is not None:
                objects, bad = collect(item.found, self.names, item.size, task == "instances")
                wrong += bad
                objects = objects.take(shorter_sides(objects, task == "oriented") >= self.min_side)
            if wrong and self.bad_objects == "raise":
                raise ValueError(f"{wrong[0]} Mend it, or leave such objects out: `bad_objects: skip`.")
            places += list(cut_into_windows(item, objects, tile, task == "oriented"))
        if not places:
            raise ValueError(f"Split {name!r} has no image.")
        if wrong:
            logger.warning("%s: %d object(s) are left out: %s …", name, len(wrong), " ".join(wrong[:MOST_SHOWN]))
        return places

    def check_disjoint(self, names: Sequence[str], task: str) -> None:
        """Raises a `ValueError` if two of the splits share a file or rows, or, unless that is allowed, an image under
        other names or a patient of DICOM.
        """
        if self.root is None:
            stored = {}
            seen: list[tuple[str, str, int, int]] = []
            for name in names:
                settings, rows = self._read(name)
                for part in rows_of_split(settings["split"], rows):
                    for other, whole, start, end in seen:
                        if other != name and whole == part[0] and max(start, part[1]) < min(end, part[2]):
                            raise ValueError(f"Splits {other!r} and {name!r} share rows of {whole!r}.")
                    seen.append((name, *part))
                rows = rows.cast(undecoded(rows.features))
                columns = find_columns(rows.features, self.columns or {}, name, task == "oriented")
                stored[name] = rows, [columns["image"]]
            self.check_rows(stored)
            return
        samples = {}
        for name in names:
            images = dict.fromkeys(place.image for place in self._open(name, task).places)
            samples[name] = [FileSample(image.stem, {}, (image,), None) for image in images]
        self.check_files(samples)


def rows_of_split(spec: str, rows: datasets.Dataset) -> Iterator[tuple[str, int, int]]:
    """Which rows `datasets` takes for a split such as "train[:80%]": those of which split, from where, to where."""
    lengths = {name: split.num_examples for name, split in rows.info.splits.items()}
    for part in datasets.ReadInstruction.from_spec(spec).to_absolute(lengths):
        yield part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to


def read_tile(settings: Mapping | None, name: str) -> dict | None:
    if settings is None:
        return None
    if not {"size", "overlap"} <= set(settings) <= set(TILE):
        raise ValueError(f"Split {name!r}: tile has {sorted(settings)}, but needs size and overlap of {sorted(TILE)}.")
    for key, value in settings.items():
        check_type(f"Split {name!r}: tile: {key}", value, TILE[key])
    return {"min_image_share": MIN_IMAGE_SHARE, "min_object_share": MIN_OBJECT_SHARE, **settings}


def cut_into_windows(
    item: AnnotatedFile, objects: ImageObjects | None, tile: Mapping | None, is_oriented: bool
) -> Iterator[Place]:
    """An image as one sample, or as those of its windows, named after where they begin. Upright boxes end where their
    window does, as those that are found in it; oriented ones, which then were none, reach beyond it.
    """
    if tile is None:
        yield Place(item.id, item.id, item.image, item.size, None, objects)
        return
    for window in object_windows(item.size, tile["size"], tile["overlap"], tile["min_image_share"]):
        mine = objects
        if objects is not None:
            mine = objects.take(inside(objects.corners, window, tile["size"], tile["min_object_share"]))
            mine = mine if is_oriented else mine.clipped_to(window)
        name = f"{item.id}__{tile['size']}__{window[0]}___{window[1]}"
        yield Place(name, item.id, item.image, item.size, window, mine)


def shorter_sides(objects: ImageObjects, is_oriented: bool) -> np.ndarray:
    """In pixels, of the upright boxes, or of the smallest rectangles around the corners."""
    if not len(objects):
        return np.zeros(0)
    if is_oriented:
        return smallest_rectangles(torch.from_numpy(objects.corners))[:, 3].numpy()
    boxes = objects.boxes()
    return (boxes[:, 2:] - boxes[:, :2]).min(1)


def with_few_empty(samples: ObjectImages, share: float, seed: int) -> ObjectImages:
    """The samples with objects, and so many without that they are at most a share of all, drawn by `seed`; with a share
    of 1 all samples.

    Raises:
        ValueError: if nothing is left, or it is not known what is in an image.
    """
    unknown = [place.id for place in samples.places if place.objects is None]
    if unknown:
        raise ValueError(f"{unknown[0]} has no annotation, so it cannot be trained on.")
    full = [index for index, place in enumerate(samples.places) if not place.objects.crowd.all()]
    empty = sorted(set(range(len(samples))) - set(full))
    most = len(empty) if share >= 1 else int(len(full) * share / (1 - share))
    order = torch.randperm(len(empty), generator=keyed_generator(seed, "images without objects")).tolist()
    chosen = sorted(full + [empty[index] for index in order[:most]])
    if not full:
        raise ValueError("There is no object to train on.")
    logger.info("%d images with objects, %d of %d without.", len(full), len(chosen) - len(full), len(empty))
    return samples.subset(chosen)


def object_windows(
    image_size: tuple[int, int], size: int, overlap: int, min_image_share: float = MIN_IMAGE_SHARE
) -> list[Window]:
    """The windows of at most `size` x `size` that an image is cut into.

    One of which no more than `min_image_share` is image is left out, unless none has more; then those with the most
    stay.
    """
    height, width = image_size
    found = [window or (0, 0, width, height) for window in windows(image_size, size, overlap)]
    shares = [(right - left) * (bottom - top) / size**2 for left, top, right, bottom in found]
    if max(shares) > min_image_share:
        return [window for window, share in zip(found, shares) if share > min_image_share]
    return [window for window, share in zip(found, shares) if share == max(shares)]


def shares_inside(corners: np.ndarray, start: tuple[int, int], size: int) -> np.ndarray:
    """Which share of the area of each polygon lies in a square, float64 of shape `(n,)`.

    The outline is cut where it crosses one of the square's four lines, and its points are clamped to the square: that
    keeps how often it winds around each point inside, so what it encloses then is what is in both.

    Args:
        corners: of polygons with an area, in order, `(n, points, 2)`.
        start: x and y of the square's top left corner.
        size: its side.
    """
    low = np.array(start, np.float64)
    high = low + size
    starts, runs = corners, np.roll(corners, -1, 1) - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate([(low - starts) / runs, (high - starts) / runs], -1)
    crossings = np.sort(np.clip(np.nan_to_num(crossings, nan=0.0, posinf=1.0, neginf=0.0), 0, 1), -1)
    points = starts[:, :, None] + crossings[..., None] * runs[:, :, None]  # (n, points, 4, 2), along the outline
    points = np.concatenate([starts[:, :, None], points], 2).reshape(len(corners), -1, 2)
    return areas(np.clip(points, low, high)) / areas(corners)


def areas(corners: np.ndarray) -> np.ndarray:
    """Of polygons `(n, points, 2)`, float64 of shape `(n,)`."""
    x, y = corners[..., 0], corners[..., 1]
    return abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2


def inside(corners: np.ndarray, window: Window, size: int, min_share: float = MIN_OBJECT_SHARE) -> np.ndarray:
    """Which objects belong to a window: those of whose area it has at least a share, bool of shape `(n,)`.

    The window counts as whole, `size` x `size`, where it reaches beyond the image.
    """
    return shares_inside(corners, window[:2], size) >= min_share if len(corners) else np.zeros(0, bool)
