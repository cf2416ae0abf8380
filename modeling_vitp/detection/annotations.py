"""Which images a split of files has, and what is annotated in each, in the formats of benchmarks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.reading import IMAGE_SUFFIXES, below, check_file, check_upright, stored_size
from ..instructions.from_annotations.annotations import read_annotation, read_list, read_text
from ..instructions.from_annotations.formats import (
    STATISTICS,
    AnnotatedObject,
    check_coco,
    check_size,
    coco_annotations,
    coco_object,
    dota_objects,
    parse_xml,
    voc_objects,
    voc_size,
)
from ..instructions.from_annotations.layouts import is_below
from ..training.values import check_type

SUFFIXES = {"voc": ".xml", "dota": ".txt"}
FORMATS = ("coco", *SUFFIXES)
SETTINGS = {"images": str, "annotations": str, "list": str, "tile": Mapping[str, Any]}  # of a split of files


@dataclass(frozen=True)
class AnnotatedFile:
    """An image of a split: its file, or the place of its row, and what its annotation says is in it.

    `found` is `None` where there is no annotation, as in a test split whose server keeps them.
    """

    id: str
    image: Path | int
    size: tuple[int, int]
    found: list[AnnotatedObject] | None


def read_files(root: str | Path, form: str, settings: Mapping, name: str) -> Iterator[AnnotatedFile]:
    """The images of a split, in the order of their names.

    Args:
        root: folder of the data set.
        form: `"coco"`, `"voc"` (`bndbox`, or DIOR-R's `robndbox`) or `"dota"`.
        settings: `images`, the folder of the images below `root`, which are found by their names whatever their type,
            those of COCO first where `file_name` leads from there; `annotations`, the folder of a file for each image,
            or COCO's JSON; left out where there are none. `list` is a file below `root` with the names of the images in
            the split, one a line.
        name: of the split, for errors.

    Raises:
        ValueError: names the file, and the line or object in it, that is not as it should be; an image without
            annotation or not stored upright, an annotation without image, and one that two files have.
    """
    if not isinstance(settings, Mapping) or "images" not in settings or set(settings) - SETTINGS.keys():
        raise ValueError(f"Split {name!r} needs `images`, and may have {sorted(SETTINGS)}: {str(settings)[:80]!r}.")
    for key, value in settings.items():
        check_type(f"Split {name!r}: {key}", value, SETTINGS[key])
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: root={str(root)!r}: there is no such folder.")
    if not (root / settings["images"]).is_dir():
        raise ValueError(f"Split {name!r}: there is no folder {root / settings['images']} of images.")
    if form == "coco" and "annotations" in settings:
        annotated = coco_files(root / settings["annotations"])
        images = coco_images(root, root / settings["images"], annotated)
    else:
        images = images_by_name(root / settings["images"])
        annotated = dict.fromkeys(images)
        if "annotations" in settings:
            annotated = annotation_files(root / settings["annotations"], SUFFIXES[form])
    listed = None
    if "list" in settings:
        lines = read_list(root / settings["list"])
        listed = [key if (key := without_suffix(line)) in annotated else file_stem(line) for line in lines]
        if len(set(listed)) < len(listed):
            raise ValueError(f"{root / settings['list']} names {max(listed, key=listed.count)!r} twice.")
    chosen = sorted(set(annotated) | (set(images) if form != "coco" else set())) if listed is None else listed
    for key in chosen:
        if key not in images:
            where = root / settings["annotations" if listed is None else "list"]
            raise ValueError(f"{where} has {key!r}, but there is no such image in {root / settings['images']}.")
        if key not in annotated:
            raise ValueError(f"{images[key]} has no annotation in {root / settings['annotations']}.")
        path = below(root, images[key].relative_to(root))
        check_file(path)
        check_upright(path)
        size = stored_size(path)
        yield AnnotatedFile(key, path, size, read_objects(annotated[key], form, path, size))


def read_objects(
    annotated: Path | tuple | None, form: str, image: Path, size: tuple[int, int]
) -> list[AnnotatedObject] | None:
    if annotated is None:
        return None
    if form == "voc":
        tree = parse_xml(annotated)
        check_size(voc_size(tree) or size, size, annotated, image)
        return voc_objects(tree, annotated)
    if form == "dota":
        return dota_objects(read_text(annotated), annotated)
    path, entry, annotations, names = annotated
    check_size((entry.get("height", size[0]), entry.get("width", size[1])), size, path, image)
    return [coco_object(annotation, names, path) for annotation in annotations]


def images_by_name(folder: Path) -> dict[str, Path]:
    """Name without suffix -> image, whatever its type, of a folder and those below."""
    images = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in images:
                raise ValueError(f"{images[path.stem]} and {path} are two images of one name.")
            images[path.stem] = path
    if not images:
        raise ValueError(f"There is no image in {folder}.")
    return images


def annotation_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Name without suffix -> annotation, of a folder and those below."""
    files = {}
    for path in sorted(folder.rglob(f"*{suffix}")):
        if path.name.lower().endswith(STATISTICS):
            continue
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path} both annotate {path.stem}.")
        files[path.stem] = path
    if not files:
        raise ValueError(f"There is no {suffix} file in {folder}.")
    return files


def coco_images(root: Path, folder: Path, annotated: Mapping[str, tuple]) -> dict[str, Path]:
    """Key of [`coco_files`] -> image: where its `file_name` leads from the folder, or else found by its name."""
    places = {key: folder / entry["file_name"] for key, (_, entry, *_) in annotated.items()}
    images = {key: path for key, path in places.items() if is_below(root, path) and path.is_file()}
    has_folders = any("/" in key for key in annotated)
    return images if has_folders or len(images) == len(annotated) else images_by_name(folder) | images


def coco_files(path: Path) -> dict[str, tuple]:
    """Name of an image without suffix -> the JSON file, its entry there, its annotations, and the categories' names.

    Where two images have one name, all have their folders before it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; format: coco takes a file.")
    contents = read_annotation(path)
    if not isinstance(contents, dict) or not {"images", "categories", "annotations"} <= contents.keys():
        raise ValueError(f"{path} is no COCO JSON: it needs `images`, `categories` and `annotations`.")
    check_coco(contents, path)
    names = {category["id"]: category["name"] for category in contents["categories"]}
    annotations = coco_annotations(contents)
    files = {}
    stems = [file_stem(entry["file_name"]) for entry in contents["images"]]
    key_of = file_stem if len(set(stems)) == len(stems) else without_suffix
    for entry in contents["images"]:
        key = key_of(entry["file_name"])
        if key in files:
            raise ValueError(f"{path} has two images called {key!r}.")
        files[key] = (path, entry, annotations[entry["id"]], names)
    return files


def without_suffix(name: str) -> str:
    return (Path(name).parent / file_stem(name)).as_posix()


def file_stem(name: str) -> str:
    """A file's name without folder and suffix; a name without one may have dots."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
