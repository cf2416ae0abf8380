"""Readers of detection annotations: files in COCO, VOC, DOTA, YOLO and GeoJSON format, and rows of data sets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
from faster_coco_eval.core import mask as run_lengths

from ...command.settings import Probability
from ...data.annotation_files import is_number, read_flag, read_list
from ...data.annotations import AnnotatedObject, Point
from ...data.classes import ClassNames
from ...data.files import SplitFiles, TileSettings
from ...data.layouts import LAYOUTS
from ...data.layouts.coco import file_stem, without_suffix
from ...data.rows import cases_of_rows, find_columns, image_size, missing_column
from ...data.windows import MIN_IMAGE_SHARE, MIN_OBJECT_SHARE
from ...images.reading import Window, below, check_file, check_upright, stored_size


@dataclass(frozen=True)
class ObjectTiles(TileSettings):
    """Square windows that images with objects are cut into, see [`~modeling_vitp.data.windows.object_windows`].

    Args:
        min_image_share: smallest share of a window that the image covers.
        min_object_share: smallest share of an object's area in a window with the object.
    """

    min_image_share: Probability = MIN_IMAGE_SHARE
    min_object_share: Probability = MIN_OBJECT_SHARE


@dataclass(frozen=True, kw_only=True)
class ObjectSplit(SplitFiles):
    """Settings of a split of images with annotation files, see [`read_files`]."""

    images: str
    annotations: str | None = None
    tile: ObjectTiles | None = None


@dataclass(frozen=True)
class AnnotatedFile:
    """Image of a split with its annotated objects.

    Args:
        id: id of the image.
        image: path of the file, or index of the row.
        size: height and width of the image.
        found: annotated objects, or `None` without annotation, as in the test split of a benchmark.
        case: case, such as the scene, of the image, or `None` if the image is one.
    """

    id: str
    image: Path | int
    size: tuple[int, int]
    found: list[AnnotatedObject] | None
    case: str | None = None


def read_files(
    root: str | Path, form: str, split: ObjectSplit, name: str, class_property: str | None = None
) -> Iterator[AnnotatedFile]:
    """Yield the images of a split with their objects, sorted by name or in the order of `list`.

    Args:
        root: folder of the data set.
        form: `"coco"`, `"voc"` (`bndbox`, or `robndbox` of DIOR-R), `"dota"`, `"yolo"` (with the class names in a YAML
            file in a folder above the labels), `"geojson"` (GeoJSON or GeoPackage over GeoTIFFs), or a name of
            [`~modeling_vitp.data.layouts.register_layout`].
        split: settings of the split, with paths relative to `root`. `images` is the folder of the images, which are
            matched to annotations by name without suffix; COCO images are searched by `file_name` first. `annotations`
            is the COCO file, or a folder with one file per image, and may be missing; for GeoJSON or GeoPackage it is a
            file or a folder, see [`~modeling_vitp.data.geodata.feature_files`]. `list` is a
            file with the names of the images of the split, or their paths below `root`, one per line. `part` is a range
            in [0, 1) that selects images by a hash of their name or case, and `part_seed` selects others. `cases` is a
            JSON file with the case (such as a scene) of each image by its path below `root`.
        name: name of the split in errors.
        class_property: property with the class of a feature, with `"geojson"`.

    Raises:
        ValueError: if a file, line or object is invalid, an image has no annotation or is not stored upright, an
            annotation has no image, or two files have the same name.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: `root` not found: {root}. Expected an existing folder.")
    if not (root / split.images).is_dir():
        raise ValueError(f"Split {name!r}: image folder not found: {root / split.images}.")
    layout = LAYOUTS[form]
    annotations = None if split.annotations is None else root / split.annotations
    images, annotated = layout.match(root, root / split.images, annotations, class_property)
    listed = None
    if split.list is not None:
        lines = read_list(root / split.list)
        by_path = {path.relative_to(root).as_posix(): key for key, path in images.items()}
        listed = [
            by_path.get(line) or (key if (key := without_suffix(line)) in annotated else file_stem(line))
            for line in lines
        ]
        if len(set(listed)) < len(listed):
            raise ValueError(f"{root / split.list} lists {max(listed, key=listed.count)!r} twice.")
    if listed is None:
        chosen = sorted(annotated if layout.lists_images else {*annotated, *images})
    else:
        chosen = listed
    known = [key for key in chosen if key in images]
    cases = dict(zip(known, split.read_cases(root, [images[key] for key in known])))
    of_case = {key: case.get("case", images[key].stem) for key, case in cases.items()}
    chosen = [key for key in chosen if key not in images or split.has_case(of_case[key])]
    for key in chosen:
        if key not in images:
            where = root / (split.annotations if listed is None else split.list)
            raise ValueError(f"No image for {key!r} of {where} in {root / split.images}.")
        if key not in annotated:
            raise ValueError(f"No annotation for {images[key]} in {root / split.annotations}.")
    for key in chosen:
        path = below(root, images[key].relative_to(root))
        check_file(path)
        check_upright(path)
        size = stored_size(path)
        found = None if annotated[key] is None else layout.read_objects(annotated[key], path, size)
        yield AnnotatedFile(key, path, size, found, **cases[key])


