"""Which images a split of files has, and what is annotated in each, in the formats of benchmarks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from faster_coco_eval.core import mask as run_lengths

from ..images.reading import IMAGE_SUFFIXES, Window, below, check_file, check_upright, stored_size
from ..instructions.from_annotations.formats import (
    AnnotatedObject,
    CocoFile,
    Point,
    files_by_key,
    is_below,
    is_number,
    read_annotation,
    read_dota,
    read_list,
    read_voc,
)
from ..instructions.rows import image_size
from ..training.arguments import check_type

SETTINGS = {"images": str, "annotations": str, "list": str, "tile": Mapping[str, Any]}  # of a split of files


@dataclass(frozen=True)
class AnnotatedFile:
    """An image of a split: its file, or the place of its row, and what its annotation says is in it.

    `found` is `None` where there is no annotation, as in a test split whose server keeps them.
    """

    id: str
    image: Path | int
    size: tuple[int, int]
    found: list[AnnotatedObject] | None


class FileReader(Protocol):
    """Reader of the annotation file of one image."""

    def __call__(self, annotation: Path, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]: ...


# Annotation formats by the name that `format` in a configuration has: the suffix of their files and the reader of one.
FORMATS: dict[str, tuple[str, FileReader]] = {}


def register_format(name: str, suffix: str) -> Callable[[FileReader], FileReader]:
    """Return a decorator that registers the reader of an annotation format with one file an image."""

    def register(reader: FileReader) -> FileReader:
        FORMATS[name] = (suffix, reader)
        return reader

    return register


@register_format("coco", ".json")
def read_coco(annotation: tuple[CocoFile, dict], image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
    """Read the objects of one of [`coco_files`], whose file has those of all images."""
    file, entry = annotation
    return file.objects(entry, image, size)


register_format("voc", ".xml")(read_voc)
register_format("dota", ".txt")(read_dota)


def read_files(root: str | Path, form: str, settings: Mapping, name: str) -> Iterator[AnnotatedFile]:
    """The images of a split, in the order of their names.

    Args:
        root: folder of the data set.
        form: `"coco"`, `"voc"` (`bndbox`, or DIOR-R's `robndbox`), `"dota"`, or a name of [`register_format`].
        settings: `images`, the folder of the images below `root`, which are found by their names whatever their type,
            those of COCO first where `file_name` leads from there; `annotations`, the folder of a file for each image,
            or COCO's JSON; left out where there are none. `list` is a file below `root` with the names of the images in
            the split, one a line.
        name: of the split, for errors.

    Raises:
        ValueError: names the file, and the line or object in it, that is not as it should be; an image without
            annotation or not stored upright, an annotation without image, and one that two files have.
    """
    if not isinstance(settings, Mapping) or "images" not in settings or set(settings) - SETTINGS.keys():
        raise ValueError(f"Split {name!r} needs `images`, and may have {sorted(SETTINGS)}: {str(settings)[:80]!r}.")
    for key, value in settings.items():
        check_type(f"Split {name!r}: {key}", value, SETTINGS[key])
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: root={str(root)!r}: there is no such folder.")
    if not (root / settings["images"]).is_dir():
        raise ValueError(f"Split {name!r}: there is no folder {root / settings['images']} of images.")
    suffix, reader = FORMATS[form]
    if form == "coco" and "annotations" in settings:
        annotated = coco_files(root / settings["annotations"])
        images = coco_images(root, root / settings["images"], annotated)
    else:
        images = images_by_name(root / settings["images"])
        annotated = dict.fromkeys(images)
        if "annotations" in settings:
            annotated = files_by_key(root / settings["annotations"], suffix)
    listed = None
    if "list" in settings:
        lines = read_list(root / settings["list"])
        listed = [key if (key := without_suffix(line)) in annotated else file_stem(line) for line in lines]
        if len(set(listed)) < len(listed):
            raise ValueError(f"{root / settings['list']} names {max(listed, key=listed.count)!r} twice.")
    chosen = sorted(set(annotated) | (set(images) if form != "coco" else set())) if listed is None else listed
    for key in chosen:
        if key not in images:
            where = root / settings["annotations" if listed is None else "list"]
            raise ValueError(f"{where} has {key!r}, but there is no such image in {root / settings['images']}.")
        if key not in annotated:
            raise ValueError(f"{images[key]} has no annotation in {root / settings['annotations']}.")
        path = below(root, images[key].relative_to(root))
        check_file(path)
        check_upright(path)
        size = stored_size(path)
        found = None if annotated[key] is None else reader(annotated[key], path, size)
        yield AnnotatedFile(key, path, size, found)


def images_by_name(folder: Path) -> dict[str, Path]:
    """Name without suffix -> image, whatever its type, of a folder and those below."""
    images = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in images:
                raise ValueError(f"{images[path.stem]} and {path} are two images of one name.")
            images[path.stem] = path
    if not images:
        raise ValueError(f"There is no image in {folder}.")
    return images


def coco_images(root: Path, folder: Path, annotated: Mapping[str, tuple[CocoFile, dict]]) -> dict[str, Path]:
    """Key of [`coco_files`] -> image: where its `file_name` leads from the folder, or else found by its name."""
    places = {key: folder / entry["file_name"] for key, (_, entry) in annotated.items()}
    images = {key: path for key, path in places.items() if is_below(root, path) and path.is_file()}
    has_folders = any("/" in key for key in annotated)
    return images if has_folders or len(images) == len(annotated) else images_by_name(folder) | images


def coco_files(path: Path) -> dict[str, tuple[CocoFile, dict]]:
    """Return name of an image without suffix -> the COCO file and the entry of the image in it.

    If two images have the same name, all names include the folders.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; format: coco takes a file.")
    contents = read_annotation(path)
    if not isinstance(contents, dict) or not {"images", "categories", "annotations"} <= contents.keys():
        raise ValueError(f"{path} is no COCO JSON: it needs `images`, `categories` and `annotations`.")
    file, files = CocoFile(path, contents), {}
    stems = [file_stem(entry["file_name"]) for entry in file.images]
    key_of = file_stem if len(set(stems)) == len(stems) else without_suffix
    for entry in file.images:
        key = key_of(entry["file_name"])
        if key in files:
            raise ValueError(f"{path} has two images called {key!r}.")
        files[key] = (file, entry)
    return files


def without_suffix(name: str) -> str:
    return (Path(name).parent / file_stem(name)).as_posix()


def file_stem(name: str) -> str:
    """A file's name without folder and suffix; a name without one may have dots."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


FLAT = 1e-6  # the area of a box that is taken for none, in squares of its longer extent: a line, but for rounding


@dataclass(frozen=True)
class ImageObjects:
    """The objects of an image.

    Args:
        labels: class indices, int64 of shape `(n,)`.
        corners: in pixels, in order around each box, float64 of shape `(n, 4, 2)`; of an upright box from the top left.
        difficult, crowd: bool of shape `(n,)`: marked as hard to see, and a region of many.
        areas: in pixels, as annotated, float64 of shape `(n,)`; NaN where it is not.
        segmentations: COCO's polygons or run lengths, or `None`, for each.
    """

    labels: np.ndarray
    corners: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    segmentations: tuple[list | dict | None, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "ImageObjects":
        """Some of them, by a mask or by their places."""
        places = np.arange(len(self))[chosen]
        names = ("labels", "corners", "difficult", "crowd", "areas")
        arrays = {name: getattr(self, name)[places] for name in names}
        return ImageObjects(**arrays, segmentations=tuple(self.segmentations[place] for place in places))

    def moved_to(self, left: int, top: int) -> "ImageObjects":
        """The same in a window of the image, which starts there. Their outlines are not moved."""
        return replace(self, corners=self.corners - np.array([left, top]))

    def clipped_to(self, window: Window) -> "ImageObjects":
        """Upright boxes without what of them is outside a window, and areas of those that are whole. Outlines are as
        they were.
        """
        left, top, right, bottom = window
        corners = self.corners.clip([left, top], [right, bottom])
        is_whole = (corners == self.corners).all((1, 2))
        return replace(self, corners=corners, areas=np.where(is_whole, self.areas, np.nan))

    def boxes(self) -> np.ndarray:
        """Upright boxes around them, x1, y1, x2, y2, float64 of shape `(n, 4)`."""
        return np.concatenate([self.corners.min(1), self.corners.max(1)], 1).reshape(-1, 4)

    def masks(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """uint8 of shape `(n, height, width)`; an object without an outline has an empty one.

        Args:
            size: height and width of the image.
            window: the part of it that is wanted.
        """
        left, top, right, bottom = window or (0, 0, *size[::-1])
        masks = np.zeros((len(self), bottom - top, right - left), np.uint8)
        for mask, outline in zip(masks, self.segmentations):
            if outline is not None:
                whole = run_lengths.decode([run_lengths.segmToRle(outline, *size[::-1])])[..., 0]
                mask[:] = whole[top:bottom, left:right]
        return masks


class ClassNames:
    """The classes of a model, in its order, and what they are called in annotations; capitals make no difference.

    Args:
        classes: a name for each, or a mapping with `name` and `as`, the name or names that annotations have for it.
        leave_out: annotated names of objects that are no objects here.

    Raises:
        ValueError: if there is no class, or a name stands for two things.
    """

    def __init__(self, classes: Sequence[str | Mapping], leave_out: Sequence[str] = ()):
        self.names, self._indices = [], {}
        for index, entry in enumerate(classes):
            entry = entry if isinstance(entry, Mapping) else {"name": entry}
            if set(entry) - {"name", "as"} or not isinstance(entry.get("name"), str):
                raise ValueError(f"Class {index}, {str(entry)[:80]!r}, needs a `name`, and may have `as`.")
            annotated = entry.get("as", entry["name"])
            check_type(f"Class {index}: as", annotated, str | Sequence[str])
            self.names.append(entry["name"])
            self._add([annotated] if isinstance(annotated, str) else annotated, index)
        if not self.names:
            raise ValueError("There are no classes.")
        self._add(leave_out, None)

    def _add(self, names: Iterable[str], index: int | None) -> None:
        for name in names:
            if self._indices.setdefault(name.casefold(), index) != index or self.names.count(name) > 1:
                raise ValueError(f"{name!r} stands for two classes.")

    def index(self, label: str | int, where: str) -> int | None:
        """The class of an annotated name, or of its place among the classes; `None` if it is left out."""
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if not isinstance(label, str) or label.casefold() not in self._indices:
            raise ValueError(
                f"{where}: {label!r} is none of the classes {self.names}; list it, or put it in leave_out."
            )
        return self._indices[label.casefold()]


def collect(
    found: Sequence[AnnotatedObject], classes: ClassNames, size: tuple[int, int], with_masks: bool = False
) -> tuple[ImageObjects, list[str]]:
    """Objects as annotated, checked.

    Args:
        size: height and width of the image.
        with_masks: whether each needs an outline.

    Returns:
        Those that are as they should be, and what is wrong with each of the others: a box that has no area, lies
        outside the image or is not of finite numbers; an outline that cannot be drawn.

    Raises:
        ValueError: names the file and the object of a class that is not listed.
    """
    labels, corners, kept, wrong = [], [], [], []
    for item in found:
        label = classes.index(item.label, item.where)
        if label is None:
            continue
        left, top, right, bottom = item.box
        points = item.corners or ((left, top), (right, top), (right, bottom), (left, bottom))
        try:
            check_box(item, points, size)
            if with_masks and not (item.is_crowd and item.segmentation is None):
                check_outline(item.segmentation, size)
        except (ValueError, TypeError) as error:
            wrong.append(f"{item.where}: {error}")
            continue
        labels.append(label)
        corners.append(points)
        kept.append(item)
    objects = ImageObjects(
        np.array(labels, np.int64),
        np.array(corners, np.float64).reshape(-1, 4, 2),
        np.array([item.is_difficult for item in kept], bool),
        np.array([item.is_crowd for item in kept], bool),
        np.array([item.area if is_number(item.area) and item.area > 0 else np.nan for item in kept], np.float64),
        tuple(item.segmentation if with_masks else None for item in kept),
    )
    return objects, wrong


def check_box(item: AnnotatedObject, points: Sequence[Point], size: tuple[int, int]) -> None:
    """Raises a `ValueError` unless a box, with these corners, has an area and lies in the image, at least in part."""
    xs, ys = zip(*points)
    shown = list(item.box) if item.corners is None else [list(point) for point in points]
    if not all(map(is_number, (*xs, *ys, *item.box))):
        raise ValueError(f"the box {shown} is not of finite numbers.")
    left, top, right, bottom = item.box
    doubled = sum((xs[k - 1] - left) * (ys[k] - top) - (xs[k] - left) * (ys[k - 1] - top) for k in range(4))
    if right <= left or bottom <= top or abs(doubled) <= FLAT * max(right - left, bottom - top) ** 2:
        raise ValueError(f"the box {shown} has no area.")
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= size[1] or min(ys) >= size[0]:
        raise ValueError(f"the box {shown} is outside the image of {size[1]} x {size[0]} pixels.")


def check_outline(outline: list | dict | None, size: tuple[int, int]) -> None:
    """Raises a `ValueError` unless it is polygons of three points or more, or run lengths of the image's size."""
    height, width = size
    if not outline:
        raise ValueError("it has no outline (`segmentation`), which masks are drawn from.")
    if isinstance(outline, dict):
        if tuple(outline.get("size", ())) != size or "counts" not in outline:
            raise ValueError(f"its mask is of size {outline.get('size')}, its image of {list(size)}.")
        try:
            run_lengths.decode([run_lengths.segmToRle(outline, width, height)])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"its run lengths {str(outline['counts'])[:60]!r} are no mask of {list(size)}.") from error
        return
    for polygon in outline:
        if not (isinstance(polygon, (list, tuple)) and all(map(is_number, polygon))):
            raise ValueError(f"its outline {str(outline)[:60]} is no list of polygons [x1, y1, x2, y2, …].")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"its polygon {str(polygon)[:60]} is not of three points or more: it cannot be closed.")
        if not all(abs(value) <= 10 * max(size) for value in polygon):
            raise ValueError(f"its polygon {str(polygon)[:60]} is far outside the image of {width} x {height} pixels.")


