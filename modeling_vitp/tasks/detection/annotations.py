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
from ...data.layouts import LAYOUTS, ObjectLayout
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
        objects: annotated objects, or `None` without annotation, as in the test split of a benchmark.
        case: case, such as the scene, of the image, or `None` if the image is one.
    """

    id: str
    image: Path | int
    size: tuple[int, int]
    objects: list[AnnotatedObject] | None
    case: str | None = None


def read_files(
    root: str | Path,
    form: str,
    split: ObjectSplit,
    name: str,
    class_property: str | None = None,
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
    image_folder = root / split.images
    if not root.is_dir():
        raise ValueError(f"data: `root` not found: {root}. Expected an existing folder.")
    if not image_folder.is_dir():
        raise ValueError(f"Split {name!r}: image folder not found: {image_folder}.")
    layout = LAYOUTS[form]
    annotations = None if split.annotations is None else root / split.annotations
    images, annotated = layout.match(root, image_folder, annotations, class_property)
    if split.list is not None:
        source_of_keys = root / split.list
        keys = listed_keys(root, source_of_keys, images, annotated)
    else:
        source_of_keys = annotations
        keys = sorted(annotated if layout.lists_images else {*annotated, *images})

    # All pairs of image and annotation are checked before the first image is read, because reading may take long.
    case_of_key = cases_of_images(root, split, keys, images)
    keys_of_split = []
    for key in keys:
        if key not in images:
            raise ValueError(f"No image for {key!r} of {source_of_keys} in {image_folder}.")
        case = case_of_key[key]
        if not split.has_case(images[key].stem if case is None else case):
            continue
        if key not in annotated:
            raise ValueError(f"No annotation for {images[key]} in {annotations}.")
        keys_of_split.append(key)

    for key in keys_of_split:
        path = below(root, images[key].relative_to(root))
        yield read_file(layout, key, path, annotated[key], case_of_key[key])


def read_file(
    layout: type[ObjectLayout],
    key: str,
    path: Path,
    annotation: Any,
    case: str | None,
) -> AnnotatedFile:
    """Check an image file, and return it with the objects of its annotation, if it has one."""
    check_file(path)
    check_upright(path)
    size = stored_size(path)
    objects = None
    if annotation is not None:
        objects = layout.read_objects(annotation, path, size)
    return AnnotatedFile(key, path, size, objects, case)


def cases_of_images(
    root: Path,
    split: ObjectSplit,
    keys: Sequence[str],
    images: Mapping[str, Path],
) -> dict[str, str | None]:
    """Return the case of each key that has an image, or `None` without a file of cases."""
    keys_with_image = [key for key in keys if key in images]
    paths = [images[key] for key in keys_with_image]
    case_of_key = {}
    for key, fields in zip(keys_with_image, split.read_cases(root, paths)):
        case_of_key[key] = fields.get("case")
    return case_of_key


def listed_keys(
    root: Path,
    list_file: Path,
    images: Mapping[str, Path],
    annotated: Mapping[str, Any],
) -> list[str]:
    """Return the keys of the images in a list of their paths below `root`, or of their names."""
    key_of_path = {path.relative_to(root).as_posix(): key for key, path in images.items()}
    keys = []
    for line in read_list(list_file):
        name = without_suffix(line)
        if line in key_of_path:
            keys.append(key_of_path[line])
        elif name in annotated:
            keys.append(name)
        else:
            keys.append(file_stem(line))
    if len(set(keys)) < len(keys):
        most_frequent = max(keys, key=keys.count)
        raise ValueError(f"{list_file} lists {most_frequent!r} twice.")
    return keys


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

    def take(self, selection: np.ndarray) -> "ImageObjects":
        """Return the objects that are selected by a mask or by indices."""
        indices = np.arange(len(self))[selection]
        return ImageObjects(
            labels=self.labels[indices],
            corners=self.corners[indices],
            difficult=self.difficult[indices],
            crowd=self.crowd[indices],
            areas=self.areas[indices],
            segmentations=tuple(self.segmentations[index] for index in indices),
        )

    def moved_to(self, left: int, top: int) -> "ImageObjects":
        """Return the objects in the coordinates of a window that starts at `left`, `top`. Outlines are not moved."""
        window_start = np.array([left, top])
        return replace(self, corners=self.corners - window_start)

    def clipped_to(self, window: Window) -> "ImageObjects":
        """Return the objects with upright boxes clipped to a window.

        The areas of clipped objects become NaN. Outlines are not clipped.
        """
        x1, y1, x2, y2 = window
        corners = self.corners.clip([x1, y1], [x2, y2])
        is_unchanged = (corners == self.corners).all((1, 2))
        areas = np.where(is_unchanged, self.areas, np.nan)
        return replace(self, corners=corners, areas=areas)

    def boxes(self) -> np.ndarray:
        """Return the upright boxes around the objects, x1, y1, x2, y2, float64 of shape `(n, 4)`."""
        low = self.corners.min(1)
        high = self.corners.max(1)
        return np.concatenate([low, high], 1).reshape(-1, 4)

    def masks(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """Return instance masks, uint8 of shape `(n, height, width)`. Objects without an outline have an empty mask.

        Args:
            size: height and width of the image.
            window: window of the image, or `None` for the whole image.
        """
        height, width = size
        if window is None:
            window = (0, 0, width, height)
        x1, y1, x2, y2 = window
        masks = np.zeros((len(self), y2 - y1, x2 - x1), np.uint8)
        for index, outline in enumerate(self.segmentations):
            if outline is not None:
                mask_of_image = draw_outline(outline, size)
                masks[index] = mask_of_image[y1:y2, x1:x2]
        return masks


def draw_outline(outline: list | dict, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of COCO polygons or run lengths in an image of this size, uint8 of shape `(height, width)`."""
    height, width = size
    return run_lengths.decode([run_lengths.segmToRle(outline, width, height)])[..., 0]


