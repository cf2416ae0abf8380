"""Layouts of annotated data sets on disk, one class each.

Annotations are assumed to be complete: an object that is not annotated does not occur in the image.
"""

import logging
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ...images.reading import (
    IMAGE_SUFFIXES,
    check_file,
    check_upright,
    image_files,
    is_dicom_file,
    patient_of,
    stored_size,
    visible_paths,
)
from ...images.volumes import NIFTI, VolumeSlices, check_cut
from ..boxes import box_area, clip
from .annotations import (
    AnnotatedImage,
    LabelMap,
    Region,
    connected_regions,
    number_classes,
    read_labels,
    read_mask_values,
    regions_of,
)
from .formats import (
    STATISTICS,
    YOLO_SPLITS,
    AnnotatedObject,
    CocoFile,
    YoloFile,
    dota_objects,
    files_by_key,
    find_yolo,
    is_below,
    is_number,
    parse_xml,
    read_annotation,
    read_dota,
    read_list,
    read_text,
    read_voc,
    voc_objects,
    yolo_label,
    yolo_objects,
)
from .geodata import SUFFIXES, FeatureFile, feature_files

UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|training|val|valid|validation|test|testing|test-dev)\d*", re.IGNORECASE)
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test", "test-dev": "test"}
NNUNET_SPLITS = {"tr": "train", "va": "val", "ts": "test"}  # Suffixes of the folders imagesTr, labelsTr, ….
NNUNET_FOLDERS = {f"{kind}{end}": split for kind in ("images", "labels") for end, split in NNUNET_SPLITS.items()}
FIRST_CHANNEL, FURTHER_CHANNEL = "_0000", re.compile(r"_(?!0000)\d{4}$")  # Suffixes of nnU-Net's file names.

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, type["Layout"]] = {}


def register_layout(name: str) -> Callable[[type["Layout"]], type["Layout"]]:
    """Return a decorator that registers a layout for `make_instructions` under a name."""

    def register(layout: type["Layout"]) -> type["Layout"]:
        LAYOUTS[name] = layout
        return layout

    return register


def recognize_layout(folder: str | Path, layouts: Collection[str] = LAYOUTS) -> str | None:
    """Return the name of the first of `layouts` that a folder has, or `None`. No image is read."""
    folder = Path(folder)
    names = (name for name, layout in LAYOUTS.items() if name in layouts and layout.matches(folder))
    return next(names, None) if folder.is_dir() else None


def make_instructions_command(folder: str | Path) -> str | None:
    """Return the command that makes instructions from an annotated folder, or `None` if it has no known layout.

    If the layout needs `--names`, the command names the file `names.json`, which the user must write.
    """
    name = recognize_layout(folder)
    if name is None:
        return None
    words = ["vitp", "make_instructions", name, str(folder), *LAYOUTS[name].required_options]
    try:
        splits = LAYOUTS[name](Path(folder), {"0": None}).splits()
    except ValueError:  # The command reports the error.
        splits = {}
    if splits and "train" not in splits:
        words += ["--split", next(iter(splits))]
    return shlex.join([*words, "--output_dir", f"{Path(folder).resolve().name}_instructions"])


