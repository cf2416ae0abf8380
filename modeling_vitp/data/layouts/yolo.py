"""YOLO: a text file for each image, with a box, an oriented box or a polygon in each line."""

import os
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from ...images.reading import image_files, read_errors
from ..annotation_files import read_list, read_text
from ..annotations import AnnotatedImage, AnnotatedObject, Point, upright_size
from .base import ObjectLayout, register_layout

YOLO_SPLITS = ("train", "val", "test")
YOLO_CLASSES = "classes.txt"


@register_layout("yolo")
class Yolo(ObjectLayout):
    """YOLO text: `data.yaml` with `names` and the images of the splits; `labels/NAME.txt` for `images/NAME.png`.

    Exports of LabelImg and Label Studio have `classes.txt` instead, and no splits: all images are for training.
    A line has a class index and a box, an oriented box or a polygon. Answers contain the upright box around it, clipped
    to the image. An image without a label file has no objects.
    """

    suffix = ".txt"
    is_sparse = True

    @classmethod
    def matches(cls, root):
        return find_yolo(root) is not None

    @classmethod
    def read_objects(cls, annotation, image, size):
        return read_label(annotation, size, yolo_names(annotation.parent))

    @cached_property
    def _description(self) -> "YoloFile":
        location = self.annotations or self.root
        return YoloFile(location) if location.is_file() else open_yolo([location])

    def splits(self):
        splits = {}
        for split in YOLO_SPLITS:
            images = {}
            for path in self._description.images(split):
                image_id = Path(os.path.relpath(path, self.root)).as_posix()
                images[image_id] = (path,)
            if images:
                splits[split] = images
        return splits

    def split_list(self, split):
        sources = self._description.sources[split]
        if len(sources) > 1:
            raise ValueError(
                f"Expected one folder or list for the split {split!r} in {self._description.path}, got several."
            )
        for path in sources:
            if path.is_file():
                return path
        return None

    def annotation_file(self, image_id, path):
        label = yolo_label(path, self.root)
        return label if label.parent.is_dir() else None

    def class_names(self):
        return list(self._description.names.values())

    def annotate(self, image_id, paths):
        (path,) = paths
        size = upright_size(path)
        label = self.annotation_file(image_id, path)
        if label is None:
            raise ValueError(f"No folder of labels for {path} found: {yolo_label(path, self.root).parent}.")
        objects = read_label(label, size, self._description.names)
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


class YoloFile:
    """YAML file of a YOLO data set: its class names by index, and the images of its splits.

    LabelImg and Label Studio write `classes.txt` instead, with a name in each line, in the folder of the data set or in
    its folder `labels`. All its images are the split `train`: those in `images`, or else in the folder of the data set.

    Raises:
        ValueError: If the file cannot be read, or lacks `names` or all splits. The message names it.
    """

    def __init__(self, path: Path):
        self.path = path
        file_folder, contents = read_description(path)
        names = contents["names"]
        self.names = {}
        for index, name in names.items() if isinstance(names, dict) else enumerate(names):
            self.names[index] = str(name)
        stated_folder = file_folder / str(contents.get("path") or "")
        # The file may state the folder of another machine, or its own folder relative to a folder above.
        has_stated_folder = stated_folder.is_dir() and not stated_folder.samefile(file_folder)
        self.folder = stated_folder if has_stated_folder else file_folder
        self.sources = {}
        for split in YOLO_SPLITS:
            source_names = contents.get(split) or []
            if not isinstance(source_names, list):
                source_names = [source_names]
            self.sources[split] = []
            for name in source_names:
                source = self._find(str(name))
                if source.exists():
                    self.sources[split].append(source)

    def _find(self, name: str) -> Path:
        """Return the path of a folder or list; exports of Roboflow write `../train/images` for `train/images`."""
        path = Path(os.path.normpath(self.folder / name))
        return path if path.exists() else self.folder / name.removeprefix("../")

    def images(self, split: str) -> list[Path]:
        """Return the images in the folders and lists of a split; a list names images relative to its own folder."""
        images = []
        for source in self.sources[split]:
            if source.is_dir():
                images += image_files(source)
                continue
            for line in read_list(source):
                images.append(Path(os.path.normpath(source.parent / line)))
        return images


