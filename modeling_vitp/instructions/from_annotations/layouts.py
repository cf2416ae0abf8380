"""Layouts of annotated data sets on disk, one class each.

Annotations are assumed to be complete: an object that is not annotated does not occur in the image.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ...images.reading import image_files, is_dicom_file, patient_of, stored_orientation, stored_size
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
    AnnotatedObject,
    CocoFile,
    files_by_key,
    is_below,
    is_number,
    parse_xml,
    read_annotation,
    read_dota,
    read_list,
    read_voc,
)

UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|val|valid|validation|test|test-dev)\d*", re.IGNORECASE)
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


class Layout:
    """Base class of the layouts of annotated data sets.

    Args:
        root: folder of the data set.
        names: mapping from annotated classes to phrases for questions and answers; `None` excludes a class. The phrase
            of a class without an entry is its name in plain words.
        annotations: file or folder of the annotations, if it is not found under `root`.
    """

    subject: str  # Subject of the questions, a key of `questions.PHRASINGS`.

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"Folder {root} not found.")
        names = {} if names is None else names
        if not isinstance(names, dict) or not all(
            phrase is None or (isinstance(phrase, str) and phrase.strip()) for phrase in names.values()
        ):
            raise ValueError(f"`names` must map each class to a phrase or null, got {str(names)[:80]}.")
        self.root, self.names, self.annotations = root, names, annotations

    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Return the file, or the two files, of each image by split and image id; `UNSPLIT` if there are no splits."""
        raise NotImplementedError

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> list[AnnotatedImage]:
        """Read the annotation of an image, or those of the slices of a volume.

        Raises:
            ValueError: If a file is invalid; the message names it.
        """
        raise NotImplementedError

    def case(self, path: Path) -> str | None:
        """Return the case, which must be in one split only, or `None`: the patient in the tags of DICOM."""
        return patient_of(path)

    def phrase(self, label: str) -> str | None:
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

    def splits(self):
        return {
            split: {entry["file_name"]: (find_file(folders, entry["file_name"]),) for entry in file.images}
            for split, (file, folders) in self._files.items()
        }

    @cached_property
    def _files(self) -> dict[str, tuple[CocoFile, list[Path]]]:
        """Annotation file of each split, and the folders in which its images are searched."""
        where = self.annotations or self.root
        candidates = [where] if where.is_file() else sorted(where.rglob("*.json"))
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

    def annotate(self, image_id, paths):
        file, entry = self._entries[paths[0]]
        if not file.has_annotations:
            raise ValueError(f"{file.path} needs `annotations` for {paths[0]}.")
        size = upright_size(paths[0])
        return [AnnotatedImage(image_id, paths, size, self.regions(file.objects(entry, paths[0], size), size))]


@register_layout("voc")
class PascalVOC(Layout):
    """Pascal VOC: one XML file per image, and optionally `ImageSets/Main/SPLIT.txt` with the names of a split.

    Coordinates are not shifted. The image is the file `filename` of the XML, anywhere under the root.
    """

    subject = "objects"

    def splits(self):
        lists = [path for path in sorted(self.root.glob("ImageSets/Main/*.txt")) if SPLIT_NAME.fullmatch(path.stem)]
        if not lists:
            return {UNSPLIT: {name: (self._image(name),) for name in self._files}}
        return {split_in(path.stem): {name: (self._image(name),) for name in read_list(path)} for path in lists}

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


@register_layout("dota")
class Dota(Pairs):
    """DOTA text: `SPLIT/images/NAME.png` with `SPLIT/labelTxt/NAME.txt` (or `images/SPLIT`, `labelTxt/SPLIT`).

    A line has the four corners of an oriented box, a class and, optionally, whether the object is difficult. Answers
    contain the axis-aligned box around the corners, clipped to the image. Sizes are also compared by the oriented area.
    """

    subject, annotation = "objects", "label"
    image_folders = ("images",)

    @cached_property
    def _files(self):
        where = self.annotations or self.root
        base = self.root if where.is_relative_to(self.root) else where

        def image_id(path: Path) -> str:
            folders = path.relative_to(base).parent.parts
            return "/".join((*(folder for folder in folders if "label" not in folder.lower()), path.stem))

        return files_by_key(where, ".txt", image_id, within="label")

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        objects = [
            replace(found, area=float(cv2.contourArea(np.array(found.corners, dtype=np.float32))))
            for found in read_dota(self._file(image_id, paths[0]), paths[0], size)
        ]
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


