"""COCO: a JSON file for each split, with boxes, outlines and captions of objects."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ...images.reading import IMAGE_SUFFIXES, read_errors, visible_paths
from ..annotation_files import check_size, is_below, read_annotation, read_flag
from ..annotations import AnnotatedObject
from ..boxes import Box
from ..folders import UNSPLIT, find_file, split_in
from .base import ObjectLayout, images_by_name, register_layout

# Keys that the entries of each list must have, and those whose values must differ.
COCO_KEYS = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}
UNIQUE_KEYS = (("images", "id"), ("categories", "id"), ("images", "file_name"))


@register_layout("coco")
class Coco(ObjectLayout):
    """COCO JSON, one file per split: `annotations/instances_train2017.json`, `train/_annotations.coco.json`, ….

    The split is read from the name of the file or its folder. `file_name` is relative to the root, `images/`,
    `JPEGImages/`, the folder of the JSON file, the folder of the split in any of these, or `images/` in it.
    """

    suffix = ".json"
    has_shared_files = True
    lists_images = True

    @classmethod
    def matches(cls, root):
        return any(has_coco_boxes(path) for path in visible_paths(root, "*.json"))

    @classmethod
    def read_objects(cls, annotation, image, size):
        """Read the objects of an image; `annotation` is the COCO file and the entry of the image in it."""
        file, entry = annotation
        return file.objects(entry, image, size)

    @classmethod
    def match(
        cls,
        root,
        images,
        annotations,
        class_property=None,
    ):
        """Find the images by `file_name` relative to the folder, or else by name."""
        if annotations is None:
            return super().match(root, images, annotations)
        entries = entries_by_name(annotations)
        image_paths = {}
        for key, (_, entry) in entries.items():
            path = images / entry["file_name"]
            if is_below(root, path) and path.is_file():
                image_paths[key] = path
        has_folders = any("/" in key for key in entries)
        if not has_folders and len(image_paths) < len(entries):
            image_paths = {**images_by_name(images), **image_paths}
        return image_paths, entries

    def splits(self):
        splits = {}
        for split, (file, folders) in self._files.items():
            images_of_split = {}
            for entry in file.images:
                name = entry["file_name"]
                images_of_split[name] = (find_file(folders, name),)
            splits[split] = images_of_split
        return splits

    @cached_property
    def _files(self) -> dict[str, tuple["CocoFile", list[Path]]]:
        """Annotation file of each split, and the folders in which its images are searched."""
        location = self.annotations or self.root
        candidates = [location] if location.is_file() else visible_paths(location, "*.json")
        instance_files = [path for path in candidates if path.name.startswith("instances")]
        files = {}
        for path in instance_files or candidates:
            contents = read_annotation(path)
            if not isinstance(contents, dict) or not {"images", "categories"} <= contents.keys():
                continue
            split = split_in(path.stem) or split_in(path.parent.name) or UNSPLIT
            if split in files:
                raise ValueError(f"{files[split][0].path} and {path} both annotate split {split!r}. Set --annotations.")
            files[split] = (CocoFile(path, contents), self._image_folders(path, split))
        if not files:
            raise ValueError(f"No COCO JSON found under {location}.")
        return files

    def _image_folders(self, annotation: Path, split: str) -> list[Path]:
        """Return the folders in which the images of an annotation file are searched, the root first."""
        base_folders = [self.root, self.root / "images", self.root / "JPEGImages", annotation.parent]
        folders = list(base_folders)
        for folder in base_folders:
            for path in sorted(folder.glob(f"{split}*")):
                if path.is_dir():
                    folders.append(path)
        for folder in folders[1:].copy():
            folders.append(folder / "images")
        return folders

    @cached_property
    def _entries(self) -> dict[Path, tuple["CocoFile", dict]]:
        """Annotation file of each image, and the image's entry in it."""
        entries = {}
        for file, folders in self._files.values():
            for entry in file.images:
                entries[find_file(folders, entry["file_name"])] = (file, entry)
        return entries

    def annotation_file(self, image_id, path):
        file, _ = self._entries[path]
        return file.path if file.has_annotations else None

    def class_names(self):
        files = [file for file, _ in self._files.values()]
        names_with_objects = set()
        for file in files:
            names_with_objects |= file.names_with_objects()
        names = []
        for file in files:
            for name in file.categories.values():
                if name in names_with_objects and name not in names:
                    names.append(name)
        return names

    def _file(self, image_id, path):
        return self._entries[path]