class Layout:
    """Base class of the layouts of annotated data sets.

    Args:
        root: folder of the data set.
        names: mapping from annotated classes to phrases for questions and answers; `None` excludes a class. The phrase
            of a class without an entry is its name in plain words.
        annotations: file or folder of the annotations, if it is not found under `root`.
    """

    subject: str  # Subject of the questions, a key of `questions.PHRASINGS`.
    required_options: tuple[str, ...] = ()  # Options without which `make_instructions` cannot read the layout.

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"Folder {root} not found.")
        names = {} if names is None else names
        if not isinstance(names, dict) or not all(
            phrase is None or (isinstance(phrase, str) and phrase.strip()) for phrase in names.values()
        ):
            raise ValueError(f"`names` must map each class to a phrase or null, got {str(names)[:80]}.")
        if "--names" in self.required_options and not names:
            raise ValueError('Masks need --names, a JSON file such as {"0": null, "1": "building"}.')
        self.root, self.names, self.annotations = root, names, annotations
        self.found: set[str] = set()  # Classes of which `phrase` was asked.

    @classmethod
    def matches(cls, root: Path) -> bool:
        """Return whether a folder has this layout, by the names of its files and the content of few annotations."""
        return False

    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Return the file, or the two files, of each image by split and image id; `UNSPLIT` if there are no splits."""
        raise NotImplementedError

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> list[AnnotatedImage]:
        """Read the annotation of an image, or those of the slices of a volume.

        Raises:
            ValueError: If a file is invalid; the message names it.
        """
        raise NotImplementedError

    def annotation_file(self, image_id: str, path: Path) -> Path | None:
        """Return the annotation file of an image, or `None` if the image is not annotated. Used for boxes only."""
        raise NotImplementedError

    def split_list(self, split: str) -> Path | None:
        """Return the file that lists the images of a split, or `None`."""
        return None

    def class_names(self) -> list[str]:
        """Return the names of the annotated classes. Used for boxes only."""
        raise NotImplementedError

    def case(self, path: Path) -> str | None:
        """Return the case, which must be in one split only, or `None`: the patient in the tags of DICOM."""
        return patient_of(path)

    def phrase(self, label: str) -> str | None:
        self.found.add(label)
        phrase = self.names[label] if label in self.names else plain_words(label)
        if phrase == "":
            raise ValueError(f"The class {label!r} has no words in its name. Set its phrase with --names.")
        return phrase

    def regions(self, objects: list[AnnotatedObject], size: tuple[int, int]) -> tuple[Region, ...]:
        """Return the regions of all objects whose class is not excluded, with boxes clipped to the image."""
        return tuple(region for found in objects if (region := self._region(found, size)) is not None)

    def _region(self, found: AnnotatedObject, size: tuple[int, int]) -> Region | None:
        where, label, box, area = found.where, found.label, found.box, found.area
        if not isinstance(label, str) or not label:
            raise ValueError(f"{where} needs a class name, got {label!r}.")
        if not all(map(is_number, box)) or not (area is None or is_number(area)):
            raise ValueError(f"{where}: the box {list(box)} and its area {area} must be finite numbers.")
        if not isinstance(found.caption, (str, type(None))):
            raise ValueError(f"{where}: the caption must be a text, got {found.caption!r}.")
        phrase = self.phrase(label)
        if phrase is None:
            return None
        height, width = size
        cut = clip(box, (0, 0, width, height))
        if box_area(cut) <= 0:
            raise ValueError(
                f"{where}: the box {list(box)} of {label!r} has no area inside the image of {width} x {height} pixels."
            )
        area = box_area(cut) if area is None else min(area, box_area(cut))
        return Region(phrase, cut, area, found.caption, is_clear=not (found.is_crowd or found.is_difficult))


@register_layout("coco")
class Coco(Layout):
    """COCO JSON, one file per split: `annotations/instances_train2017.json`, `train/_annotations.coco.json`, ….

    The split is read from the name of the file or its folder. `file_name` is relative to the root, `images/`,
    `JPEGImages/`, the folder of the JSON file, the folder of the split in any of these, or `images/` in it.
    """

    subject = "objects"

    @classmethod
    def matches(cls, root):
        return any(map(has_coco_boxes, visible_paths(root, "*.json")))

    def splits(self):
        return {
            split: {entry["file_name"]: (find_file(folders, entry["file_name"]),) for entry in file.images}
            for split, (file, folders) in self._files.items()
        }

    @cached_property
    def _files(self) -> dict[str, tuple[CocoFile, list[Path]]]:
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
    def _entries(self) -> dict[Path, tuple[CocoFile, dict]]:
        """Annotation file of each image, and the image's entry in it."""
        files = self._files.values()
        return {
            find_file(folders, entry["file_name"]): (file, entry) for file, folders in files for entry in file.images
        }

    def annotation_file(self, image_id, path):
        file, _ = self._entries[path]
        return file.path if file.has_annotations else None

    def class_names(self):
        files = [file for file, _ in self._files.values()]
        used = set().union(*(file.names_with_objects() for file in files))
        return list(dict.fromkeys(name for file in files for name in file.categories.values() if name in used))

    def annotate(self, image_id, paths):
        file, entry = self._entries[paths[0]]
        if not file.has_annotations:
            raise ValueError(f"{file.path} needs `annotations` for {paths[0]}.")
        size = upright_size(paths[0])
        return [AnnotatedImage(image_id, paths, size, self.regions(file.objects(entry, paths[0], size), size))]


