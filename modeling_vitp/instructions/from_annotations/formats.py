"""Readers of annotation files: COCO JSON, Pascal VOC XML, DOTA and YOLO text, for instructions and for detection."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ...images.reading import below, image_files, visible_paths
from ..boxes import Box

SIDES = ("xmin", "ymin", "xmax", "ymax")
CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")  # Fields of `robndbox` in DIOR-R.
YOLO_SPLITS, YOLO_CLASSES = ("train", "val", "test"), "classes.txt"
STATISTICS = ".aux.xml"  # GDAL writes such a file beside an image whose statistics it has computed.
CLASS_FLAG = re.compile(r"\s+-1$|\s{2,}[01]$")  # Flags in the class lists of Pascal VOC; `scene 1` is a name.
COCO_KEYS = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}

Point = tuple[float, float]


@dataclass(frozen=True)
class AnnotatedObject:
    """Object as annotated in its file, in pixels and with the class name of the file.

    If the annotation is an oriented box, `corners` has its corners in order around the object, and `box` encloses them.
    `segmentation` has COCO's polygons or run lengths. `where` names the file and the object in error messages.
    """

    where: str
    label: str
    box: Box
    corners: tuple[Point, Point, Point, Point] | None = None
    is_difficult: bool = False
    is_crowd: bool = False
    area: float | None = None
    caption: str | None = None
    segmentation: list | dict | None = None


def read_annotation(path: Path) -> Any:
    """Return the content of a JSON file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"File {path} not found.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """Return the content of a text file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_list(path: Path) -> list[str]:
    """Return the nonempty lines of a file, without the flags after the names in class lists of Pascal VOC."""
    return [CLASS_FLAG.sub("", line.strip()) for line in read_text(path).splitlines() if line.strip()]


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not valid XML: {error}") from error


