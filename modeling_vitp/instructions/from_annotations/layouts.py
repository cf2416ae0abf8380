"""The layouts of annotated data on disk, one class each."""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np

from ...images.reading import below, image_files
from .annotations import (
    SPLIT_NAME,
    UNSPLIT,
    AnnotatedImage,
    Layout,
    Region,
    read_annotation,
    read_list,
    read_text,
    split_in,
    upright_size,
)
from .formats import (
    STATISTICS,
    check_coco,
    check_size,
    coco_annotations,
    coco_object,
    dota_objects,
    parse_xml,
    voc_objects,
    voc_size,
)
from .masks import connected_regions, labels_of, mask_values, regions_of
from .volumes import Volumes


class Coco(Layout):
    """COCO JSON, one file a split: `annotations/instances_train2017.json`, `train/_annotations.coco.json`, ….

    The split is in the file's name or its folder's. Images: where `file_name` leads from the root, from `images/`,
    `JPEGImages/`, the folder of the JSON, from the folder of the split under any of these, or `images/` in that.
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
            contents = read_annotation(path)
            if not isinstance(contents, dict) or not {"images", "categories"} <= contents.keys():
                continue
            check_coco(contents, path)
            check_file_names(contents, path)
            split = split_in(path.stem) or split_in(path.parent.name) or UNSPLIT
            if split in files:
                raise ValueError(f"{files[split][0]} and {path} both annotate split {split!r}: give --annotations.")
            places = [self.root, *(self.root / folder for folder in ("images", "JPEGImages")), path.parent]
            places += [folder for place in places for folder in sorted(place.glob(f"{split}*")) if folder.is_dir()]
            places += [place / "images" for place in places[1:]]
            files[split] = (path, contents, partial(find_file, places))
        if not files:
            raise ValueError(f"There is no COCO JSON under {where}.")
        return files

    @cached_property
    def _entries(self) -> dict[Path, tuple[Path, dict, list[dict] | None, dict]]:
        """Image file -> the JSON file, its entry there, its objects, if any are annotated there, and the categories."""
        entries = {}
        for path, contents, find in self._files.values():
            categories = {category["id"]: category["name"] for category in contents["categories"]}
            objects = coco_annotations(contents)
            for entry in contents["images"]:
                found = objects[entry["id"]] if "annotations" in contents else None
                entries[find(entry["file_name"])] = (path, entry, found, categories)
        return entries

    def annotate(self, image_id, paths):
        path, entry, objects, categories = self._entries[paths[0]]
        if objects is None:
            raise ValueError(f"{path} has no `annotations`, so that nothing can be said of {paths[0]}.")
        size = upright_size(paths[0])
        check_size((entry.get("height", size[0]), entry.get("width", size[1])), size, path, paths[0])
        regions = []
        for annotation in objects:
            found = coco_object(annotation, categories, path)
            regions += self.region(
                found.where,
                found.label,
                found.box,
                size,
                area=found.area,
                caption=found.caption,
                is_clear=not found.is_crowd,
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
        return by_key(self.annotations or self.root, ".xml", lambda path: path.stem)

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
        path, size, regions = self._files[image_id], upright_size(paths[0]), []
        tree = parse_xml(path)
        check_size(voc_size(tree) or size, size, path, paths[0])
        for found in voc_objects(tree, path):
            regions += self.region(found.where, found.label, found.box, size, is_clear=not found.is_difficult)
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class Pairs(Layout):
    """Images with an annotation in a file of the same name each."""

    annotation: str  # what such a file is called
    image_folders: tuple[str, ...]
    _files: dict[str, Path]  # of an image's id, or of what the id of its image would be, to the annotation

    def splits(self):
        return images_in(self.root, self.image_folders)

    @cached_property
    def _ids(self) -> set[str]:
        return {image_id for images in self.splits().values() for image_id in images}

    @cached_property
    def _namesakes(self) -> Counter[str]:
        """Name -> how many images are called so."""
        return Counter(image_id.rpartition("/")[2] for image_id in self._ids)

    @cached_property
    def _named(self) -> dict[str, list[Path]]:
        """Name -> annotations that are called so and are of no image by its id."""
        named = defaultdict(list)
        for image_id, path in self._files.items():
            if image_id not in self._ids:
                named[path.stem].append(path)
        return named

    def _file(self, image_id: str, path: Path) -> Path:
        """The annotation of an image's id, or else of its name, if no other image is called so."""
        if image_id in self._files:
            return self._files[image_id]
        where, found = self.annotations or self.root, self._named.get(path.stem, [])
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} could both be the {self.annotation} of {path}.")
        if not found:
            raise ValueError(f"{path} has no {self.annotation} of the same name under {where}.")
        if self._namesakes[path.stem] > 1:
            raise ValueError(
                f"{found[0]} is of one of several images called {path.stem}, as {path}: put it in folders like those "
                "of its image."
            )
        return found[0]


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

        def key(path: Path) -> str:
            folders = path.relative_to(base).parent.parts
            return "/".join((*(folder for folder in folders if "label" not in folder.lower()), path.stem))

        return by_key(where, ".txt", key, within="label")

    def annotate(self, image_id, paths):
        path, size, regions = self._file(image_id, paths[0]), upright_size(paths[0]), []
        for found in dota_objects(read_text(path), path):
            area = float(cv2.contourArea(np.array(found.corners, dtype=np.float32)))
            regions += self.region(
                found.where, found.label, found.box, size, area=area, is_clear=not found.is_difficult
            )
        return AnnotatedImage(image_id, paths, size, tuple(regions))


