"""YOLO: a text file for each image, with a box, an oriented box or a polygon in each line."""

import os
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from ...images.reading import image_files
from ..annotation_files import read_list, read_text
from ..annotations import AnnotatedImage, AnnotatedObject, upright_size
from .base import ObjectLayout, register_layout

YOLO_SPLITS, YOLO_CLASSES = ("train", "val", "test"), "classes.txt"


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
        where = self.annotations or self.root
        file = YoloFile(where) if where.is_file() else find_yolo(where)
        if file is None:
            raise ValueError(
                f"No YAML file with `names` and `train`, `val` or `test`, and no classes.txt, found in {where}."
            )
        return file

    def splits(self):
        splits = {}
        for split in YOLO_SPLITS:
            images = {}
            for path in self._description.images(split):
                images[Path(os.path.relpath(path, self.root)).as_posix()] = (path,)
            if images:
                splits[split] = images
        return splits

    def split_list(self, split):
        sources = self._description.sources[split]
        if len(sources) > 1:
            raise ValueError(
                f"Expected one folder or list for the split {split!r} in {self._description.path}, got several."
            )
        return next((path for path in sources if path.is_file()), None)

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
        own = path.parent
        try:
            if path.name == YOLO_CLASSES:
                own = own.parent if own.name == "labels" else own
                contents = {"names": read_list(path), "train": "images" if (own / "images").is_dir() else "."}
            else:
                contents = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(contents, dict) or not (contents.get("names") and contents.keys() & {*YOLO_SPLITS}):
            raise ValueError(f"Expected `names`, and `train`, `val` or `test`, in {path}.")
        if "kpt_shape" in contents:
            raise ValueError(f"{path} describes keypoints (`kpt_shape`). Expected boxes, oriented boxes or polygons.")
        names = contents["names"]
        names = names.items() if isinstance(names, dict) else enumerate(names)
        self.path, self.names = path, {index: str(name) for index, name in names}
        folder = own / str(contents.get("path") or "")
        # The file may state the folder of another machine, or its own folder relative to a folder above.
        self.folder = folder if folder.is_dir() and not folder.samefile(own) else own
        self.sources = {}
        for split in YOLO_SPLITS:
            named = contents.get(split) or []
            paths = [self._find(str(name)) for name in (named if isinstance(named, list) else [named])]
            self.sources[split] = [path for path in paths if path.exists()]

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
            else:
                images += [Path(os.path.normpath(source.parent / line)) for line in read_list(source)]
        return images


def find_yolo(folder: Path) -> YoloFile | None:
    """Return the first YAML file in a folder that describes a YOLO data set, or else `classes.txt`, or `None`."""
    paths = sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))
    if folder.name != "labels":  # its classes.txt belongs to the folder above, where a YAML file comes first
        paths += [*folder.glob(YOLO_CLASSES), *folder.glob(f"labels/{YOLO_CLASSES}")]
    for path in paths:
        try:
            file = YoloFile(path)
        except ValueError:
            continue
        if path.name != YOLO_CLASSES or any(yolo_label(image, folder).is_file() for image in file.images("train")):
            return file
    return None


@lru_cache
def yolo_names(folder: Path) -> dict[int, str]:
    """Return the class names in the YAML file or `classes.txt` of the nearest folder above the labels."""
    for parent in (folder, *folder.parents):
        if file := find_yolo(parent):
            return file.names
    raise ValueError(
        f"No YAML file with `names` and `train`, `val` or `test`, and no {YOLO_CLASSES}, found in {folder} or a folder "
        "above it."
    )


def yolo_label(image: Path, root: Path) -> Path:
    """Return the label file of an image: in `labels` instead of the last folder `images`, or else beside the image."""
    folders = list(Path(os.path.relpath(image, root)).parent.parts)  # the root may have ".."
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return root.joinpath(*folders, f"{image.stem}.txt")


def read_label(path: Path, size: tuple[int, int], names: dict[int, str]) -> list[AnnotatedObject]:
    """Return the objects of a YOLO file, see [`yolo_objects`]; without a file, the image has no objects."""
    return yolo_objects(read_text(path), path, size, names) if path.exists() else []


def yolo_objects(text: str, path: Path | str, size: tuple[int, int], names: dict[int, str]) -> list[AnnotatedObject]:
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
        where = f"{path}, line {number}"
        try:
            index, *values = map(float, line.split())
            label = names[index]
            points = [(x * size[1], y * size[0]) for x, y in zip(values[::2], values[1::2], strict=True)]
            # Points may lie a little outside of the image, but not as far as pixels.
            if len(points) < 2 or not all(-0.5 <= value <= 1.5 for value in values):
                raise ValueError("too few numbers, or not relative to the image")
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{where}: expected 'class x y width height' or 'class x1 y1 x2 y2 x3 y3 …' with a class in "
                f"{[*names]} and coordinates in [0, 1], got {line[:200]!r}."
            ) from error
        if len(points) == 2:
            (x, y), (width, height) = points
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            objects.append(AnnotatedObject(where, label, box))
            continue
        xs, ys = zip(*points)
        area = abs(sum(xs[k - 1] * ys[k] - xs[k] * ys[k - 1] for k in range(len(points)))) / 2
        corners = tuple(points) if len(points) == 4 else None
        outline = [[value for point in points for value in point]]
        box = (min(xs), min(ys), max(xs), max(ys))
        objects.append(AnnotatedObject(where, label, box, corners, area=area, segmentation=outline))
    return objects