def files_by_key(
    folder: Path, suffix: str, key: Callable[[Path], str] = lambda path: path.stem, within: str = ""
) -> dict[str, Path]:
    """Return the annotation files in a folder and its subfolders, by key.

    Args:
        folder: folder to search.
        suffix: suffix of the files.
        key: function from a path to its key.
        within: text in the names of subfolders; if some have it, only those are searched.

    Raises:
        ValueError: If two files have the same key, or no file is found.
    """
    paths = [path for path in visible_paths(folder, f"*{suffix}") if not path.name.lower().endswith(STATISTICS)]
    paths = [path for path in paths if within in path.relative_to(folder).parent.as_posix().lower()] or paths
    files = {}
    for path in paths:
        other = files.setdefault(key(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} both annotate {key(path)}. Set `annotations` to the right folder.")
    if not files:
        raise ValueError(f"No {suffix} file found in {folder}.")
    return files


def is_below(root: Path, path: Path) -> bool:
    """Return whether a path is below a folder after symbolic links are resolved."""
    try:
        return bool(below(root, path))
    except ValueError:
        return False


def is_number(value: object) -> bool:
    """Return whether a value is a finite number in the range of coordinates."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def check_size(stated: Iterable[Any], size: tuple[int, int], path: Path, image: Path) -> None:
    """Raise a `ValueError` if the height and width in an annotation, if it has any, differ from those of the image."""
    height, width = stated
    try:
        height, width = int(float(height or 0)), int(float(width or 0))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: expected the height and width of {image}, got {height!r} and {width!r}.") from None
    if height > 0 and width > 0 and (height, width) != size:  # Some files state 0.
        raise ValueError(f"{path}: {width} x {height} pixels is not the size of {image}, {size[1]} x {size[0]}.")


def read_voc(path: Path, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
    """Return the objects of a Pascal VOC file; `size` is the height and width of its image."""
    root = parse_xml(path)
    stated = (root.findtext(f"size/{side}", "") for side in ("height", "width"))
    check_size((side if re.fullmatch(r"\s*[\d.]+\s*", side) else 0 for side in stated), size, path, image)
    return voc_objects(root, path)


def voc_objects(root: ElementTree.Element, path: Path | str) -> list[AnnotatedObject]:
    """Return the objects of a Pascal VOC document, with axis-aligned (`bndbox`) or oriented (`robndbox`) boxes.

    Raises:
        ValueError: If an object has no box; the message names it.
    """
    objects = []
    for index, node in enumerate(root.iterfind("object")):
        where = f"{path}, object {index}"
        label = node.findtext("name", "").strip()
        is_difficult = node.findtext("difficult", "0").strip() == "1"
        try:
            if node.find("robndbox") is None:
                box = tuple(float(node.findtext(f"bndbox/{side}")) for side in SIDES)
                objects.append(AnnotatedObject(where, label, box, is_difficult=is_difficult))
            else:
                corners = [tuple(float(node.findtext(f"robndbox/{axis}_{name}")) for axis in "xy") for name in CORNERS]
                objects.append(oriented_object(where, label, corners, is_difficult))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected a box of four numbers or four corners.") from error
    return objects


def read_dota(path: Path, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
    """Return the objects of a DOTA file; `image` and `size` are not used, as the file does not state them."""
    return dota_objects(read_text(path), path)


def dota_objects(text: str, path: Path | str) -> list[AnnotatedObject]:
    """Return the objects of a DOTA file: lines with four corners, a class and, optionally, a difficulty.

    Raises:
        ValueError: If a line is invalid; the message names it.
    """
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith(("imagesource", "gsd")):
            continue
        where = f"{path}, line {number}"
        try:
            values = [float(field) for field in fields[:8]]
            corners = list(zip(values[::2], values[1::2], strict=True))
            (is_difficult,) = map(int, fields[9:] or ["0"])
            objects.append(oriented_object(where, fields[8], corners, bool(is_difficult)))
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{where}: expected 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult', the class without spaces, got {line!r}."
            ) from error
    return objects


def oriented_object(where: str, label: str, corners: list[Point], is_difficult: bool) -> AnnotatedObject:
    xs, ys = zip(*corners)
    return AnnotatedObject(where, label, (min(xs), min(ys), max(xs), max(ys)), tuple(corners), is_difficult)


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


def read_yolo(path: Path, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
    """Return the objects of a YOLO file; without a file, the image has no objects."""
    return yolo_objects(read_text(path), path, size, yolo_names(path.parent)) if path.exists() else []


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


class CocoFile:
    """Content of a COCO JSON file: its images and the objects in them.

    Raises:
        ValueError: If an entry is incomplete, repeats an id or a file name, or refers to an unknown image. The message
            names it.
    """

    def __init__(self, path: Path, contents: dict):
        check_coco(contents, path)
        self.path, self.images, self.has_annotations = path, contents["images"], "annotations" in contents
        self.categories = {category["id"]: category["name"] for category in contents["categories"]}
        self._annotations = defaultdict(list)
        for annotation in contents.get("annotations", ()):
            self._annotations[annotation["image_id"]].append(annotation)

    def names_with_objects(self) -> set[str]:
        """Return the names of the categories that have annotations."""
        used = {str(item.get("category_id")) for items in self._annotations.values() for item in items}
        return {name for index, name in self.categories.items() if str(index) in used}

    def objects(self, entry: dict, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
        """Return the objects of an entry of `images`; `size` is the height and width of the file `image`."""
        check_size((entry.get("height"), entry.get("width")), size, self.path, image)
        return [coco_object(annotation, self.categories, self.path) for annotation in self._annotations[entry["id"]]]


def coco_object(annotation: dict, names: dict[int | str, str], path: Path | str) -> AnnotatedObject:
    """Return the object of an annotation of a COCO file; `names` maps category ids to names.

    Raises:
        ValueError: If the annotation has no box, or an unknown category.
    """
    where = f"{path}, annotation {annotation.get('id')}"
    category = annotation.get("category_id")
    if not isinstance(category, (int, str)) or category not in names:
        raise ValueError(f"{where}: expected `category_id` to be an id of `categories`, got {category!r}.")
    try:
        left, top, width, height = sides = read_numbers(annotation["bbox"])
        box = (left, top, left + width, top + height)
        is_relative = all(0 <= side <= 1 for side in sides) and any(side % 1 for side in sides)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected `bbox` to be four numbers, got {annotation.get('bbox')!r}.") from error
    if is_relative:
        raise ValueError(f"{where}: expected `bbox` in pixels, got {sides}, which is relative to the image.")
    try:
        area, outline = read_numbers([annotation.get("area"), annotation.get("segmentation") or None])
        is_crowd = read_flag(annotation.get("iscrowd"), "iscrowd")
    except ValueError as error:
        raise ValueError(f"{where}: invalid `iscrowd`, `area` or outline (`segmentation`): {error}") from error
    label = names[category]
    caption = annotation.get("caption")
    return AnnotatedObject(
        where,
        label,
        box,
        is_crowd=is_crowd,
        area=area,
        caption=None if isinstance(caption, str) and not caption.strip() else caption,
        segmentation=outline,
    )


def read_numbers(values: list) -> list:
    """Return a nested list in which numbers that are written as text are numbers. Raise a `ValueError` for others."""
    if isinstance(values, str):
        return float(values)
    return [read_numbers(value) for value in values] if isinstance(values, list) else values


def read_flag(value: Any, name: str) -> bool:
    """Return a flag, 0 or 1 as a number, a bool or text; a missing one is false. Raise a `ValueError` for others."""
    flag = value.strip().lower() if isinstance(value, str) else value
    if flag in (None, "", 0, "0", "false"):
        return False
    if flag in (1, "1", "true"):
        return True
    raise ValueError(f"expected `{name}` to be 0 or 1, got {value!r}.")


def check_coco(contents: dict, path: Path) -> None:
    """Raise a `ValueError` that names the first invalid entry."""
    for kind, keys in COCO_KEYS.items():
        entries = contents.get(kind, [])
        if not isinstance(entries, list):
            raise ValueError(f"{path}: `{kind}` must be a list, got {str(entries)[:80]!r}.")
        for index, entry in enumerate(entries):
            for key in keys:
                value = entry.get(key) if isinstance(entry, dict) else None
                is_name = key in ("file_name", "name")
                if not isinstance(value, str if is_name else (int, str)) or (is_name and not value):
                    raise ValueError(f"{path}: entry {index} of `{kind}` has no valid {key!r}: {str(entry)[:80]!r}.")
    for kind, key in (("images", "id"), ("categories", "id"), ("images", "file_name")):
        seen = set()
        for entry in contents.get(kind, []):
            if entry[key] in seen:
                raise ValueError(f"{path}: two entries of `{kind}` have the {key} {entry[key]!r}. Merge them.")
            seen.add(entry[key])
    ids = {entry["id"] for entry in contents.get("images", [])}
    for annotation in contents.get("annotations", []):
        if annotation["image_id"] not in ids:
            raise ValueError(
                f"{path}, annotation {annotation.get('id')}: unknown `image_id` {annotation['image_id']!r}."
            )
