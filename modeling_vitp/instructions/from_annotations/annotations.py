"""Annotated vision data as it lies on disk, read into one form: `AnnotatedImage`.

A `Layout` knows which images each split of a data set has, and what is annotated in one of them. Every layout is
complete by assumption: what is not annotated in an image is not there.
"""

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image
from tqdm.auto import tqdm

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

MIN_REGION_SHARE = 1e-4  # of the image; a smaller connected part of a mask is a speck
UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|val|valid|validation|test|test-dev)\d*", re.IGNORECASE)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(frozen=True)
class Region:
    """An object, or a connected part of a mask.

    `box` lies inside the image. `area` is that of the outline where one is annotated and of the box otherwise. A
    region that is not `is_clear` (a crowd, marked as difficult, a speck) is there, but its class is neither counted
    nor pointed at.
    """

    label: str
    box: Box
    area: float
    caption: str | None = None
    is_clear: bool = True

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class AnnotatedImage:
    """An image, or a pair before and after, with what is annotated: regions, one class of the whole, or captions.

    `window` is the part of the file that the image is; sizes and boxes are in pixels of that part. Of the classes in
    `cut` there are also regions that lie for the most part outside of it.
    """

    id: str
    paths: tuple[Path, ...]
    size: tuple[int, int]
    regions: tuple[Region, ...] = ()
    label: str | None = None
    captions: tuple[str, ...] = ()
    window: tuple[int, int, int, int] | None = None
    cut: frozenset[str] = frozenset()

    @property
    def classes(self) -> set[str]:
        return {region.label for region in self.regions} | ({self.label} - {None})


class Layout:
    """A kind of annotated data set under a folder.

    Args:
        root: the data set's folder.
        names: class as annotated -> phrase for questions and answers; `None` leaves a class out. A class without an
            entry goes by its own name in plain words.
        annotations: file or folder of the annotations, where looking under `root` does not find the right one.
    """

    subject: str  # what the questions are about, see `questions.PHRASINGS`

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder.")
        self.root, self.names, self.annotations = root, names or {}, annotations

    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Split -> id of an image -> its file, or its two files. Without splits on disk, all are in `UNSPLIT`."""
        raise NotImplementedError

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> AnnotatedImage:
        """Reads one image's annotation. Raises `ValueError` that names the file if something is wrong with it."""
        raise NotImplementedError

    def phrase(self, label: str) -> str | None:
        return self.names[label] if label in self.names else plain_words(label)

    def region(self, where: str, label: str, box: Box, size: tuple[int, int], area: float | None = None, **more):
        """A region with its box cut to the image, as a list: empty if its class is left out."""
        phrase = self.phrase(label)
        if phrase is None:
            return []
        cut = clip(box, (0, 0, *size))
        if box_area(cut) <= 0:
            raise ValueError(f"{where}: the box {list(box)} of {label!r} has no area inside the image of size {size}.")
        return [Region(phrase, cut, box_area(cut) if area is None else min(area, box_area(cut)), **more)]


