"""Formats of annotated objects, each read by one function: COCO JSON, Pascal VOC's XML, DOTA's text."""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..boxes import Box

SIDES = ("xmin", "ymin", "xmax", "ymax")
STATISTICS = ".aux.xml"  # which GDAL leaves beside images that it was asked about
CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")  # of DIOR-R's `robndbox`

Point = tuple[float, float]


@dataclass(frozen=True)
class AnnotatedObject:
    """An object as its file has it, in pixels and with the class as it is called there.

    `corners`, in order around it, are there where it is annotated with an oriented box, and `box` is around them then.
    `segmentation` is COCO's: polygons or run lengths. `where` names the file and the object, for errors.
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


def voc_objects(root: ElementTree.Element, path: Path | str) -> list[AnnotatedObject]:
    """The objects of a Pascal VOC document, upright (`bndbox`) or oriented (`robndbox`, as DIOR-R has them).

    Raises:
        ValueError: names the first that has no box.
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
                objects.append(oriented(where, label, corners, is_difficult))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has no box of four numbers, or of four corners.") from error
    return objects


def voc_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width of the image that a Pascal VOC document states, if it does; some write 0."""
    try:
        height, width = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if height > 0 and width > 0 else None


def check_size(stated: tuple[int, int], size: tuple[int, int], path: Path, image: Path) -> None:
    """Raises a `ValueError` if the height and width that an annotation states are not those of the image."""
    if stated != size:
        raise ValueError(f"{path}: {stated[1]} x {stated[0]} pixels is not the size of {image}, {size[1]} x {size[0]}.")


def dota_objects(text: str, path: Path | str) -> list[AnnotatedObject]:
    """The objects of one of DOTA's files: lines with four corners, a class and, optionally, how difficult it is.

    Raises:
        ValueError: names the first line that is none.
    """
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith(("imagesource", "gsd")):
            continue
        where = f"{path}, line {number}"
        try:
            values = [float(field) for field in fields[:8]]
            is_difficult = len(fields) > 9 and fields[9] != "0"
            objects.append(oriented(where, fields[8], list(zip(values[::2], values[1::2], strict=True)), is_difficult))
        except (ValueError, IndexError) as error:
            raise ValueError(f"{where}: {line!r} is not 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult'.") from error
    return objects


def oriented(where: str, label: str, corners: list[Point], is_difficult: bool) -> AnnotatedObject:
    xs, ys = zip(*corners)
    return AnnotatedObject(where, label, (min(xs), min(ys), max(xs), max(ys)), tuple(corners), is_difficult)


def coco_annotations(contents: dict) -> dict[int | str, list[dict]]:
    """The annotations of each image, by its id, of what [`check_coco`] has found to be a COCO file."""
    annotations = defaultdict(list)
    for annotation in contents.get("annotations", ()):
        annotations[annotation["image_id"]].append(annotation)
    return annotations


def coco_object(annotation: dict, names: dict[int | str, str], path: Path | str) -> AnnotatedObject:
    """An annotation of a COCO file.

    Args:
        names: of the categories, by id.

    Raises:
        ValueError: if it has no box, or none of the categories.
    """
    where = f"{path}, annotation {annotation.get('id')}"
    try:
        left, top, width, height = annotation["bbox"]
        label = names[annotation["category_id"]]
        box = (left, top, left + width, top + height)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where} has no box of four numbers, or no known category: {error!r}.") from error
    return AnnotatedObject(
        where,
        label,
        box,
        is_crowd=bool(annotation.get("iscrowd")),
        area=annotation.get("area"),
        caption=None if is_blank(annotation.get("caption")) else annotation["caption"],
        segmentation=annotation.get("segmentation") or None,
    )


def is_blank(text: object) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def check_coco(contents: dict, path: Path) -> None:
    """Raises a `ValueError` that names the entry of which it cannot be told what it is, or of which image."""
    needed = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}
    for kind, keys in needed.items():
        listed = contents.get(kind, [])
        if not isinstance(listed, list):
            raise ValueError(f"{path}: `{kind}` is no list, but {str(listed)[:80]!r}.")
        for index, entry in enumerate(listed):
            where = f"{path}: entry {index} of `{kind}`, {str(entry)[:80]!r},"
            known = [entry[key] for key in keys if key in entry] if isinstance(entry, dict) else []
            texts = [value for key, value in zip(keys, known) if key in ("file_name", "name")]
            if len(known) < len(keys) or not all(isinstance(value, (str, int)) for value in known):
                raise ValueError(f"{where} lacks one of {keys}.")
            if not all(isinstance(value, str) and value for value in texts):
                raise ValueError(
                    f"{path}: entry {index} of `{kind}`, {str(entry)[:80]!r}, has no text under {keys[1]!r}."
                )
    for kind in ("images", "categories"):
        seen = set()
        for entry in contents.get(kind, []):
            if entry["id"] in seen:
                raise ValueError(f"{path}: two entries of `{kind}` have the id {entry['id']!r}.")
            seen.add(entry["id"])
    ids = {entry["id"] for entry in contents.get("images", [])}
    for annotation in contents.get("annotations", []):
        if annotation["image_id"] not in ids:
            raise ValueError(
                f"{path}, annotation {annotation.get('id')}: there is no image with the id {annotation['image_id']!r}."
            )


def parse_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no XML: {error}") from error
