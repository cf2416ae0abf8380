"""Pascal VOC: an XML file for each image, with axis-aligned or oriented boxes (DIOR-R)."""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from ...images.reading import image_files, read_errors
from ..annotation_files import STATISTICS, check_size, files_by_key, parse_xml, read_list
from ..annotations import AnnotatedObject, oriented_object
from ..folders import SPLIT_NAME, split_in, split_of_path
from .base import ObjectLayout, register_layout

SIDES = ("xmin", "ymin", "xmax", "ymax")
CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")  # Fields of `robndbox` in DIOR-R.


@register_layout("voc")
class PascalVOC(ObjectLayout):
    """Pascal VOC: one XML file per image, and optionally `ImageSets/Main/SPLIT.txt` with the names of a split.

    Without such lists, the split is read from the folders. Coordinates are not shifted. The image is the file
    `filename` of the XML, anywhere under the root.
    """

    suffix = ".xml"

    @classmethod
    def matches(cls, root):
        for path in root.rglob("*.xml"):
            if not path.name.lower().endswith(STATISTICS) and is_voc(path):
                return True
        return False

    @classmethod
    def read_objects(cls, annotation, image, size):
        root = parse_xml(annotation)
        stated_size = []
        for side in ("height", "width"):
            text = root.findtext(f"size/{side}", "")
            is_number = re.fullmatch(r"\s*[\d.]+\s*", text)
            stated_size.append(text if is_number else 0)
        check_size(stated_size, size, annotation, image)
        return voc_objects(root, annotation)

    def splits(self):
        splits = {}
        for split, path in self._lists.items():
            splits[split] = {name: (self._image(name),) for name in read_list(path)}
        if splits:
            return splits
        for name in self._files:
            path = self._image(name)
            images_of_split = splits.setdefault(split_of_path(path.relative_to(self.root)), {})
            images_of_split[name] = (path,)
        return splits

    @cached_property
    def _lists(self) -> dict[str, Path]:
        lists = {}
        for path in sorted(self.root.glob("ImageSets/Main/*.txt")):
            if SPLIT_NAME.fullmatch(path.stem):
                lists[split_in(path.stem)] = path
        return lists

    def split_list(self, split):
        return self._lists.get(split)

    def annotation_file(self, image_id, path):
        return self._files.get(image_id)

    def class_names(self):
        names = set()
        for path in self._files.values():
            names.update(item.label for item in voc_objects(parse_xml(path), path))
        return sorted(names)

    @cached_property
    def _files(self) -> dict[str, Path]:
        return files_by_key(self.annotations or self.root, self.suffix)

    @cached_property
    def _images(self) -> dict[str, list[Path]]:
        images = defaultdict(list)
        for path in image_files(self.root):
            images[path.stem].append(path)
        return images

    def _image(self, name: str) -> Path:
        """Return the image of an annotation file; if several have its name, the one that the file names."""
        paths = self._images.get(name, [])
        if not paths:
            return self.root / "JPEGImages" / f"{name}.jpg"
        if len(paths) > 1 and name in self._files:
            file_name = parse_xml(self._files[name]).findtext("filename")
            named_paths = [path for path in paths if path.name == file_name]
            paths = named_paths or paths
        if len(paths) > 1:
            raise ValueError(f"The image {name} is ambiguous: {paths[0]} or {paths[1]}.")
        return paths[0]


def voc_objects(root: ElementTree.Element, path: Path | str) -> list[AnnotatedObject]:
    """Return the objects of a Pascal VOC document, with axis-aligned (`bndbox`) or oriented (`robndbox`) boxes.

    Raises:
        ValueError: If an object has no box; the message names it.
    """
    objects = []
    for index, node in enumerate(root.iterfind("object")):
        location = f"{path}, object {index}"
        label = node.findtext("name", "").strip()
        is_difficult = node.findtext("difficult", "0").strip() == "1"
        with read_errors(location, "a box of four numbers (`bndbox`) or four corners (`robndbox`)"):
            if node.find("robndbox") is None:
                sides = [node.findtext(f"bndbox/{side}", "") for side in SIDES]
                box = tuple(map(float, sides))
                objects.append(AnnotatedObject(location, label, box, is_difficult=is_difficult))
                continue
            corners = []
            for name in CORNERS:
                x = float(node.findtext(f"robndbox/x_{name}", ""))
                y = float(node.findtext(f"robndbox/y_{name}", ""))
                corners.append((x, y))
            objects.append(oriented_object(location, label, corners, is_difficult))
    return objects


def is_voc(path: Path) -> bool:
    try:
        return parse_xml(path).tag == "annotation"
    except ValueError:
        return False