class CocoFile:
    """Content of a COCO JSON file: its images and the objects in them.

    Raises:
        ValueError: If an entry is incomplete, repeats an id or a file name, or refers to an unknown image. The message
            names it.
    """

    def __init__(self, path: Path, contents: dict):
        check_coco(contents, path)
        self.path = path
        self.images = contents["images"]
        self.has_annotations = "annotations" in contents
        self.categories = {category["id"]: category["name"] for category in contents["categories"]}
        self._annotations = defaultdict(list)
        for annotation in contents.get("annotations", ()):
            self._annotations[annotation["image_id"]].append(annotation)

    def names_with_objects(self) -> set[str]:
        """Return the names of the categories that have annotations."""
        used_ids = set()
        for annotations in self._annotations.values():
            for annotation in annotations:
                used_ids.add(str(annotation.get("category_id")))
        names = set()
        for category_id, name in self.categories.items():
            if str(category_id) in used_ids:
                names.add(name)
        return names

    def objects(self, entry: dict, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
        """Return the objects of an entry of `images`; `size` is the height and width of the file `image`."""
        if not self.has_annotations:
            raise ValueError(f"{self.path} needs `annotations` for {image}.")
        stated_size = (entry.get("height"), entry.get("width"))
        check_size(stated_size, size, self.path, image)
        annotations = self._annotations[entry["id"]]
        return [coco_object(annotation, self.categories, self.path) for annotation in annotations]


def coco_object(annotation: dict, names: dict[int | str, str], path: Path | str) -> AnnotatedObject:
    """Return the object of an annotation of a COCO file; `names` maps category ids to names.

    Raises:
        ValueError: If the annotation has no box, or an unknown category.
    """
    location = f"{path}, annotation {annotation.get('id')}"
    category = annotation.get("category_id")
    stated_box = annotation.get("bbox")
    box = pixel_box(stated_box)
    if not isinstance(category, (int, str)) or category not in names or box is None:
        raise ValueError(
            f"{location}: expected `category_id` to be an id of `categories`, and `bbox` to be four numbers in pixels, "
            f"got {category!r} and {stated_box!r}."
        )
    with read_errors(location, "an object with `iscrowd`, `area` and an outline (`segmentation`)"):
        area = read_numbers(annotation.get("area"))
        segmentation = read_numbers(annotation.get("segmentation") or None)
        is_crowd = read_flag(annotation.get("iscrowd"), "iscrowd")
    caption = annotation.get("caption")
    if isinstance(caption, str) and not caption.strip():
        caption = None
    return AnnotatedObject(
        location,
        names[category],
        box,
        is_crowd=is_crowd,
        area=area,
        caption=caption,
        segmentation=segmentation,
    )


def pixel_box(value: Any) -> Box | None:
    """Return the box of a `bbox` (left, top, width, height), or `None` if it is not four numbers in pixels."""
    try:
        sides = read_numbers(value)
        left, top, width, height = sides
        box = (left, top, left + width, top + height)
        is_below_one = all(0 <= side <= 1 for side in sides)
        has_fractions = any(side % 1 for side in sides)
    except (ValueError, TypeError):
        return None
    is_relative_to_image = is_below_one and has_fractions
    return None if is_relative_to_image else box


def read_numbers(value: Any) -> Any:
    """Return a nested list in which numbers that are written as text are numbers. Raise a `ValueError` for others."""
    if isinstance(value, str):
        return float(value)
    if isinstance(value, list):
        return [read_numbers(element) for element in value]
    return value


def check_coco(contents: dict, path: Path) -> None:
    """Raise a `ValueError` that names the first invalid entry."""
    problem = problem_of_coco(contents)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")


def problem_of_coco(contents: dict) -> str | None:
    """Return the first invalid entry of a COCO file in words, or `None` if all are valid."""
    if not isinstance(contents, dict) or not {"images", "categories"} <= contents.keys():
        return f"expected COCO JSON with `images` and `categories`, got {str(contents)[:80]!r}."
    for kind, keys in COCO_KEYS.items():
        entries = contents.get(kind, [])
        if not isinstance(entries, list):
            return f"`{kind}` must be a list, got {str(entries)[:80]!r}."
        for index, entry in enumerate(entries):
            for key in keys:
                value = entry.get(key) if isinstance(entry, dict) else None
                is_name = isinstance(value, str) and value != ""
                is_id = isinstance(value, (int, str))
                is_valid = is_name if key in ("file_name", "name") else is_id
                if not is_valid:
                    return f"entry {index} of `{kind}` has no valid {key!r}: {str(entry)[:80]!r}."
    for kind, key in UNIQUE_KEYS:
        values = set()
        for entry in contents[kind]:
            if entry[key] in values:
                return f"two entries of `{kind}` have the {key} {entry[key]!r}. Merge them."
            values.add(entry[key])
    image_ids = {entry["id"] for entry in contents["images"]}
    for annotation in contents.get("annotations", []):
        image_id = annotation["image_id"]
        if image_id not in image_ids:
            return f"annotation {annotation.get('id')} has the unknown `image_id` {image_id!r}."
    return None


def has_coco_boxes(path: Path) -> bool:
    """Return whether a file has the keys of COCO JSON with boxes. The file, which may be large, is not parsed."""
    content = path.read_bytes()
    keys = (b'"images"', b'"annotations"', b'"categories"', b'"bbox"')
    return all(key in content for key in keys)


def entries_by_name(path: Path) -> dict[str, tuple[CocoFile, dict]]:
    """Return the COCO file and the entry of each image, by name of the image without suffix.

    If two images have the same name, all names include the folders.
    """
    file = CocoFile(path, read_annotation(path))
    stems = {file_stem(entry["file_name"]) for entry in file.images}
    has_unique_stems = len(stems) == len(file.images)
    entries = {}
    for entry in file.images:
        name = entry["file_name"]
        key = file_stem(name) if has_unique_stems else without_suffix(name)
        if key in entries:
            raise ValueError(f"{path} has two images with the name {key!r}.")
        entries[key] = (file, entry)
    return entries


def without_suffix(name: str) -> str:
    return (Path(name).parent / file_stem(name)).as_posix()


def file_stem(name: str) -> str:
    """Return the name of an image file without folder and image suffix. Other dots in the name are kept."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