# Largest area of a box that counts as empty, relative to the square of its longer extent, to allow for rounding.
FLAT = 1e-6


@dataclass(frozen=True)
class ImageObjects:
    """Annotated objects of an image.

    Args:
        labels: class indices, int64 of shape `(n,)`.
        corners: corners of the boxes in pixels, in order around each box, float64 of shape `(n, 4, 2)`. Upright boxes
            start at the top left.
        difficult, crowd: whether an object is marked as difficult, or as a crowd region, bool of shape `(n,)`.
        areas: annotated areas in pixels, float64 of shape `(n,)`, NaN if not annotated.
        segmentations: COCO polygons or run lengths of each object, or `None`.
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
        """Return the objects that are selected by a mask or by indices."""
        indices = np.arange(len(self))[chosen]
        names = ("labels", "corners", "difficult", "crowd", "areas")
        arrays = {name: getattr(self, name)[indices] for name in names}
        return ImageObjects(**arrays, segmentations=tuple(self.segmentations[index] for index in indices))

    def moved_to(self, left: int, top: int) -> "ImageObjects":
        """Return the objects in the coordinates of a window that starts at `left`, `top`. Outlines are not moved."""
        return replace(self, corners=self.corners - np.array([left, top]))

    def clipped_to(self, window: Window) -> "ImageObjects":
        """Return the objects with upright boxes clipped to a window.

        The areas of clipped objects become NaN. Outlines are not clipped.
        """
        left, top, right, bottom = window
        corners = self.corners.clip([left, top], [right, bottom])
        is_whole = (corners == self.corners).all((1, 2))
        return replace(self, corners=corners, areas=np.where(is_whole, self.areas, np.nan))

    def boxes(self) -> np.ndarray:
        """Return the upright boxes around the objects, x1, y1, x2, y2, float64 of shape `(n, 4)`."""
        return np.concatenate([self.corners.min(1), self.corners.max(1)], 1).reshape(-1, 4)

    def masks(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """Return instance masks, uint8 of shape `(n, height, width)`. Objects without an outline have an empty mask.

        Args:
            size: height and width of the image.
            window: window of the image, or `None` for the whole image.
        """
        left, top, right, bottom = window or (0, 0, *size[::-1])
        masks = np.zeros((len(self), bottom - top, right - left), np.uint8)
        for mask, outline in zip(masks, self.segmentations):
            if outline is not None:
                mask[:] = draw_outline(outline, size)[top:bottom, left:right]
        return masks


def draw_outline(outline: list | dict, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of COCO polygons or run lengths in an image of this size, uint8 of shape `(height, width)`."""
    height, width = size
    return run_lengths.decode([run_lengths.segmToRle(outline, width, height)])[..., 0]