class ClassFolders(Layout):
    """A folder per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

    subject = "scene"

    @cached_property
    def _split_folders(self) -> dict[str, Path]:
        folders = [path for path in sorted(self.root.iterdir()) if path.is_dir()]
        return {
            split_in(path.name): path
            for path in folders
            if SPLIT_NAME.fullmatch(path.name) and any(child.is_dir() for child in path.iterdir())
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
        return AnnotatedImage(image_id, paths, upright_size(paths[0]), label=self.phrase(paths[0].parent.name))


class Masks(Pairs):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers, or three of colours. `names` has every value as text (`"3"` or
    `"255,0,0"`); `null` for what is no class. A region is a connected part (by eight neighbours) of a class.
    """

    subject, annotation = "regions", "mask"
    image_folders = ("images", "img_dir", "images_png", "image")
    mask_folders = ("masks", "ann_dir", "masks_png", "mask", "labels", "label")

    def __init__(self, root, names=None, annotations=None):
        super().__init__(root, names, annotations)
        if not self.names:
            raise ValueError('Masks hold numbers: give --names, a JSON file such as {"0": null, "1": "building"}.')

    @cached_property
    def _files(self):
        if self.annotations is not None:
            return {
                path.relative_to(self.annotations).with_suffix("").as_posix(): path
                for path in image_files(self.annotations)
            }
        folders = images_in(self.root, self.mask_folders)
        return {name: paths[0] for files in folders.values() for name, paths in files.items()}

    def annotate(self, image_id, paths):
        mask_path = self._file(image_id, paths[0])
        size = upright_size(paths[0])
        mask = partial(labels_of, mask_path, size, self.names)
        return AnnotatedImage(image_id, paths, size, regions_of(mask()), mask=mask)


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
    def _captions(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """File name -> split, `UNSPLIT` where that is not told -> sentences."""
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
        """Those of its split; of the only one where the folders do not tell it."""
        found = self._captions.get(path.name, {})
        folders = path.relative_to(self.root).parent.parts
        split = next((split for folder in folders if (split := split_in(folder))), UNSPLIT)
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
            regions = connected_regions(mask_values(mask, size)[0] != 0, label)
        else:  # where, and whether at all, is not annotated
            regions = [Region(label, (0, 0, *size[::-1]), size[0] * size[1], is_clear=False)]
        return AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)


LAYOUTS: dict[str, type[Layout]] = {
    "coco": Coco,
    "voc": PascalVOC,
    "dota": Dota,
    "folders": ClassFolders,
    "masks": Masks,
    "changes": ChangePairs,
    "volumes": Volumes,
}


def check_file_names(contents: dict, path: Path) -> None:
    """Raises a `ValueError` if two images of a COCO file are one: objects of either would be missing."""
    names = set()
    for entry in contents["images"]:
        if entry["file_name"] in names:
            raise ValueError(
                f"{path}: two entries of `images` have the file_name {entry['file_name']!r}: join them, under one id."
            )
        names.add(entry["file_name"])


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


def by_key(root: Path, suffix: str, key: Callable[[Path], str], within: str = "") -> dict[str, Path]:
    """Key -> file, of the files under a folder; raises `ValueError` if two have one key, or none is.

    Only of folders with `within` in their name, if there are any.
    """
    paths = sorted(path for path in root.rglob(f"*{suffix}") if not path.name.lower().endswith(STATISTICS))
    paths = [path for path in paths if within in path.relative_to(root).parent.as_posix().lower()] or paths
    files = {}
    for path in paths:
        if key(path) in files:
            raise ValueError(f"{files[key(path)]} and {path} both annotate {key(path)}: give --annotations.")
        files[key(path)] = path
    if not files:
        raise ValueError(f"There is no {suffix} file under {root}.")
    return files


def find_file(places: list[Path], name: str) -> Path:
    """The file of a name in the first of several folders that has it; where it should be if none has."""
    found = (path for place in places if is_below(places[0], path := place / name) and path.is_file())
    return next(found, places[0] / name)


def is_below(root: Path, path: Path) -> bool:
    try:
        return bool(below(root, path))
    except ValueError:
        return False