class Coco(Layout):
    """COCO JSON, one file a split: `annotations/instances_train2017.json`, `train/_annotations.coco.json`, ….

    The split is in the file's name or its folder's. Images: where `file_name` leads from the root, from `images/`,
    `JPEGImages/`, or from the folder of the split under any of these.
    """

    subject = "objects"

    def splits(self):
        return {
            split: {entry["file_name"]: (find(entry["file_name"]),) for entry in contents["images"]}
            for split, (_, contents, find) in self._files.items()
        }

    @cached_property
    def _files(self) -> dict[str, tuple[Path, dict, Callable[[str], Path]]]:
        """Split -> its JSON file, what it holds, and a function from the `file_name` of an image to its path."""
        where = self.annotations or self.root
        candidates = [where] if where.is_file() else sorted(where.rglob("*.json"))
        candidates = [path for path in candidates if path.name.startswith("instances")] or candidates
        files = {}
        for path in candidates:
            contents = read_json(path)
            if not isinstance(contents, dict) or not {"images", "categories"} <= contents.keys():
                continue
            split = split_in(path.stem) or split_in(path.parent.name) or UNSPLIT
            if split in files:
                raise ValueError(f"{files[split][0]} and {path} both annotate split {split!r}: give --annotations.")
            places = [self.root, *(self.root / folder for folder in ("images", "JPEGImages")), path.parent]
            places += [folder for place in places for folder in sorted(place.glob(f"{split}*")) if folder.is_dir()]
            files[split] = (path, contents, partial(find_file, places))
        if not files:
            raise ValueError(f"There is no COCO JSON under {where}.")
        return files

    @cached_property
    def _entries(self) -> dict[Path, tuple[Path, dict, list[dict], dict]]:
        """Image file -> the JSON file, its entry there, its objects, and the categories."""
        entries = {}
        for path, contents, find in self._files.values():
            categories = {category["id"]: category["name"] for category in contents["categories"]}
            objects = defaultdict(list)
            for annotation in contents.get("annotations", ()):
                objects[annotation["image_id"]].append(annotation)
            for entry in contents["images"]:
                entries[find(entry["file_name"])] = (path, entry, objects[entry["id"]], categories)
        return entries

    def annotate(self, image_id, paths):
        path, entry, objects, categories = self._entries[paths[0]]
        size = image_size(paths[0])
        if size != (entry.get("width", size[0]), entry.get("height", size[1])):
            raise ValueError(f"{path}: {entry['width']} x {entry['height']} is not the size of {paths[0]}, {size}.")
        regions = []
        for annotation in objects:
            where = f"{path}, annotation {annotation.get('id')}"
            try:
                left, top, width, height = annotation["bbox"]
                label = categories[annotation["category_id"]]
            except (KeyError, ValueError) as error:
                raise ValueError(f"{where} has no box of four numbers, or no known category: {error!r}.") from error
            regions += self.region(
                where,
                label,
                (left, top, left + width, top + height),
                size,
                area=annotation.get("area"),
                caption=annotation.get("caption"),
                is_clear=not annotation.get("iscrowd"),
            )
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class PascalVOC(Layout):
    """Pascal VOC: an XML file an image, `ImageSets/Main/SPLIT.txt` with the names of each split (if there are any).

    Coordinates are taken as they are written. Images: the file of the XML's `filename`, anywhere under the root.
    """

    subject = "objects"

    def splits(self):
        lists = [path for path in sorted(self.root.glob("ImageSets/Main/*.txt")) if SPLIT_NAME.fullmatch(path.stem)]
        if not lists:
            return {UNSPLIT: {name: (self._image(name),) for name in self._files}}
        return {split_in(path.stem): {name: (self._image(name),) for name in read_list(path)} for path in lists}

    @cached_property
    def _files(self) -> dict[str, Path]:
        return by_stem(self.annotations or self.root, ".xml")

    @cached_property
    def _images(self) -> dict[str, list[Path]]:
        images = defaultdict(list)
        for path in image_files(self.root):
            images[path.stem].append(path)
        return images

    def _image(self, name: str) -> Path:
        found = self._images.get(name, [])
        if len(found) > 1 and name in self._files:
            file_name = parse_xml(self._files[name]).findtext("filename")
            found = [path for path in found if path.name == file_name] or found
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} could both be the image {name}.")
        return found[0] if found else self.root / "JPEGImages" / f"{name}.jpg"

    def annotate(self, image_id, paths):
        if image_id not in self._files:
            raise ValueError(f"{paths[0]} has no {image_id}.xml under {self.annotations or self.root}.")
        path, size, regions = self._files[image_id], image_size(paths[0]), []
        for index, (label, box, is_difficult) in enumerate(voc_objects(parse_xml(path), path)):
            regions += self.region(f"{path}, object {index}", label, box, size, is_clear=not is_difficult)
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class Dota(Layout):
    """DOTA text: `SPLIT/images/NAME.png` with `SPLIT/labelTxt/NAME.txt` (or `images/SPLIT`, `labelTxt/SPLIT`).

    A line has the four corners of an oriented box, a class and, optionally, whether the object is difficult. Answers
    give the upright box around the corners, cut to the image; sizes are compared by the oriented area as well.
    """

    subject = "objects"

    def splits(self):
        return images_in(self.root, ("images",))

    @cached_property
    def _files(self) -> dict[str, Path]:
        return by_stem(self.annotations or self.root, ".txt", within="label")

    def annotate(self, image_id, paths):
        name = paths[0].stem
        if name not in self._files:
            raise ValueError(f"{paths[0]} has no {name}.txt under {self.annotations or self.root}.")
        path, size, regions = self._files[name], image_size(paths[0]), []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fields = line.split()
            if not fields or fields[0].startswith(("imagesource", "gsd")):
                continue
            where = f"{path}, line {number}"
            try:
                corners = np.array(fields[:8], dtype=np.float64).reshape(4, 2)
                label, is_difficult = fields[8], len(fields) > 9 and fields[9] != "0"
            except (ValueError, IndexError) as error:
                raise ValueError(f"{where}: {line!r} is not 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult'.") from error
            box = (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())
            area = float(cv2.contourArea(corners.astype(np.float32)))
            regions += self.region(where, label, box, size, area=area, is_clear=not is_difficult)
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class ClassFolders(Layout):
    """A folder per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

    subject = "scene"

    def splits(self):
        folders = [path for path in sorted(self.root.iterdir()) if path.is_dir()]
        by_split = {
            split_in(path.name): path
            for path in folders
            if SPLIT_NAME.fullmatch(path.name) and any(child.is_dir() for child in path.iterdir())
        }
        return {
            split: {path.relative_to(self.root).as_posix(): (path,) for path in image_files(folder)}
            for split, folder in (by_split or {UNSPLIT: self.root}).items()
        }

    def annotate(self, image_id, paths):
        return AnnotatedImage(image_id, paths, image_size(paths[0]), label=self.phrase(paths[0].parent.name))


class Masks(Layout):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers, or three of colours. `names` has every value as text (`"3"` or
    `"255,0,0"`); `null` for what is no class. A region is a connected part (by eight neighbours) of a class.
    """

    subject = "regions"
    image_folders = ("images", "img_dir", "images_png", "image")
    mask_folders = ("masks", "ann_dir", "masks_png", "mask", "labels", "label")

    def __init__(self, root, names=None, annotations=None):
        super().__init__(root, names, annotations)
        if not self.names:
            raise ValueError('Masks hold numbers: give --names, a JSON file such as {"0": null, "1": "building"}.')

    def splits(self):
        return images_in(self.root, self.image_folders)

    @cached_property
    def _masks(self) -> dict[str, Path]:
        """Split and name -> mask."""
        if self.annotations is not None:
            folders = {UNSPLIT: {path.stem: (path,) for path in image_files(self.annotations)}}
        else:
            folders = images_in(self.root, self.mask_folders)
        return {name: paths[0] for files in folders.values() for name, paths in files.items()}

    def annotate(self, image_id, paths):
        mask_path = self._masks.get(image_id) or self._masks.get(paths[0].stem)
        if mask_path is None:
            raise ValueError(f"{paths[0]} has no mask of the same name.")
        size = image_size(paths[0])
        values, is_colour = mask_values(mask_path, size)
        regions = []
        for value in np.unique(values).tolist():
            key = f"{value >> 16},{value >> 8 & 255},{value & 255}" if is_colour else str(value)
            if key not in self.names:
                raise ValueError(f"{mask_path} holds the value {key}, which --names does not name.")
            if self.names[key] is not None:
                regions += connected_regions(values == value, self.names[key])
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class ChangePairs(Layout):
    """Pairs before and after: `SPLIT/A`, `SPLIT/B` with masks in `SPLIT/label`, captions in `*captions*.json`, or both.

    What is not zero in a mask has changed. The captions' JSON has `images`, each with `filename` and `sentences` (each
    with `raw`), as that of LEVIR-CC. `names` may hold a phrase for `"changed region"`.
    """

    subject = "change"
    before_folders, after_folders = ("A", "Image1", "time1", "before"), ("B", "Image2", "time2", "after")
    mask_folders = ("label", "OUT", "labels", "masks", "mask")

    def splits(self):
        before = images_in(self.root, self.before_folders)
        after = images_in(self.root, self.after_folders)
        pairs = {}
        for split, files in before.items():
            missing = sorted(files.keys() - after.get(split, {}).keys())
            if missing:
                raise ValueError(f"{files[missing[0]][0]} has no image after of the same name.")
            pairs[split] = {name: (*paths, *after[split][name]) for name, paths in files.items()}
        return pairs

    @cached_property
    def _masks(self) -> dict[str, Path]:
        folders = images_in(self.root, self.mask_folders)
        return {name: paths[0] for files in folders.values() for name, paths in files.items()}

    @cached_property
    def _captions(self) -> dict[str, tuple[str, ...]]:
        where = self.annotations or self.root
        files = [where] if where.is_file() else sorted(where.rglob("*captions*.json"))
        return {
            image["filename"]: tuple(sentence["raw"].strip() for sentence in image["sentences"])
            for path in files
            for image in read_json(path)["images"]
        }

    def annotate(self, image_id, paths):
        size = image_size(paths[0])
        if image_size(paths[1]) != size:
            raise ValueError(f"{paths[0]} and {paths[1]} are not of one size.")
        mask, captions = self._masks.get(image_id), self._captions.get(paths[0].name, ())
        if mask is None and not captions:
            raise ValueError(f"{paths[0]} has neither a mask nor captions.")
        label = self.names.get("changed region") or "changed region"
        if mask is not None:
            regions = connected_regions(mask_values(mask, size)[0] != 0, label)
        else:  # where, and whether at all, is not annotated
            regions = [Region(label, (0, 0, *size), size[0] * size[1], is_clear=False)]
        return AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)