def collect(
    found: Sequence[AnnotatedObject],
    classes: ClassNames,
    size: tuple[int, int],
    with_masks: bool = False,
    is_oriented: bool = False,
) -> tuple[ImageObjects, list[str]]:
    """Check the annotated objects of an image and convert them to arrays.

    Args:
        found: annotated objects.
        classes: class names of the model.
        size: height and width of the image.
        with_masks: whether every object needs an outline.
        is_oriented: whether an object that has an outline, but no oriented box, gets the smallest rectangle around it.

    Returns:
        The valid objects, and an error message for each invalid object. An object is invalid if its box has no area,
        lies outside the image or has numbers that are not finite, or if its outline cannot be drawn.

    Raises:
        ValueError: if the class of an object is unknown.
    """
    labels, corners, kept, wrong = [], [], [], []
    for item in found:
        label = classes.index(item.label, item.where)
        if label is None:
            continue
        left, top, right, bottom = item.box
        points = item.corners or ((left, top), (right, top), (right, bottom), (left, bottom))
        try:
            if is_oriented and item.corners is None and item.segmentation:
                check_outline(item.segmentation, size)
                points = smallest_rectangle(item.segmentation)
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
    """Raise a `ValueError` unless a box with these corners has an area and lies at least partly in the image."""
    xs, ys = zip(*points)
    shown = list(item.box) if item.corners is None else [list(point) for point in points]
    if not all(map(is_number, (*xs, *ys, *item.box))):
        raise ValueError(f"the box {shown} must have finite numbers.")
    left, top, right, bottom = item.box
    doubled = sum((xs[k - 1] - left) * (ys[k] - top) - (xs[k] - left) * (ys[k - 1] - top) for k in range(4))
    if right <= left or bottom <= top or abs(doubled) <= FLAT * max(right - left, bottom - top) ** 2:
        raise ValueError(f"the box {shown} has no area.")
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= size[1] or min(ys) >= size[0]:
        raise ValueError(f"the box {shown} lies outside the image of {size[1]} x {size[0]} pixels.")


def check_outline(outline: list | dict | None, size: tuple[int, int]) -> None:
    """Raise a `ValueError` unless an outline is polygons of at least three points, or run lengths of the image size."""
    height, width = size
    if not outline:
        raise ValueError("the object has no outline (`segmentation`) for its mask.")
    if isinstance(outline, dict):
        if tuple(outline.get("size", ())) != size or "counts" not in outline:
            raise ValueError(
                f"expected run lengths with `counts` and the size {list(size)}, got {outline.get('size')}."
            )
        try:
            draw_outline(outline, size)
        except (ValueError, RuntimeError) as error:
            counts = str(outline["counts"])[:60]
            raise ValueError(f"the run lengths {counts!r} do not encode a mask of size {list(size)}.") from error
        return
    for polygon in outline:
        if not (isinstance(polygon, (list, tuple)) and all(map(is_number, polygon))):
            raise ValueError(f"expected a list of polygons [x1, y1, x2, y2, …] as outline, got {str(outline)[:60]}.")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"expected a polygon of at least three points, got {str(polygon)[:60]}.")
        if not all(abs(value) <= 10 * max(size) for value in polygon):
            raise ValueError(f"the polygon {str(polygon)[:60]} is far outside the image of {width} x {height} pixels.")


def smallest_rectangle(outline: Sequence[Sequence[float]] | dict) -> tuple[Point, ...]:
    """Return the corners, in order, of the rectangle of minimum area around an outline.

    Args:
        outline: polygons [x1, y1, x2, y2, …], or run lengths with `size`, whose pixels are squares of side 1.
    """
    if isinstance(outline, dict):
        pixels = np.argwhere(draw_outline(outline, outline["size"]))[:, None, ::-1]
        points = (pixels + np.array([(0, 0), (1, 0), (1, 1), (0, 1)])).reshape(-1, 2).astype(float)
        if not len(points):
            raise ValueError("the run lengths have no pixel of the object.")
    else:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in outline])
    start = points.min(0)  # OpenCV computes in float32.
    corners = cv2.boxPoints(cv2.minAreaRect((points - start).astype(np.float32)))
    return tuple(map(tuple, (corners + start).tolist()))


# Usual names of columns. A name with a dot is a field of a column with all objects of an image.
USUAL = {
    "image": ("image",),
    "id": ("id", "image_id"),
    "boxes": ("objects.bbox", "objects.boxes"),
    "corners": ("objects.corners",),
    "labels": ("objects.category", "objects.label", "objects.labels", "objects.categories"),
    "crowd": ("objects.iscrowd", "objects.crowd"),
    "difficult": ("objects.difficult",),
    "area": ("objects.area",),
    "masks": ("objects.segmentation",),
}