@register_layout("voc")
class PascalVOC(Layout):
    """Pascal VOC: one XML file per image, and optionally `ImageSets/Main/SPLIT.txt` with the names of a split.

    Without such lists, the split is read from the folders. Coordinates are not shifted. The image is the file
    `filename` of the XML, anywhere under the root.
    """

    subject = "objects"

    @classmethod
    def matches(cls, root):
        return any(is_voc(path) for path in root.rglob("*.xml") if not path.name.lower().endswith(STATISTICS))

    def splits(self):
        listed = {split: read_list(path) for split, path in self._lists.items()}
        splits = {split: {name: (self._image(name),) for name in names} for split, names in listed.items()}
        for name in () if splits else self._files:
            path = self._image(name)
            splits.setdefault(split_of_path(path.relative_to(self.root)), {})[name] = (path,)
        return splits

    @cached_property
    def _lists(self) -> dict[str, Path]:
        paths = sorted(self.root.glob("ImageSets/Main/*.txt"))
        return {split_in(path.stem): path for path in paths if SPLIT_NAME.fullmatch(path.stem)}

    def split_list(self, split):
        return self._lists.get(split)

    def annotation_file(self, image_id, path):
        return self._files.get(image_id)

    def class_names(self):
        return sorted({found.label for path in self._files.values() for found in voc_objects(parse_xml(path), path)})

    @cached_property
    def _files(self) -> dict[str, Path]:
        return files_by_key(self.annotations or self.root, ".xml")

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
            raise ValueError(f"The image {name} is ambiguous: {found[0]} or {found[1]}.")
        return found[0] if found else self.root / "JPEGImages" / f"{name}.jpg"

    def annotate(self, image_id, paths):
        if image_id not in self._files:
            raise ValueError(f"No {image_id}.xml for {paths[0]} found under {self.annotations or self.root}.")
        size = upright_size(paths[0])
        objects = read_voc(self._files[image_id], paths[0], size)
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


class Pairs(Layout):
    """Base class of layouts whose images have annotation files of the same name."""

    annotation: str  # Name of an annotation file in error messages.
    image_folders: tuple[str, ...]
    _files: dict[str, Path]  # Annotation files by image id.

    def splits(self):
        return images_in(self.root, self.image_folders)

    @cached_property
    def _ids(self) -> set[str]:
        return {image_id for images in self.splits().values() for image_id in images}

    @cached_property
    def _named(self) -> dict[str, list[Path]]:
        """Annotation files by name, without those that are found by an image id."""
        named = defaultdict(list)
        for image_id, path in self._files.items():
            if image_id not in self._ids:
                named[path.stem].append(path)
        return named

    @cached_property
    def _num_images(self) -> Counter[str]:
        """Number of images of each name."""
        return Counter(image_id.rpartition("/")[2] for image_id in self._ids)

    def _file(self, image_id: str, path: Path) -> Path:
        """Return the annotation file of an image, by its id or else by its name if the name is unique."""
        if image_id in self._files:
            return self._files[image_id]
        found = self._named.get(path.stem, [])
        if len(found) > 1:
            raise ValueError(f"The {self.annotation} of {path} is ambiguous: {found[0]} or {found[1]}.")
        if not found:
            where = self.annotations or self.root
            raise ValueError(f"No {self.annotation} of the same name as {path} found under {where}.")
        if self._num_images[path.stem] > 1:
            raise ValueError(
                f"{found[0]} is ambiguous, because several images are named {path.stem}, such as {path}. Put it in the "
                "same subfolders as its image."
            )
        return found[0]


