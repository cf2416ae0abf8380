"""COCO: a JSON file for each split, with boxes, outlines and captions of objects."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from ...images.reading import IMAGE_SUFFIXES, visible_paths
from ..annotation_files import check_size, is_below, read_annotation, read_flag
from ..annotations import AnnotatedObject
from ..folders import UNSPLIT, find_file, split_in
from .base import ObjectLayout, images_by_name, register_layout

COCO_KEYS = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}


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
        return any(map(has_coco_boxes, visible_paths(root, "*.json")))

    @classmethod
    def read_objects(cls, annotation, image, size):
        """Read the objects of an image; `annotation` is the COCO file and the entry of the image in it."""
        file, entry = annotation
        return file.objects(entry, image, size)

    @classmethod
    def match(cls, root, images, annotations, class_property=None):
        """Find the images by `file_name` relative to the folder, or else by name."""
        if annotations is None:
            return super().match(root, images, annotations)
        entries = entries_by_name(annotations)
        found_images = {}
        for key, (_, entry) in entries.items():
            path = images / entry["file_name"]
            if is_below(root, path) and path.is_file():
                found_images[key] = path
        has_folders = any("/" in key for key in entries)
        if not has_folders and len(found_images) < len(entries):
            found_images = images_by_name(images) | found_images
        return found_images, entries

    def splits(self):
        splits = {}
        for split, (file, folders) in self._files.items():
            names = [entry["file_name"] for entry in file.images]
            splits[split] = {name: (find_file(folders, name),) for name in names}
        return splits

    @cached_property
    def _files(self) -> dict[str, tuple["CocoFile", list[Path]]]:
        """Annotation file of each split, and the folders in which its images are searched."""
        where = self.annotations or self.root
        candidates = [where] if where.is_file() else visible_paths(where, "*.json")
        candidates = [path for path in candidates if path.name.startswith("instances")] or candidates
        files = {}
        for path in candidates:
            contents = read_annotation(path)
            if not isinstance(contents, dict) or not {"images", "categories"} <= contents.keys():
                continue
            file = CocoFile(path, contents)
            split = split_in(path.stem) or split_in(path.parent.name) or UNSPLIT
            if split in files:
                raise ValueError(f"{files[split][0].path} and {path} both annotate split {split!r}. Set --annotations.")
            folders = [self.root, self.root / "images", self.root / "JPEGImages", path.parent]
            folders += [found for folder in folders for found in sorted(folder.glob(f"{split}*")) if found.is_dir()]
            files[split] = (file, folders + [folder / "images" for folder in folders[1:]])
        if not files:
            raise ValueError(f"No COCO JSON found under {where}.")
        return files

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
        used = set().union(*(file.names_with_objects() for file in files))
        return list(dict.fromkeys(name for file in files for name in file.categories.values() if name in used))

    def _file(self, image_id, path):
        file, entry = self._entries[path]
        if not file.has_annotations:
            raise ValueError(f"{file.path} needs `annotations` for {path}.")
        return file, entry


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


def has_coco_boxes(path: Path) -> bool:
    """Return whether a file has the keys of COCO JSON with boxes. The file, which may be large, is not parsed."""
    content = path.read_bytes()
    return all(f'"{key}"'.encode() in content for key in ("images", "annotations", "categories", "bbox"))


def entries_by_name(path: Path) -> dict[str, tuple[CocoFile, dict]]:
    """Return the COCO file and the entry of each image, by name of the image without suffix.

    If two images have the same name, all names include the folders.
    """
    if path.is_dir():
        raise ValueError(f"Expected a file as `annotations` for `format: coco`, got the folder {path}.")
    contents = read_annotation(path)
    if not isinstance(contents, dict) or not {"images", "categories", "annotations"} <= contents.keys():
        raise ValueError(f"Expected COCO JSON with `images`, `categories` and `annotations` in {path}.")
    file, files = CocoFile(path, contents), {}
    stems = [file_stem(entry["file_name"]) for entry in file.images]
    key_of = file_stem if len(set(stems)) == len(stems) else without_suffix
    for entry in file.images:
        key = key_of(entry["file_name"])
        if key in files:
            raise ValueError(f"{path} has two images with the name {key!r}.")
        files[key] = (file, entry)
    return files


def without_suffix(name: str) -> str:
    return (Path(name).parent / file_stem(name)).as_posix()


def file_stem(name: str) -> str:
    """Return the name of an image file without folder and image suffix. Other dots in the name are kept."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