def read_description(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a data set, and the content of its YAML file, or the same content for `classes.txt`.

    Raises:
        ValueError: If the file is invalid; the message names it.
    """
    folder = path.parent
    if path.name == YOLO_CLASSES:
        if folder.name == "labels":
            folder = folder.parent
        has_image_folder = (folder / "images").is_dir()
        contents = {"names": read_list(path), "train": "images" if has_image_folder else "."}
    else:
        with read_errors(path, "YAML"):
            contents = yaml.safe_load(read_text(path))
    keys = contents.keys() if isinstance(contents, dict) else set()
    has_splits = not keys.isdisjoint(YOLO_SPLITS)
    if not has_splits or not contents.get("names") or "kpt_shape" in keys:
        raise ValueError(
            f"Expected `names`, and `train`, `val` or `test`, in {path}, of boxes, oriented boxes or polygons, not of "
            "keypoints (`kpt_shape`)."
        )
    return folder, contents


def find_yolo(folder: Path) -> YoloFile | None:
    """Return the first YAML file in a folder that describes a YOLO data set, or else `classes.txt`, or `None`."""
    paths = sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))
    # The classes.txt in `labels` belongs to the folder above, where a YAML file comes first.
    if folder.name != "labels":
        paths += folder.glob(YOLO_CLASSES)
        paths += folder.glob(f"labels/{YOLO_CLASSES}")
    for path in paths:
        try:
            file = YoloFile(path)
        except ValueError:
            continue
        if path.name != YOLO_CLASSES:
            return file
        for image in file.images("train"):
            if yolo_label(image, folder).is_file():
                return file
    return None


def open_yolo(folders: Iterable[Path]) -> YoloFile:
    """Return the YAML file or `classes.txt` in the first folder that has one. Raise a `ValueError` if none has."""
    folders = list(folders)
    for folder in folders:
        file = find_yolo(folder)
        if file is not None:
            return file
    above = " or a folder above it" if len(folders) > 1 else ""
    raise ValueError(
        f"No YAML file with `names` and `train`, `val` or `test`, and no {YOLO_CLASSES}, found in {folders[0]}{above}."
    )


@lru_cache
def yolo_names(folder: Path) -> dict[int, str]:
    """Return the class names in the YAML file or `classes.txt` of the nearest folder above the labels."""
    return open_yolo([folder, *folder.parents]).names


def yolo_label(image: Path, root: Path) -> Path:
    """Return the label file of an image: in `labels` instead of the last folder `images`, or else beside the image."""
    relative_path = Path(os.path.relpath(image, root))  # The root may have "..".
    folders = list(relative_path.parent.parts)
    for level in reversed(range(len(folders))):
        if folders[level] == "images":
            folders[level] = "labels"
            break
    return root.joinpath(*folders, f"{image.stem}.txt")


def read_label(path: Path, size: tuple[int, int], names: dict[int, str]) -> list[AnnotatedObject]:
    """Return the objects of a YOLO file, see [`yolo_objects`]; without a file, the image has no objects."""
    return yolo_objects(read_text(path), path, size, names) if path.exists() else []


def yolo_objects(
    text: str,
    path: Path | str,
    size: tuple[int, int],
    names: dict[int, str],
) -> list[AnnotatedObject]:
    """Return the objects of a YOLO file: lines with a class index and a box, an oriented box or a polygon.

    Args:
        text: content of the file. Coordinates are relative to the image, in [0, 1]. A line with four points is both an
            oriented box and a polygon.
        path: path of the file in error messages.
        size: height and width of the image.
        names: class names by index.

    Raises:
        ValueError: If a line is invalid; the message names it.
    """
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        label_and_points = parse_line(line, size, names)
        if label_and_points is None:
            raise ValueError(
                f"{location}: expected 'class x y width height' or 'class x1 y1 x2 y2 x3 y3 …' with a class in "
                f"{list(names)} and coordinates in [0, 1], got {line[:200]!r}."
            )
        label, points = label_and_points
        if len(points) == 2:
            (x, y), (width, height) = points
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            objects.append(AnnotatedObject(location, label, box))
        else:
            objects.append(polygon_object(location, label, points))
    return objects


def parse_line(line: str, size: tuple[int, int], names: dict[int, str]) -> tuple[str, list[Point]] | None:
    """Return the class and the points of a line in pixels, or `None` if it is invalid.

    The points of a box are its center, and its width and height.
    """
    try:
        index, *coordinates = [float(number) for number in line.split()]
        label = names[index]
    except (ValueError, KeyError):
        return None
    # Points may lie a little outside of the image, but not as far as pixels.
    is_relative = all(-0.5 <= coordinate <= 1.5 for coordinate in coordinates)
    has_points = len(coordinates) >= 4 and len(coordinates) % 2 == 0
    if not has_points or not is_relative:
        return None
    height, width = size
    points = []
    for x, y in zip(coordinates[::2], coordinates[1::2]):
        points.append((x * width, y * height))
    return label, points


def polygon_object(location: str, label: str, points: list[Point]) -> AnnotatedObject:
    """Return the object of a polygon; four points are also the corners of an oriented box."""
    xs, ys = zip(*points)
    doubled_area = 0.0
    for index in range(len(points)):
        doubled_area += xs[index - 1] * ys[index] - xs[index] * ys[index - 1]
    outline = []
    for point in points:
        outline += point
    return AnnotatedObject(
        location,
        label,
        box=(min(xs), min(ys), max(xs), max(ys)),
        corners=tuple(points) if len(points) == 4 else None,
        area=abs(doubled_area) / 2,
        segmentation=[outline],
    )