@register_layout("yolo")
class Yolo(Layout):
    """YOLO text: `data.yaml` with `names` and the images of the splits; `labels/NAME.txt` for `images/NAME.png`.

    Exports of LabelImg and Label Studio have `classes.txt` instead, and no splits: all images are for training.
    A line has a class index and a box, an oriented box or a polygon. Answers contain the upright box around it, clipped
    to the image. An image without a label file has no objects.
    """

    subject = "objects"

    @classmethod
    def matches(cls, root):
        return find_yolo(root) is not None

    @cached_property
    def _file(self) -> YoloFile:
        where = self.annotations or self.root
        file = YoloFile(where) if where.is_file() else find_yolo(where)
        if file is None:
            raise ValueError(
                f"No YAML file with `names` and `train`, `val` or `test`, and no classes.txt, found in {where}."
            )
        return file

    def splits(self):
        images = {split: self._file.images(split) for split in YOLO_SPLITS}
        return {
            split: {Path(os.path.relpath(path, self.root)).as_posix(): (path,) for path in paths}
            for split, paths in images.items()
            if paths
        }

    def split_list(self, split):
        sources = self._file.sources[split]
        if len(sources) > 1:
            raise ValueError(f"Expected one folder or list for the split {split!r} in {self._file.path}, got several.")
        return next((path for path in sources if path.is_file()), None)

    def annotation_file(self, image_id, path):
        label = yolo_label(path, self.root)
        return label if label.parent.is_dir() else None

    def class_names(self):
        return list(self._file.names.values())

    def annotate(self, image_id, paths):
        size, label = upright_size(paths[0]), self.annotation_file(image_id, paths[0])
        if label is None:
            raise ValueError(f"No folder of labels for {paths[0]} found: {yolo_label(paths[0], self.root).parent}.")
        objects = yolo_objects(read_text(label), label, size, self._file.names) if label.exists() else []
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


@register_layout("dota")
class Dota(Pairs):
    """DOTA text: `SPLIT/images/NAME.png` with `SPLIT/labelTxt/NAME.txt` (or `images/SPLIT`, `labelTxt/SPLIT`).

    The folder of the labels may also be `annfiles`, as in RSAR.

    A line has the four corners of an oriented box, a class and, optionally, whether the object is difficult. Answers
    contain the axis-aligned box around the corners, clipped to the image. Sizes are also compared by the oriented area.
    """

    subject, annotation = "objects", "label"
    image_folders = ("images",)

    @classmethod
    def matches(cls, root):
        folders = sorted({path.parent for path in visible_paths(root, "*.txt")})
        return any(has_dota_lines(folder) for folder in folders)

    @cached_property
    def _files(self):
        where = self.annotations or self.root
        base = self.root if where.is_relative_to(self.root) else where

        def image_id(path: Path) -> str:
            folders = (folder for folder in path.relative_to(base).parent.parts if folder.lower() != "annfiles")
            return "/".join((*(folder for folder in folders if "label" not in folder.lower()), path.stem))

        return files_by_key(where, ".txt", image_id, within="label")

    def annotation_file(self, image_id, path):
        return self._files.get(image_id) or next(iter(self._named.get(path.stem, ())), None)

    def class_names(self):
        return sorted({found.label for path in self._files.values() for found in read_dota(path, path, (0, 0))})

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        objects = [
            replace(found, area=float(cv2.contourArea(np.array(found.corners, dtype=np.float32))))
            for found in read_dota(self._file(image_id, paths[0]), paths[0], size)
        ]
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


