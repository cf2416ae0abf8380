"""Names of folders and files: the split that they name, and the images and masks of a data set by split and id."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..images.reading import IMAGE_SUFFIXES, image_files
from .annotation_files import is_below

UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|training|val|valid|validation|test|testing|test-dev)\d*", re.IGNORECASE)
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test", "test-dev": "test"}
NNUNET_SPLITS = {"tr": "train", "va": "val", "ts": "test"}  # Suffixes of the folders imagesTr, labelsTr, ….
NNUNET_FOLDERS = {f"{kind}{end}": split for kind in ("images", "labels") for end, split in NNUNET_SPLITS.items()}


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