BOX_FORMATS = ("xywh", "xyxy")


def read_rows(
    rows: datasets.Dataset, columns: Mapping[str, str], box_format: str, name: str
) -> Iterator[AnnotatedFile]:
    """The images of a data set of rows.

    Args:
        rows: with images undecoded; see [`find_columns`].
        columns: under `image`, `boxes`, and optionally `id`, `labels`, `corners`, `crowd`, `difficult`, `area` and
            `masks` the columns or, with a dot, the fields of a column that has all objects of an image.
        box_format: of `boxes`: `"xywh"` or `"xyxy"`, from the left and from the top, in pixels.
        name: of the split, for errors.

    Raises:
        ValueError: names the row, if something in it is not as it should be, or two have one id.
    """
    lists = {key: column for key, column in columns.items() if key not in ("image", "id")}
    tops = {column.split(".")[0] for column in (*lists.values(), *filter(None, [columns.get("id")]))}
    names = getattr(feature_of(rows.features, columns.get("labels", "")), "names", None)
    seen: dict[str, int] = {}
    for index, row in enumerate(rows.select_columns(sorted(tops | {columns["image"]}))):
        row_id = str(row[columns["id"]]) if "id" in columns else str(index)
        where = f"row {row_id} of split {name!r}"
        if (first := seen.setdefault(row_id, index)) != index:
            raise ValueError(
                f"Split {name!r}: rows {first} and {index} have the same {columns['id']!r}, {row_id}. Give each its "
                "own, or name another column under `columns`, as `id`."
            )
        try:
            size = image_size(row[columns["image"]])
            values = {key: values_of(row, column) for key, column in lists.items()}
            if values.get("area", ()) is None:
                del values["area"]
            found = list(row_objects(values, names, box_format, where))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield AnnotatedFile(row_id, index, size, found)