@register_layout("geojson")
class GeoJson(Layout):
    """GeoJSON or GeoPackage with polygons over GeoTIFFs: a file of the same name for each image, or one for a folder.

    The files are beside the images, or in `labels` for images in `images`, see [`feature_files`]. Features are clipped
    to the images, see [`FeatureFile`]. Images are those in folders `images`, or all without such a folder. An image in
    which no feature lies has no objects.

    Args:
        root, names, annotations: see [`Layout`].
        class_property: property with the class of a feature, see [`feature_files`].
    """

    subject = "objects"

    @classmethod
    def matches(cls, root):
        suffixes = {path.suffix.lower() for path in root.rglob("*")}
        return bool(suffixes & {*SUFFIXES} and suffixes & {".tif", ".tiff"})

    def __init__(
        self,
        root: Path,
        names: dict[str, str | None] | None = None,
        annotations: Path | None = None,
        class_property: str | None = None,
    ):
        super().__init__(root, names, annotations)
        self._class_property = class_property

    def splits(self):
        splits = images_in(self.root, ("images",))
        for path in () if splits else image_files(self.root):
            name = path.relative_to(self.root)
            splits.setdefault(split_of_path(name), {})[name.as_posix()] = (path,)
        return splits

    @cached_property
    def _files(self) -> dict[Path, FeatureFile]:
        images = (path for images in self.splits().values() for (path,) in images.values())
        return feature_files(self.root, self.annotations or self.root, images, self._class_property)

    @property
    def class_property(self) -> str | None:
        """Property with the class of a feature, or `None` if all features are of one class."""
        return next((file.class_property for file in self._files.values()), None)

    def annotation_file(self, image_id, path):
        return self._files[path].path if path in self._files else None

    def class_names(self):
        return sorted({label for file in {*self._files.values()} for label in file.labels})

    def annotate(self, image_id, paths):
        if paths[0] not in self._files:
            raise ValueError(
                f"No GeoJSON or GeoPackage for {paths[0]} found under {self.annotations or self.root}. Expected "
                f"{paths[0].stem}.geojson or .gpkg, or one file for all images of the folder."
            )
        size = upright_size(paths[0])
        return [
            AnnotatedImage(image_id, paths, size, self.regions(self._files[paths[0]].objects(paths[0], size), size))
        ]


@register_layout("masks")
class Masks(Pairs):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers (or three equal channels), or three color channels. `names` has each value
    as text (`"3"` or `"255,0,0"`), with `null` for the background. A region is an 8-connected component of a class.
    """

    subject, annotation = "regions", "mask"
    required_options = ("--names", "names.json")
    image_folders = ("images", "img_dir", "images_png", "image")
    mask_folders = ("masks", "ann_dir", "masks_png", "mask", "labels", "label", "annotations")

    @classmethod
    def matches(cls, root):
        return have_common_names(root, cls.image_folders, cls.mask_folders)

    @cached_property
    def _files(self):
        if self.annotations is None:
            return masks_in(self.root, self.mask_folders)
        files = image_files(self.annotations)
        return {path.relative_to(self.annotations).with_suffix("").as_posix(): path for path in files}

    def mask_files(self) -> list[Path]:
        """Return the files of all masks."""
        return list(self._files.values())

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        mask = partial(read_labels, self._file(image_id, paths[0]), size, self.names)
        return [AnnotatedImage(image_id, paths, size, regions_of(mask()), mask=mask)]


@register_layout("changes")
class ChangePairs(Layout):
    """Image pairs `SPLIT/A` and `SPLIT/B` with masks in `SPLIT/label`, captions in `*captions*.json`, or both.

    Nonzero pixels of a mask have changed. The JSON of the captions has the format of LEVIR-CC: `images`, each with
    `filename` and `sentences` (each with `raw`). `names` may contain a phrase for `"changed region"`.
    """

    subject = "change"
    before_folders, after_folders = ("A", "Image1", "time1", "before"), ("B", "Image2", "time2", "after")
    mask_folders = ("label", "OUT", "labels", "masks", "mask")

    @classmethod
    def matches(cls, root):
        has_captions = any(root.rglob("*captions*.json"))
        others = () if has_captions else (cls.mask_folders,)
        return have_common_names(root, cls.before_folders, cls.after_folders, *others)

    def splits(self):
        before, after = (images_in(self.root, names) for names in (self.before_folders, self.after_folders))
        pairs = {}
        for split, files in before.items():
            missing = sorted(files.keys() - after.get(split, {}).keys())
            if missing:
                raise ValueError(
                    f"No image of the same name as {files[missing[0]][0]} found in {', '.join(self.after_folders)}."
                )
            pairs[split] = {name: (*paths, *after[split][name]) for name, paths in files.items()}
        return pairs

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return masks_in(self.root, self.mask_folders)

    @cached_property
    def _captions(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Captions by file name and split; the split is `UNSPLIT` if the file does not state it."""
        where = self.annotations or self.root
        files = [where] if where.is_file() else visible_paths(where, "*captions*.json")
        captions = defaultdict(dict)
        for path in files:
            try:
                for image in read_annotation(path)["images"]:
                    sentences = tuple(filter(None, (sentence["raw"].strip() for sentence in image["sentences"])))
                    split = split_in(str(image.get("split") or image.get("filepath") or "")) or UNSPLIT
                    if captions[image["filename"]].setdefault(split, sentences) != sentences:
                        raise ValueError(f"{path} has different captions for two images {image['filename']!r}.")
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"Expected captions in the format of LEVIR-CC in {path}: {error!r}.") from error
        return captions

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        """Return the captions of an image in its split, or its only captions if its path has no split."""
        found, split = self._captions.get(path.name, {}), split_of_path(path.relative_to(self.root))
        if split == UNSPLIT and len(found) == 1:
            return next(iter(found.values()))
        return found.get(split, found.get(UNSPLIT, ()))

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        if upright_size(paths[1]) != size:
            raise ValueError(f"{paths[0]} and {paths[1]} differ in size.")
        mask, captions = self._masks.get(image_id), self._captions_of(paths[0])
        if mask is None and not captions:
            raise ValueError(f"No mask or captions found for {paths[0]}.")
        label = self.names.get("changed region") or "changed region"
        if mask is not None:
            regions = connected_regions(read_mask_values(mask, size)[0] != 0, label)
        else:  # Without a mask, the position of a change is unknown, and so is whether anything has changed.
            regions = [Region(label, (0, 0, *size[::-1]), size[0] * size[1], is_clear=False)]
        return [AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)]


