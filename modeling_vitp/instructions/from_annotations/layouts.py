"""Layouts of annotated data sets on disk, one class each. Every layout is complete by assumption: what is not annotated
in an image is not there.
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
NNUNET_SPLITS = {"tr": "train", "va": "val", "ts": "test"}  # the endings of the folders imagesTr, labelsTr …
NNUNET_FOLDERS = {f"{kind}{end}": split for kind in ("images", "labels") for end, split in NNUNET_SPLITS.items()}
FIRST_CHANNEL, FURTHER_CHANNEL = "_0000", re.compile(r"_(?!0000)\d{4}$")  # in the file names of nnU-Net

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, type["Layout"]] = {}


def register_layout(name: str) -> Callable[[type["Layout"]], type["Layout"]]:
    """Return a decorator that makes a layout known to `make_instructions` by a name."""

    def register(layout: type["Layout"]) -> type["Layout"]:
        LAYOUTS[name] = layout
        return layout

    return register


class Layout:
    """A kind of annotated data set under a folder.

    Args:
        root: the folder of the data set.
        names: class as annotated -> phrase for questions and answers; `None` leaves a class out. A class without an
            entry is called by its own name in plain words.
        annotations: file or folder of the annotations, if the right one is not found under `root`.
    """

    subject: str  # of the questions, a key of `questions.PHRASINGS`

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder.")
        names = {} if names is None else names
        if not isinstance(names, dict) or not all(
            phrase is None or (isinstance(phrase, str) and phrase.strip()) for phrase in names.values()
        ):
            raise ValueError(f"`names` must map each class to a phrase or null, got {str(names)[:80]}.")
        self.root, self.names, self.annotations = root, names, annotations

    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Return split -> id of an image -> its file, or its two files. Without splits, all images are `UNSPLIT`."""
        raise NotImplementedError

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> list[AnnotatedImage]:
        """Read the annotation of an image; of a volume, those of its slices.

        Raises:
            ValueError: names the file that cannot be used.
        """
        raise NotImplementedError

    def case(self, path: Path) -> str | None:
        """Return what may be in one split only, if known: the patient in the tags of DICOM."""
        return patient_of(path)

    def phrase(self, label: str) -> str | None:
        phrase = self.names[label] if label in self.names else plain_words(label)
        if phrase == "":
            raise ValueError(f"The name of the class {label!r} has no words. Give it a phrase with --names.")
        return phrase

    def regions(self, objects: list[AnnotatedObject], size: tuple[int, int]) -> tuple[Region, ...]:
        """Return the objects whose class is not left out, with their boxes cut to the image."""
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
    """COCO JSON, one file a split: `annotations/instances_train2017.json`, `train/_annotations.coco.json`, ….

    The split is in the file's name or its folder's. Images: where `file_name` leads from the root, from `images/`,
    `JPEGImages/`, the folder of the JSON, from the folder of the split under any of these, or `images/` in that.
    """

    subject = "objects"

    def splits(self):
        return {
            split: {entry["file_name"]: (find_file(folders, entry["file_name"]),) for entry in file.images}
            for split, (file, folders) in self._files.items()
        }

    @cached_property
    def _files(self) -> dict[str, tuple[CocoFile, list[Path]]]:
        """Split -> its file and the folders in which its images are searched."""
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
                raise ValueError(
                    f"{files[split][0].path} and {path} both annotate split {split!r}: give --annotations."
                )
            folders = [self.root, self.root / "images", self.root / "JPEGImages", path.parent]
            folders += [found for folder in folders for found in sorted(folder.glob(f"{split}*")) if found.is_dir()]
            files[split] = (file, folders + [folder / "images" for folder in folders[1:]])
        if not files:
            raise ValueError(f"There is no COCO JSON under {where}.")
        return files

    @cached_property
    def _entries(self) -> dict[Path, tuple[CocoFile, dict]]:
        """Image -> the file that annotates it, and its entry there."""
        files = self._files.values()
        return {
            find_file(folders, entry["file_name"]): (file, entry) for file, folders in files for entry in file.images
        }

    def annotate(self, image_id, paths):
        file, entry = self._entries[paths[0]]
        if not file.has_annotations:
            raise ValueError(f"{file.path} has no `annotations`, so that nothing can be said of {paths[0]}.")
        size = upright_size(paths[0])
        return [AnnotatedImage(image_id, paths, size, self.regions(file.objects(entry, paths[0], size), size))]