@register_layout("folders")
class ClassFolders(Layout):
    """Image folders, one per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

    subject = "scene"

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
        return [AnnotatedImage(image_id, paths, upright_size(paths[0]), label=self.phrase(paths[0].parent.name))]


@register_layout("masks")
class Masks(Pairs):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers, or three color channels. `names` has each value as text (`"3"` or
    `"255,0,0"`), with `null` for the background. A region is an 8-connected component of a class.
    """

    subject, annotation = "regions", "mask"
    image_folders = ("images", "img_dir", "images_png", "image")
    mask_folders = ("masks", "ann_dir", "masks_png", "mask", "labels", "label")

    def __init__(self, root, names=None, annotations=None):
        super().__init__(root, names, annotations)
        check_values(self.names)

    @cached_property
    def _files(self):
        if self.annotations is None:
            return masks_in(self.root, self.mask_folders)
        files = image_files(self.annotations)
        return {path.relative_to(self.annotations).with_suffix("").as_posix(): path for path in files}

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
        files = [where] if where.is_file() else sorted(where.rglob("*captions*.json"))
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
    image_folders, mask_folders = ("images", "image"), ("masks", "mask", "labels", "label")

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
        check_values(self.names)
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


@lru_cache(maxsize=1)
def open_slices(path: Path, mask: Path, plane: str, intensities: tuple, percentiles: tuple) -> VolumeSlices:
    """Open a volume with its mask, which is cached for the next slice."""
    return VolumeSlices([path], plane, intensities, percentiles, mask)


def check_values(names: dict[str, str | None]) -> None:
    if not names:
        raise ValueError('Masks need --names, a JSON file such as {"0": null, "1": "building"}.')


def plain_words(label: str) -> str:
    """Convert a class to a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` become `annual crop`.

    Acronyms keep their case.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def split_in(name: str) -> str | None:
    """Return the split in the name of a file or folder, such as `train` for `instances_train2017`, or `None`."""
    words = [word for word in name.split("_") if SPLIT_NAME.fullmatch(word)]
    if not words:
        return None
    split = words[-1].lower().rstrip("0123456789")
    return {"valid": "val", "validation": "val", "test-dev": "test"}.get(split, split)


def split_of_path(path: Path) -> str:
    """Return the split in the names of the folders of a path."""
    named = (split_in(folder) or NNUNET_FOLDERS.get(folder.lower()) for folder in path.parent.parts)
    return next(filter(None, named), UNSPLIT)


def upright_size(path: Path) -> tuple[int, int]:
    """Return height and width. Raise a `ValueError` if the file is not an upright image."""
    try:
        size, orientation = stored_size(path), stored_orientation(path)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many types for a broken file.
        raise ValueError(f"{path} cannot be read: {error}") from error
    if orientation != 1:
        raise ValueError(f"{path} is rotated by its EXIF data, so that boxes may not match. Save it upright.")
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
    names, splits = {name.lower() for name in names}, defaultdict(dict)
    for path in image_files(root):
        folders = path.relative_to(root).parent.parts
        level = next((index for index, folder in enumerate(folders) if folder.lower() in names), None)
        if level is not None:
            split = next(filter(None, map(split_in, folders)), UNSPLIT)
            image_id = "/".join((*folders[:level], *folders[level + 1 :], path.stem))
            if image_id in splits[split]:
                raise ValueError(f"{splits[split][image_id][0]} and {path} have the same name.")
            splits[split][image_id] = (path,)
    return dict(splits)


def masks_in(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the masks in all folders with one of these names, by id."""
    return {name: paths[0] for files in images_in(root, names).values() for name, paths in files.items()}


def volumes_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """Return the files or folders of volumes in all folders with one of these names, by split and case."""
    splits = defaultdict(dict)
    names = {*names, *(name for name in NNUNET_FOLDERS if name.startswith(names))}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir() and path.name.lower() in names):
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