@register_layout("volumes")
class Volumes(Layout):
    """Volumes and masks of the same name: `SPLIT/images/CASE.nii.gz` with `SPLIT/masks/CASE.nii.gz`.

    The folders of nnU-Net are read as well: `imagesTr`, `imagesTs` with `labelsTr`, `labelsTs`, of whose channels only
    the first is used. A volume may be a folder `CASE` with a DICOM series. Each slice is an image.

    `names` has each value of the masks as text, with `null` for the background.

    Args:
        root, names, annotations: see [`Layout`].
        plane: plane of the slices, see [`~modeling_vitp.images.volumes.VolumeSlices`].
        intensities, percentiles: intensities or percentiles that are shown as black and white, see the same class.
    """

    subject = "regions"
    required_options = ("--names", "names.json", "--percentiles", "1", "99")
    image_folders, mask_folders = ("images", "image"), ("masks", "mask", "labels", "label")

    @classmethod
    def matches(cls, root):
        try:
            return all(volumes_in(root, names) for names in (cls.image_folders, cls.mask_folders))
        except ValueError:
            return False

    def __init__(
        self,
        root: Path,
        names: dict[str, str | None] | None = None,
        annotations: Path | None = None,
        plane: str = "axial",
        intensities: Sequence[float] | None = None,
        percentiles: Sequence[float] | None = None,
    ):
        super().__init__(root, names, annotations)
        check_cut(plane, intensities, percentiles)
        window, percentiles = (None if pair is None else tuple(pair) for pair in (intensities, percentiles))
        self.plane, self.cut = plane, (plane, window, percentiles)

    def splits(self):
        volumes = volumes_in(self.root, self.image_folders)
        return {split: {case: (path,) for case, path in cases.items()} for split, cases in volumes.items()}

    @cached_property
    def _masks(self) -> dict[str, dict[str, Path]]:
        return volumes_in(self.root, self.mask_folders)

    def case(self, path):
        return super().case(path) or f"The case {case_of(path)}"

    def annotate(self, image_id, paths):
        (path,) = paths
        mask_path = self._masks.get(split_of_path(path.relative_to(self.root)), {}).get(image_id)
        if mask_path is None:
            raise ValueError(f"No mask of the same name as {path} found.")
        slices, images = open_slices(path, mask_path, *self.cut), []
        for index in range(len(slices)):
            mask = partial(self._labels, path, mask_path, index)
            name, picture = f"{image_id}/{self.plane}_{index:04d}", partial(self._picture, path, mask_path, index)
            images.append(AnnotatedImage(name, paths, slices.size, regions_of(mask()), mask=mask, picture=picture))
        return images

    def _labels(self, path: Path, mask_path: Path, index: int) -> LabelMap:
        values = open_slices(path, mask_path, *self.cut).mask(index).astype(np.int64)
        return number_classes(values, False, self.names, mask_path)

    def _picture(self, path: Path, mask_path: Path, index: int) -> Image.Image:
        return open_slices(path, mask_path, *self.cut).image(index)