@register_layout("voc")
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
            raise ValueError(f"{found[0]} and {found[1]} could both be the image {name}.")
        return found[0] if found else self.root / "JPEGImages" / f"{name}.jpg"

    def annotate(self, image_id, paths):
        if image_id not in self._files:
            raise ValueError(f"{paths[0]} has no {image_id}.xml under {self.annotations or self.root}.")
        size = upright_size(paths[0])
        objects = read_voc(self._files[image_id], paths[0], size)
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]


class Pairs(Layout):
    """Images with an annotation in a file of the same name each."""

    annotation: str  # the name of such a file, for errors
    image_folders: tuple[str, ...]
    _files: dict[str, Path]  # id of an image -> annotation

    def splits(self):
        return images_in(self.root, self.image_folders)

    @cached_property
    def _ids(self) -> set[str]:
        return {image_id for images in self.splits().values() for image_id in images}

    @cached_property
    def _named(self) -> dict[str, list[Path]]:
        """Name -> the annotations of that name whose folders are not those of an image."""
        named = defaultdict(list)
        for image_id, path in self._files.items():
            if image_id not in self._ids:
                named[path.stem].append(path)
        return named

    @cached_property
    def _num_images(self) -> Counter[str]:
        """Name -> number of images of that name."""
        return Counter(image_id.rpartition("/")[2] for image_id in self._ids)

    def _file(self, image_id: str, path: Path) -> Path:
        """Return the annotation of an image by its id, otherwise by its name if no other image has it."""
        if image_id in self._files:
            return self._files[image_id]
        found = self._named.get(path.stem, [])
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} could both be the {self.annotation} of {path}.")
        if not found:
            where = self.annotations or self.root
            raise ValueError(f"{path} has no {self.annotation} of the same name under {where}.")
        if self._num_images[path.stem] > 1:
            raise ValueError(
                f"{found[0]} is of one of several images called {path.stem}, as {path}: put it in folders like those "
                "of its image."
            )
        return found[0]


@register_layout("dota")
class Dota(Pairs):
    """DOTA text: `SPLIT/images/NAME.png` with `SPLIT/labelTxt/NAME.txt` (or `images/SPLIT`, `labelTxt/SPLIT`).

    A line has the four corners of an oriented box, a class and, optionally, whether the object is difficult. Answers
    give the upright box around the corners, cut to the image; sizes are compared by the oriented area as well.
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
    """A folder per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

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
        place = ("SPLIT", "CLASS", "NAME") if self._split_folders else ("CLASS", "NAME")
        if len(paths[0].relative_to(self.root).parts) != len(place):
            raise ValueError(
                f"{paths[0]} is not at {'/'.join(place)} in {self.root}, so its class is not known: move it."
            )
        return [AnnotatedImage(image_id, paths, upright_size(paths[0]), label=self.phrase(paths[0].parent.name))]


@register_layout("masks")
class Masks(Pairs):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers, or three of colors. `names` has every value as text (`"3"` or
    `"255,0,0"`); `null` for what is no class. A region is a connected part (by eight neighbors) of a class.
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
    """Pairs before and after: `SPLIT/A`, `SPLIT/B` with masks in `SPLIT/label`, captions in `*captions*.json`, or both.

    What is not zero in a mask has changed. The captions' JSON has `images`, each with `filename` and `sentences` (each
    with `raw`), as that of LEVIR-CC. `names` may hold a phrase for `"changed region"`.
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
                raise ValueError(f"{files[missing[0]][0]} has no image after of the same name.")
            pairs[split] = {name: (*paths, *after[split][name]) for name, paths in files.items()}
        return pairs

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return masks_in(self.root, self.mask_folders)

    @cached_property
    def _captions(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """File name -> split, `UNSPLIT` if it is not stated -> sentences."""
        where = self.annotations or self.root
        files = [where] if where.is_file() else sorted(where.rglob("*captions*.json"))
        captions = defaultdict(dict)
        for path in files:
            try:
                for image in read_annotation(path)["images"]:
                    sentences = tuple(filter(None, (sentence["raw"].strip() for sentence in image["sentences"])))
                    split = split_in(str(image.get("split") or image.get("filepath") or "")) or UNSPLIT
                    if captions[image["filename"]].setdefault(split, sentences) != sentences:
                        raise ValueError(f"{path} has two images {image['filename']!r}, with other captions each.")
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} has no captions like those of LEVIR-CC: {error!r}.") from error
        return captions

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        """Return the captions of an image in its split; if its folders do not tell the split, the only ones."""
        found, split = self._captions.get(path.name, {}), split_of_path(path.relative_to(self.root))
        if split == UNSPLIT and len(found) == 1:
            return next(iter(found.values()))
        return found.get(split, found.get(UNSPLIT, ()))

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        if upright_size(paths[1]) != size:
            raise ValueError(f"{paths[0]} and {paths[1]} are not of one size.")
        mask, captions = self._masks.get(image_id), self._captions_of(paths[0])
        if mask is None and not captions:
            raise ValueError(f"{paths[0]} has neither a mask nor captions.")
        label = self.names.get("changed region") or "changed region"
        if mask is not None:
            regions = connected_regions(read_mask_values(mask, size)[0] != 0, label)
        else:  # where, and whether at all, is not annotated
            regions = [Region(label, (0, 0, *size[::-1]), size[0] * size[1], is_clear=False)]
        return [AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)]


@register_layout("volumes")
class Volumes(Layout):
    """Volumes and masks of the same name: `SPLIT/images/CASE.nii.gz` with `SPLIT/masks/CASE.nii.gz`, or `imagesTr`,
    `imagesTs` with `labelsTr`, `labelsTs`, as nnU-Net has them, of whose channels the first is shown. A volume may be a
    folder `CASE` with a DICOM series. Each slice is an image.

    `names` has every value of the masks as text; `null` for what is no class.

    Args:
        plane, intensities, percentiles: which slices are cut, and what becomes black and white, see
            [`~modeling_vitp.images.volumes.VolumeSlices`].
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
            raise ValueError(f"{path} has no mask of the same name.")
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
    """Open a volume with its mask, and keep it for the next slice."""
    return VolumeSlices([path], plane, intensities, percentiles, mask)


