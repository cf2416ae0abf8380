"""DOTA: a text file for each image, with an oriented box in each line."""

import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from ...images.reading import visible_paths
from ..annotation_files import read_text
from ..annotations import AnnotatedObject, oriented_object
from ..folders import images_in
from .base import ObjectLayout, register_layout


@register_layout("dota")
class Dota(ObjectLayout):
    """DOTA text: `SPLIT/images/NAME.png` with `SPLIT/labelTxt/NAME.txt` (or `images/SPLIT`, `labelTxt/SPLIT`).

    The folder of the labels may also be `annfiles`, as in RSAR.

    A line has the four corners of an oriented box, a class and, optionally, whether the object is difficult. Answers
    contain the axis-aligned box around the corners, clipped to the image. Sizes are also compared by the oriented area.
    """

    annotation = "label"
    suffix = ".txt"
    is_oriented = True

    @classmethod
    def matches(cls, root):
        folders = sorted({path.parent for path in visible_paths(root, "*.txt")})
        return any(has_dota_lines(folder) for folder in folders)

    @classmethod
    def read_objects(cls, annotation, image, size):
        return dota_objects(read_text(annotation), annotation)

    def splits(self):
        return images_in(self.root, self.image_folders)

    def class_names(self):
        names = set()
        for path in self._files.values():
            for item in dota_objects(read_text(path), path):
                names.add(item.label)
        return sorted(names)

    def regions(self, objects, size):
        objects_with_areas = []
        for item in objects:
            area = cv2.contourArea(np.array(item.corners, dtype=np.float32))
            objects_with_areas.append(replace(item, area=float(area)))
        return super().regions(objects_with_areas, size)


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
        location = f"{path}, line {number}"
        try:
            coordinates = [float(field) for field in fields[:8]]
            corners = list(zip(coordinates[::2], coordinates[1::2], strict=True))
            label, *difficulties = fields[8:]
            (difficulty,) = difficulties or ["0"]
            objects.append(oriented_object(location, label, corners, is_difficult=bool(int(difficulty))))
        except ValueError as error:
            raise ValueError(
                f"{location}: expected 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult', the class without spaces, got "
                f"{line!r}."
            ) from error
    return objects


def has_dota_lines(folder: Path) -> bool:
    """Return whether the first nonempty text file in a folder has objects of DOTA."""
    for path in sorted(folder.glob("[!.]*.txt")):
        try:
            objects = dota_objects(read_text(path), path)
        except ValueError:
            return False
        if objects:
            # Oriented boxes of YOLO have numbers only.
            return not re.fullmatch(r"[-+.\de]+", objects[0].label)
    return False