def row_objects(
    values: Mapping[str, Sequence], names: Sequence[str] | None, box_format: str, where: str
) -> Iterator[AnnotatedObject]:
    lengths = {key: len(value) for key, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of its objects are of different lengths: {lengths}.")
    for index in range(next(iter(lengths.values()))):
        item = {key: value[index] for key, value in values.items()}
        label = item.get("labels", 0)
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ValueError(f"object {index} has the label {label}, which is none of the {len(names)} names.")
            label = names[label]
        corners = None
        if "corners" in item:
            flat = [number for part in item["corners"] for number in (part if isinstance(part, list) else [part])]
            corners = tuple(zip(flat[::2], flat[1::2], strict=True))
            if len(corners) != 4:
                raise ValueError(f"object {index} has {len(flat)} numbers for four corners.")
            box = (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2]))
        else:
            left, top, right, bottom = item["boxes"]
            box = (left, top, left + right, top + bottom) if box_format == "xywh" else (left, top, right, bottom)
        yield AnnotatedObject(
            f"{where}, object {index}",
            label,
            box,
            corners,
            bool(item.get("difficult")),
            bool(item.get("crowd")),
            item.get("area"),
            segmentation=item.get("masks"),
        )


def find_columns(
    features: datasets.Features, given: Mapping[str, str], name: str, is_oriented: bool = False
) -> dict[str, str]:
    """The columns of rows that [`read_rows`] reads: those given, and by their usual names.

    Usual are `image`, `id` (or `image_id`), and `objects` with fields `bbox` (or `boxes`, `corners`), `category` (or
    `label`, `labels`, `categories`), `iscrowd` (or `crowd`), `difficult`, `area` and `segmentation`.
    """
    usual = {"image": ("image",), "id": ("id", "image_id")}
    usual |= {"boxes": ("objects.bbox", "objects.boxes"), "corners": ("objects.corners",)}
    usual["labels"] = tuple(f"objects.{field}" for field in ("category", "label", "labels", "categories"))
    usual["crowd"] = ("objects.iscrowd", "objects.crowd")
    usual |= {"difficult": ("objects.difficult",), "area": ("objects.area",), "masks": ("objects.segmentation",)}
    unknown = set(given) - usual.keys()
    if unknown:
        raise ValueError(f"columns: unknown {sorted(unknown)}; there are {sorted(usual)}.")
    columns = {}
    for key, candidates in usual.items():
        wanted = (given[key],) if key in given else candidates
        found = [column for column in wanted if feature_of(features, column) is not None]
        if key in given and not found:
            raise ValueError(f"Split {name!r} has no column {given[key]!r}, only {sorted(features)}.")
        columns |= {key: found[0]} if found else {}
    if "image" not in columns or not {"boxes", "corners"} & columns.keys():
        raise ValueError(
            f"Split {name!r} has no column of images, or none of boxes: {sorted(features)}; see `columns`."
        )
    if {"boxes", "corners"} <= columns.keys():
        del columns["boxes" if is_oriented else "corners"]
    return columns


def feature_of(features: Any, column: str) -> Any:
    """The feature of a column, or of a field of the objects in it; `None` if there is none."""
    for part in column.split("."):
        features = getattr(features, "feature", features)
        if not isinstance(features, dict) or part not in features:
            return None
        features = features[part]
    return getattr(features, "feature", features)


def values_of(row: Mapping, column: str) -> list:
    """The values of a column, or of a field of its objects, which are a mapping of lists or a list of mappings."""
    top, _, field = column.partition(".")
    value = row[top]
    if not field:
        return value
    return value[field] if isinstance(value, Mapping) else [item[field] for item in value]