LAYOUTS: dict[str, type[Layout]] = {
    "coco": Coco,
    "voc": PascalVOC,
    "dota": Dota,
    "folders": ClassFolders,
    "masks": Masks,
    "changes": ChangePairs,
}


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name speaks of: `instances_train2017` -> `train`."""
    words = [word for word in name.split("_") if SPLIT_NAME.fullmatch(word)]
    if not words:
        return None
    split = words[-1].lower().rstrip("0123456789")
    return {"valid": "val", "validation": "val", "test-dev": "test"}.get(split, split)


def images_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """The images in the folders of one of these names: split -> id -> file, the split read from the path.

    The id is the path without the folder's name and the suffix, so that the files of a pair have the same one.
    """
    names, splits = {name.lower() for name in names}, defaultdict(dict)
    for path in image_files(root):
        folders = path.relative_to(root).parent.parts
        place = next((index for index, folder in enumerate(folders) if folder.lower() in names), None)
        if place is not None:
            split = next((split for folder in folders if (split := split_in(folder))), UNSPLIT)
            image_id = "/".join((*folders[:place], *folders[place + 1 :], path.stem))
            if image_id in splits[split]:
                raise ValueError(f"{splits[split][image_id][0]} and {path} have one name.")
            splits[split][image_id] = (path,)
    return dict(splits)


def by_stem(root: Path, suffix: str, within: str = "") -> dict[str, Path]:
    """Name without suffix -> file, of the files under a folder; raises `ValueError` if two have one name, or none is.

    Only of folders with `within` in their name, if there are any.
    """
    paths = sorted(root.rglob(f"*{suffix}"))
    paths = [path for path in paths if within in path.relative_to(root).parent.as_posix().lower()] or paths
    files = {}
    for path in paths:
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path} both annotate {path.stem}: give --annotations.")
        files[path.stem] = path
    if not files:
        raise ValueError(f"There is no {suffix} file under {root}.")
    return files


def find_file(places: list[Path], name: str) -> Path:
    """The file of a name in the first of several folders that has it; where it should be if none has."""
    return next((place / name for place in places if (place / name).is_file()), places[0] / name)


def image_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header. Raises `ValueError` if the file is no upright image."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
    if orientation != 1:
        raise ValueError(f"{path} is turned by its EXIF data, so boxes and pixels may disagree: save it upright.")
    return size


def mask_values(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """A mask's values, int64 of shape (height, width), and whether they are colours, as 0xRRGGBB."""
    try:
        with Image.open(path) as image:
            is_colour = image.mode not in ("1", "L", "P", "I", "I;16")
            values = np.asarray(image.convert("RGB") if is_colour else image).astype(np.int64)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"The mask {path} cannot be read: {error}") from error
    if values.shape[:2] != size[::-1]:
        raise ValueError(f"The mask {path} is of size {values.shape[1::-1]}, its image of size {size}.")
    return (values @ [1 << 16, 1 << 8, 1] if is_colour else values), is_colour