@register_layout("folders")
class ClassFolders(Layout):
    """Image folders, one per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

    subject = "scene"

    @classmethod
    def matches(cls, root):
        splits = cls(root)._split_folders.values()
        folders = [path for folder in splits or [root] for path in folder.iterdir() if path.is_dir()]
        # Readers of the classes name an empty folder in their error.
        classes = [
            path for path in folders if path.name[0] != "." and any(one.name[0] != "." for one in path.iterdir())
        ]
        names = {path.name for path in classes}
        if any(map(SPLIT_NAME.fullmatch, names)) or (not splits and len([*filter(split_in, names)]) > 1):
            return False
        if len(names) < 2 or any(name.lower() in (*Masks.image_folders, *Masks.mask_folders) for name in names):
            return False
        return all(any(one.suffix.lower() in IMAGE_SUFFIXES for one in path.iterdir()) for path in classes)

    @cached_property
    def _split_folders(self) -> dict[str, Path]:
        return {
            split_in(path.name): path
            for path in sorted(self.root.iterdir())
            if path.is_dir() and SPLIT_NAME.fullmatch(path.name) and any(child.is_dir() for child in path.iterdir())
        }

    def splits(self):
        return {
            split: {path.relative_to(self.root).as_posix(): (path,) for path in image_files(folder)}
            for split, folder in (self._split_folders or {UNSPLIT: self.root}).items()
        }

    def annotate(self, image_id, paths):
        expected = ("SPLIT", "CLASS", "NAME") if self._split_folders else ("CLASS", "NAME")
        if len(paths[0].relative_to(self.root).parts) != len(expected):
            raise ValueError(f"Expected images at {'/'.join(expected)} in {self.root}, got {paths[0]}. Move the file.")
        size = stored_size(paths[0])  # of any orientation, which the class does not depend on
        check_file(paths[0])
        return [AnnotatedImage(image_id, paths, size, label=self.phrase(paths[0].parent.name))]


@lru_cache(maxsize=1)
def open_slices(path: Path, mask: Path, plane: str, intensities: tuple, percentiles: tuple) -> VolumeSlices:
    """Open a volume with its mask, which is cached for the next slice."""
    return VolumeSlices([path], plane, intensities, percentiles, mask)


def has_coco_boxes(path: Path) -> bool:
    """Return whether a file has the keys of COCO JSON with boxes. The file, which may be large, is not parsed."""
    content = path.read_bytes()
    return all(f'"{key}"'.encode() in content for key in ("images", "annotations", "categories", "bbox"))


def is_voc(path: Path) -> bool:
    try:
        return parse_xml(path).tag == "annotation"
    except ValueError:
        return False


def has_dota_lines(folder: Path) -> bool:
    """Return whether the first nonempty text file in a folder has objects of DOTA."""
    for path in sorted(folder.glob("[!.]*.txt")):
        try:
            objects = dota_objects(read_text(path), path)
        except ValueError:
            return False
        if objects:
            return not re.fullmatch(r"[-+.\de]+", objects[0].label)  # Oriented boxes of YOLO have numbers only.
    return False


def have_common_names(root: Path, *groups: tuple[str, ...]) -> bool:
    """Return whether an image id occurs in the folders of each of several groups of names, see [`images_in`]."""
    ids = [set() for _ in groups]
    for folder, _, files in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        for found, names in zip(ids, groups):
            level = level_of(parts, names)
            if level is not None:
                stems = (stem for stem, suffix in map(os.path.splitext, files) if suffix.lower() in IMAGE_SUFFIXES)
                found.update((*parts[:level], *parts[level + 1 :], stem) for stem in stems)
    return bool(set.intersection(*ids))


def plain_words(label: str) -> str:
    """Convert a class to a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` become `annual crop`.

    Acronyms keep their case.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def split_in(name: str) -> str | None:
    """Return the split in the name of a file or folder, such as `train` for `instances_train2017`, or `None`."""
    words = [word for word in name.lower().replace("train_val", "trainval").split("_") if SPLIT_NAME.fullmatch(word)]
    if not words:
        return None
    split = words[-1].rstrip("0123456789")
    return SPLIT_NAMES.get(split, split)


def split_of_path(path: Path) -> str:
    """Return the split in the names of the folders of a path."""
    named = (split_in(folder) or NNUNET_FOLDERS.get(folder.lower()) for folder in path.parent.parts)
    return next(filter(None, named), UNSPLIT)


def upright_size(path: Path) -> tuple[int, int]:
    """Return height and width. Raise a `ValueError` if the file is not an upright image, or is truncated."""
    size = stored_size(path)
    check_upright(path)
    check_file(path)
    return size


def find_file(folders: list[Path], name: str) -> Path:
    """Return the path of a file in the first folder that contains it, or in the first folder if none does."""
    found = (path for folder in folders if is_below(folders[0], path := folder / name) and path.is_file())
    return next(found, folders[0] / name)


def images_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """Return the images in all folders with one of these names, by split and id.

    The split is read from the path. The id is the path without the folder's name and the suffix, so that both files of
    a pair have the same id.
    """
    splits = defaultdict(dict)
    for path in image_files(root):
        folders = path.relative_to(root).parent.parts
        level = level_of(folders, names)
        if level is not None:
            split = next(filter(None, map(split_in, folders)), UNSPLIT)
            image_id = "/".join((*folders[:level], *folders[level + 1 :], path.stem))
            if image_id in splits[split]:
                raise ValueError(f"{splits[split][image_id][0]} and {path} have the same name.")
            splits[split][image_id] = (path,)
    return dict(splits)


def level_of(folders: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first folder that has one of the names, compared without case, or `None`."""
    names = {name.lower() for name in names}
    return next((index for index, folder in enumerate(folders) if folder.lower() in names), None)


def masks_in(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the masks in all folders with one of these names, by id."""
    return {name: paths[0] for files in images_in(root, names).values() for name, paths in files.items()}


def volumes_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """Return the files or folders of volumes in all folders with one of these names, by split and case."""
    splits = defaultdict(dict)
    names = {*names, *(name for name in NNUNET_FOLDERS if name.startswith(names))}
    folders = (Path(folder, name) for folder, children, _ in os.walk(root) for name in children)
    for folder in sorted(folder for folder in folders if folder.name.lower() in names):
        paths = sorted(folder.iterdir())
        if folder.name.lower() in NNUNET_FOLDERS:
            paths = first_channels(paths)
        for path in paths:
            is_nifti = path.is_file() and path.name.lower().endswith(NIFTI)
            if is_nifti or (path.is_dir() and any(file.is_file() and is_dicom_file(file) for file in path.iterdir())):
                other = splits[split_of_path(path.relative_to(root))].setdefault(case_of(path), path)
                if other != path:
                    raise ValueError(f"{other} and {path} have the same name.")
    return dict(splits)


def first_channels(paths: Sequence[Path]) -> list[Path]:
    """Return the paths without the additional channels of volumes, `CASE_0001` etc.; log these channels."""
    cases = {name.removesuffix(FIRST_CHANNEL) for name in map(bare_name, paths) if name.endswith(FIRST_CHANNEL)}
    further = [path for path in paths if FURTHER_CHANNEL.sub("", name := bare_name(path)) in cases - {name}]
    if further:
        logger.warning("%s and %d more channels are ignored: only the first is used.", further[0], len(further) - 1)
    return sorted(set(paths) - set(further))


def case_of(path: Path) -> str:
    """Return the name of a volume without the suffixes of its format and of nnU-Net."""
    return bare_name(path).removesuffix(FIRST_CHANNEL)


def bare_name(path: Path) -> str:
    suffix = next((suffix for suffix in NIFTI[::-1] if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]