def check_values(names: dict[str, str | None]) -> None:
    if not names:
        raise ValueError('Masks hold numbers: give --names, a JSON file such as {"0": null, "1": "building"}.')


def plain_words(label: str) -> str:
    """Return a class as a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` -> `annual crop`; acronyms stay."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def split_in(name: str) -> str | None:
    """Return the split in the name of a file or folder, if any: `instances_train2017` -> `train`."""
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
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
    if orientation != 1:
        raise ValueError(f"{path} is turned by its EXIF data, so boxes and pixels may disagree: save it upright.")
    return size


def find_file(folders: list[Path], name: str) -> Path:
    """Return the file of a name in the first folder that has it, or its path in the first folder if none has."""
    found = (path for folder in folders if is_below(folders[0], path := folder / name) and path.is_file())
    return next(found, folders[0] / name)


def images_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """Return split -> id -> file for the images in all folders of one of these names.

    The split is read from the path. The id is the path without the folder's name and the suffix, so that the files of a
    pair have the same one.
    """
    names, splits = {name.lower() for name in names}, defaultdict(dict)
    for path in image_files(root):
        folders = path.relative_to(root).parent.parts
        place = next((index for index, folder in enumerate(folders) if folder.lower() in names), None)
        if place is not None:
            split = next(filter(None, map(split_in, folders)), UNSPLIT)
            image_id = "/".join((*folders[:place], *folders[place + 1 :], path.stem))
            if image_id in splits[split]:
                raise ValueError(f"{splits[split][image_id][0]} and {path} have one name.")
            splits[split][image_id] = (path,)
    return dict(splits)


def masks_in(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return id -> file for the masks in all folders of one of these names."""
    return {name: paths[0] for files in images_in(root, names).values() for name, paths in files.items()}


def volumes_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """Return split -> case -> file or folder for the volumes in all folders of one of these names."""
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
                    raise ValueError(f"{other} and {path} have one name.")
    return dict(splits)


def first_channels(paths: Sequence[Path]) -> list[Path]:
    """Return the paths without the further channels of volumes, `CASE_0001` and on; warn of those."""
    cases = {name.removesuffix(FIRST_CHANNEL) for name in map(bare_name, paths) if name.endswith(FIRST_CHANNEL)}
    further = [path for path in paths if FURTHER_CHANNEL.sub("", name := bare_name(path)) in cases - {name}]
    if further:
        logger.warning("%s and %d more are further channels: the first is shown.", further[0], len(further) - 1)
    return sorted(set(paths) - set(further))


def case_of(path: Path) -> str:
    """Return the name of a volume without the endings of its format and of nnU-Net."""
    return bare_name(path).removesuffix(FIRST_CHANNEL)


def bare_name(path: Path) -> str:
    suffix = next((suffix for suffix in NIFTI[::-1] if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]