def connected_regions(mask: np.ndarray, label: str) -> list[Region]:
    """The connected parts (by eight neighbours) of a boolean mask, of shape (height, width)."""
    _, _, parts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return [
        Region(
            label,
            (left, top, left + width, top + height),
            float(area),
            is_clear=area >= MIN_REGION_SHARE * mask.size,
        )
        for left, top, width, height, area in parts[1:].tolist()
    ]


def voc_objects(root: ElementTree.Element, path: Path | str) -> list[tuple[str, Box, bool]]:
    """Class, box as written and whether it is difficult, of each object in a Pascal VOC document."""
    objects = []
    for index, node in enumerate(root.iterfind("object")):
        try:
            box = tuple(float(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, object {index} has no box of four numbers.") from error
        objects.append((node.findtext("name", "").strip(), box, node.findtext("difficult", "0").strip() == "1"))
    return objects


def parse_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML: {error}") from error


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_list(path: Path) -> list[str]:
    """The first word of every line."""
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def plain_words(label: str) -> str:
    """A class as a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` -> `annual crop`; acronyms stay."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def clip(box: Box, area: Box) -> Box:
    """The part of a box that lies in an area."""
    return (max(box[0], area[0]), max(box[1], area[1]), min(box[2], area[2]), min(box[3], area[3]))


def box_area(box: Box) -> float:
    """In square pixels; 0 for a box that is empty or inside out."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def choose_split(
    layout: Layout, split: str, listed: list[str] | None = None
) -> tuple[dict[str, tuple[Path, ...]], set[Path]]:
    """The images of a split, and the files of those that are held out from it.

    Held out are the test split of the layout and, unless `split` is itself made of it, the validation split. With
    `listed` (ids, file names, or file names without suffix) only those images are chosen, and all others of the
    layout are held out.

    Raises:
        ValueError: if the layout has no such split, or no image of a listed name.
    """
    splits = layout.splits()
    if listed is not None:
        everything = splits.get(split) or {key: paths for images in splits.values() for key, paths in images.items()}
        keys = {name: key for key, paths in everything.items() for name in (paths[0].stem, paths[0].name, key)}
        missing = [name for name in listed if name not in keys]
        if missing:
            raise ValueError(f"{len(missing)} of {len(listed)} listed images are not in {layout.root}: {missing[0]}, …")
        chosen = {keys[name]: everything[keys[name]] for name in listed}
        held_out = splits.values()
    elif split in splits:
        chosen = splits[split]
        held_out = [splits.get(name, {}) for name in {"train": ("val", "test"), "test": ()}.get(split, ("test",))]
    else:
        raise ValueError(
            f"{layout.root} shows no split {split!r}, only {sorted(splits)}. Give one of them, or name the images that "
            "may be used in a file: --split_list."
        )
    chosen_files = {path for paths in chosen.values() for path in paths}
    files = {path for images in held_out for paths in images.values() for path in paths}
    return chosen, files - chosen_files


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """The chosen images without those whose file is the same, byte for byte, as a held-out one, and the pairs found."""
    known = {file_digest(path): path for path in tqdm(sorted(held_out), desc="held-out images") if path.is_file()}
    kept, copies = {}, []
    for image_id, paths in tqdm(chosen.items(), desc="images"):
        found = [(path, known[digest]) for path in paths if known and (digest := file_digest(path)) in known]
        copies += found
        if not found:
            kept[image_id] = paths
    return kept, copies


def file_digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