def read_rows(
    rows: datasets.Dataset, columns: Mapping[str, str], box_format: str, name: str
) -> Iterator[AnnotatedFile]:
    """Yield the images of a data set of rows with their objects.

    Args:
        rows: data set with undecoded images, and optionally `patient` or `case`.
        columns: names of the columns for `image`, `boxes` or `corners`, and optionally `id`, `labels`, `crowd`,
            `difficult`, `area` and `masks`, see [`columns_of`].
        box_format: format of `boxes` in pixels, `"xywh"` or `"xyxy"`, with x, y of the top left corner first.
        name: name of the split in errors.

    Raises:
        ValueError: if a row is invalid, or if two rows have the same id.
    """
    lists = {key: column for key, column in columns.items() if key not in ("image", "id")}
    needed = {column if column in rows.features else column.split(".")[0] for column in columns.values()}
    labels = with_fields(rows.features).get(columns.get("labels"))
    names = getattr(getattr(labels, "feature", labels), "names", None)
    seen, cases = {}, cases_of_rows(rows)
    for index, row in enumerate(rows.select_columns(sorted(needed))):
        row_id = str(values_of(row, columns["id"]) if "id" in columns else index)
        where = f"row {row_id} of split {name!r}"
        if (first := seen.setdefault(row_id, index)) != index:
            raise ValueError(
                f"Split {name!r}: rows {first} and {index} have the same {columns['id']!r}, {row_id}. Use unique ids, "
                "or set another column as `id` in `columns`."
            )
        try:
            if row[columns["image"]] is None:
                raise ValueError(f"the column {columns['image']!r} is empty.")
            size = image_size(row[columns["image"]])
            values = {key: values_of(row, column) for key, column in lists.items()}
            if values.get("area", ()) is None:
                del values["area"]
            found = list(row_objects(values, names, box_format, where))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield AnnotatedFile(row_id, index, size, found, cases and cases[index])


def row_objects(
    values: Mapping[str, Sequence], names: Sequence[str] | None, box_format: str, where: str
) -> Iterator[AnnotatedObject]:
    lengths = {key: len(value) for key, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected lists of the same length for the objects, got {lengths}.")
    for index in range(next(iter(lengths.values()))):
        item = {key: value[index] for key, value in values.items()}
        label = item.get("labels", 0)
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ValueError(f"object {index}: expected a label in [0, {len(names)}), got {label}.")
            label = names[label]
        corners = None
        if "corners" in item:
            flat = [number for part in item["corners"] for number in (part if isinstance(part, list) else [part])]
            corners = tuple(zip(flat[::2], flat[1::2], strict=True))
            if len(corners) != 4:
                raise ValueError(f"object {index}: expected four corners of two numbers, got {len(flat)} numbers.")
            box = (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2]))
        else:
            left, top, right, bottom = item["boxes"]
            box = (left, top, left + right, top + bottom) if box_format == "xywh" else (left, top, right, bottom)
        yield AnnotatedObject(
            f"{where}, object {index}",
            label,
            box,
            corners,
            read_flag(item.get("difficult"), "difficult"),
            read_flag(item.get("crowd"), "crowd"),
            item.get("area"),
            segmentation=item.get("masks"),
        )


def columns_of(
    features: datasets.Features, settings: Mapping[str, str], name: str, is_oriented: bool = False
) -> dict[str, str]:
    """Return the columns for [`read_rows`], see [`~modeling_vitp.data.rows.find_columns`]."""
    known = with_fields(features)
    columns = find_columns(known, USUAL, settings, name)
    if "image" not in columns:
        raise missing_column(known, "image", name)
    if not {"boxes", "corners"} & columns.keys():
        raise missing_column(known, "boxes", name)
    if {"boxes", "corners"} <= columns.keys():
        del columns["boxes" if is_oriented else "corners"]
    return columns


def with_fields(features: datasets.Features) -> dict[str, Any]:
    """Return the features of columns and of their fields, such as `objects.bbox`, by name."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    parts = {name: fields for name, fields in inner.items() if isinstance(fields, dict)}
    fields = {f"{name}.{field}": kind for name, fields in parts.items() for field, kind in fields.items()}
    return fields | dict(features)


def values_of(row: Mapping, column: str) -> list:
    """Return the values of a column, or of a field of its objects (a mapping of lists, or a list of mappings)."""
    if column in row:
        return row[column]
    top, _, field = column.partition(".")
    value = row[top]
    return value[field] if isinstance(value, Mapping) else [item[field] for item in value]