def collect(
    annotated_objects: Sequence[AnnotatedObject],
    classes: ClassNames,
    size: tuple[int, int],
    with_masks: bool = False,
    is_oriented: bool = False,
) -> tuple[ImageObjects, list[str]]:
    """Check the annotated objects of an image and convert them to arrays.

    Args:
        annotated_objects: annotated objects.
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
    labels = []
    corners = []
    difficult = []
    crowd = []
    areas = []
    segmentations = []
    messages = []
    for item in annotated_objects:
        label = classes.index(item.label, item.where)
        if label is None:
            continue
        try:
            points = checked_corners(item, size, with_masks, is_oriented)
        except (ValueError, TypeError) as error:
            messages.append(f"{item.where}: {error}")
            continue
        has_area = is_number(item.area) and item.area > 0
        labels.append(label)
        corners.append(points)
        difficult.append(item.is_difficult)
        crowd.append(item.is_crowd)
        areas.append(item.area if has_area else np.nan)
        segmentations.append(item.segmentation if with_masks else None)
    objects = ImageObjects(
        labels=np.array(labels, np.int64),
        corners=np.array(corners, np.float64).reshape(-1, 4, 2),
        difficult=np.array(difficult, bool),
        crowd=np.array(crowd, bool),
        areas=np.array(areas, np.float64),
        segmentations=tuple(segmentations),
    )
    return objects, messages


def checked_corners(
    item: AnnotatedObject,
    size: tuple[int, int],
    with_masks: bool,
    is_oriented: bool,
) -> Sequence[Point]:
    """Return the corners of the box of an object, after the checks of [`collect`]."""
    if item.corners is not None:
        points = item.corners
    elif is_oriented and item.segmentation:
        check_outline(item.segmentation, size)
        points = smallest_rectangle(item.segmentation)
    else:
        x1, y1, x2, y2 = item.box
        points = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    check_box(item, points, size)
    is_crowd_without_outline = item.is_crowd and item.segmentation is None
    if with_masks and not is_crowd_without_outline:
        check_outline(item.segmentation, size)
    return points


def check_box(
    item: AnnotatedObject,
    points: Sequence[Point],
    size: tuple[int, int],
) -> None:
    """Raise a `ValueError` unless a box with these corners has an area and lies at least partly in the image."""
    height, width = size
    xs, ys = zip(*points)
    shape = list(item.box) if item.corners is None else [list(point) for point in points]
    if not all(map(is_number, (*xs, *ys, *item.box))):
        raise ValueError(f"the box {shape} must have finite numbers.")
    x1, y1, x2, y2 = item.box
    longest_side = max(x2 - x1, y2 - y1)
    # The shoelace formula. Positions are relative to the box, which keeps the precision far from the origin.
    doubled_area = 0
    for index in range(4):
        previous_x = xs[index - 1] - x1
        previous_y = ys[index - 1] - y1
        x = xs[index] - x1
        y = ys[index] - y1
        doubled_area += previous_x * y - x * previous_y
    is_flat = abs(doubled_area) <= FLAT * longest_side**2
    if x2 <= x1 or y2 <= y1 or is_flat:
        raise ValueError(f"the box {shape} has no area.")
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height:
        raise ValueError(f"the box {shape} lies outside the image of {width} x {height} pixels.")


def check_outline(outline: list | dict | None, size: tuple[int, int]) -> None:
    """Raise a `ValueError` unless an outline is polygons of at least three points, or run lengths of the image size."""
    if not outline:
        raise ValueError("the object has no outline (`segmentation`) for its mask.")
    if isinstance(outline, dict):
        check_run_lengths(outline, size)
    else:
        for polygon in outline:
            check_polygon(polygon, outline, size)


def check_run_lengths(outline: dict, size: tuple[int, int]) -> None:
    if tuple(outline.get("size", ())) != size or "counts" not in outline:
        raise ValueError(f"expected run lengths with `counts` and the size {list(size)}, got {outline.get('size')}.")
    try:
        draw_outline(outline, size)
    except (ValueError, RuntimeError) as error:
        counts = str(outline["counts"])[:60]
        raise ValueError(f"the run lengths {counts!r} do not encode a mask of size {list(size)}.") from error


def check_polygon(polygon: Any, outline: list, size: tuple[int, int]) -> None:
    height, width = size
    is_list_of_numbers = isinstance(polygon, (list, tuple)) and all(map(is_number, polygon))
    if not is_list_of_numbers:
        raise ValueError(f"expected a list of polygons [x1, y1, x2, y2, …] as outline, got {str(outline)[:60]}.")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"expected a polygon of at least three points, got {str(polygon)[:60]}.")
    farthest = max(max(polygon), -min(polygon))
    if farthest > 10 * max(size):
        raise ValueError(f"the polygon {str(polygon)[:60]} is far outside the image of {width} x {height} pixels.")


def smallest_rectangle(outline: Sequence[Sequence[float]] | dict) -> tuple[Point, ...]:
    """Return the corners, in order, of the rectangle of minimum area around an outline.

    Args:
        outline: polygons [x1, y1, x2, y2, …], or run lengths with `size`, whose pixels are squares of side 1.
    """
    if isinstance(outline, dict):
        mask = draw_outline(outline, outline["size"])
        rows, columns = np.nonzero(mask)
        if not len(rows):
            raise ValueError("the run lengths have no pixel of the object.")
        pixels = np.stack([columns, rows], 1)
        corners_of_pixel = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        points = pixels[:, None] + corners_of_pixel
        points = points.reshape(-1, 2).astype(float)
    else:
        polygons = [np.reshape(polygon, (-1, 2)) for polygon in outline]
        points = np.concatenate(polygons)
    # Positions are relative to the outline, because OpenCV computes in float32.
    start = points.min(0)
    relative_points = (points - start).astype(np.float32)
    rectangle = cv2.minAreaRect(relative_points)
    corners = cv2.boxPoints(rectangle) + start
    return tuple(map(tuple, corners.tolist()))


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
    rows: datasets.Dataset,
    columns: Mapping[str, str],
    box_format: str,
    name: str,
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
    columns_of_objects = dict(columns)
    image_column = columns_of_objects.pop("image")
    id_column = columns_of_objects.pop("id", None)
    stored_columns = set()
    for column in columns.values():
        if column in rows.features:
            stored_columns.add(column)
        else:
            stored_columns.add(column.split(".")[0])  # It is a field of this column.
    class_names = names_of_labels(rows.features, columns)
    cases = cases_of_rows(rows)
    index_of_id = {}
    for index, row in enumerate(rows.select_columns(sorted(stored_columns))):
        row_id = str(index) if id_column is None else str(values_of(row, id_column))
        if row_id in index_of_id:
            raise ValueError(
                f"Split {name!r}: rows {index_of_id[row_id]} and {index} have the same {id_column!r}, {row_id}. "
                "Use unique ids, or set another column as `id` in `columns`."
            )
        index_of_id[row_id] = index
        row_name = f"row {row_id} of split {name!r}"
        try:
            image = row[image_column]
            if image is None:
                raise ValueError(f"the column {image_column!r} is empty.")
            size = image_size(image)
            lists = {key: values_of(row, column) for key, column in columns_of_objects.items()}
            if "area" in lists and lists["area"] is None:
                del lists["area"]
            objects = list(row_objects(lists, class_names, box_format, row_name))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{row_name}: {error}") from error
        case = cases[index] if cases else None
        yield AnnotatedFile(row_id, index, size, objects, case)


def names_of_labels(features: datasets.Features, columns: Mapping[str, str]) -> list[str] | None:
    """Return the class names that the feature of the labels has, or `None` without such names."""
    if "labels" not in columns:
        return None
    feature = with_fields(features).get(columns["labels"])
    element_feature = getattr(feature, "feature", feature)  # The labels of an image are a list.
    return getattr(element_feature, "names", None)


def row_objects(
    lists: Mapping[str, Sequence],
    names: Sequence[str] | None,
    box_format: str,
    where: str,
) -> Iterator[AnnotatedObject]:
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected lists of the same length for the objects, got {lengths}.")
    number_of_objects = max(lengths.values())
    for index in range(number_of_objects):
        fields = {key: values[index] for key, values in lists.items()}
        label = fields.get("labels", 0)
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ValueError(f"object {index}: expected a label in [0, {len(names)}), got {label}.")
            label = names[label]
        corners = None
        if "corners" in fields:
            corners = corners_in_row(fields["corners"], index)
            xs, ys = zip(*corners)
            box = (min(xs), min(ys), max(xs), max(ys))
        else:
            x, y, third, fourth = fields["boxes"]
            box = (x, y, x + third, y + fourth) if box_format == "xywh" else (x, y, third, fourth)
        yield AnnotatedObject(
            where=f"{where}, object {index}",
            label=label,
            box=box,
            corners=corners,
            is_difficult=read_flag(fields.get("difficult"), "difficult"),
            is_crowd=read_flag(fields.get("crowd"), "crowd"),
            area=fields.get("area"),
            segmentation=fields.get("masks"),
        )


def corners_in_row(corners: Sequence, index: int) -> tuple[Point, ...]:
    """Return the corners of the object at `index`, which are four points or eight numbers."""
    coordinates = []
    for point_or_number in corners:
        if isinstance(point_or_number, list):
            coordinates += point_or_number
        else:
            coordinates.append(point_or_number)
    if len(coordinates) != 8:
        raise ValueError(f"object {index}: expected four corners of two numbers, got {len(coordinates)} numbers.")
    return tuple(zip(coordinates[::2], coordinates[1::2]))


def columns_of(
    features: datasets.Features,
    settings: Mapping[str, str],
    name: str,
    is_oriented: bool = False,
) -> dict[str, str]:
    """Return the columns for [`read_rows`], see [`~modeling_vitp.data.rows.find_columns`]."""
    available = with_fields(features)
    columns = find_columns(available, USUAL, settings, name)
    if "image" not in columns:
        raise missing_column(available, "image", name)
    has_boxes = "boxes" in columns
    has_corners = "corners" in columns
    if not has_boxes and not has_corners:
        raise missing_column(available, "boxes", name)
    if has_boxes and has_corners:
        del columns["boxes" if is_oriented else "corners"]
    return columns


def with_fields(features: datasets.Features) -> dict[str, Any]:
    """Return the features of columns and of their fields, such as `objects.bbox`, by name."""
    features_by_name = {}
    for name, feature in features.items():
        fields = getattr(feature, "feature", feature)  # A list of mappings has them in its elements.
        if isinstance(fields, dict):
            for field, kind in fields.items():
                features_by_name[f"{name}.{field}"] = kind
    features_by_name.update(features)
    return features_by_name


def values_of(row: Mapping, column: str) -> list:
    """Return the values of a column, or of a field of its objects (a mapping of lists, or a list of mappings)."""
    if column in row:
        return row[column]
    objects_column, _, field = column.partition(".")
    objects = row[objects_column]
    if isinstance(objects, Mapping):
        return objects[field]
    return [fields[field] for fields in objects]
