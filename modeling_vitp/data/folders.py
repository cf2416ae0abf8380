"""Names of folders and files: the split that they name, and the images and masks of a data set by split and id."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..images.reading import IMAGE_SUFFIXES, image_files
from .annotation_files import add_file, is_below

UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|training|val|valid|validation|test|testing|test-dev)\d*", re.IGNORECASE)
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test", "test-dev": "test"}
NNUNET_FOLDERS = {
    "imagestr": "train",
    "imagesva": "val",
    "imagests": "test",
    "labelstr": "train",
    "labelsva": "val",
    "labelsts": "test",
}


def check_folder(root: Path) -> None:
    """Raise a `ValueError` if the folder of a data set does not exist."""
    if not root.is_dir():
        raise ValueError(f"Folder of the data set {root} not found. Correct `root`, or the option `data_root`.")


def split_in(name: str) -> str | None:
    """Return the split in the name of a file or folder, such as `train` for `instances_train2017`, or `None`."""
    words = name.lower().replace("train_val", "trainval").split("_")
    for word in reversed(words):
        if SPLIT_NAME.fullmatch(word):
            split = word.rstrip("0123456789")
            return SPLIT_NAMES.get(split, split)
    return None


def split_of_path(path: Path) -> str:
    """Return the split in the names of the folders of a path."""
    for folder in path.parent.parts:
        split = split_in(folder) or NNUNET_FOLDERS.get(folder.lower())
        if split is not None:
            return split
    return UNSPLIT


def find_file(folders: list[Path], name: str) -> Path:
    """Return the path of a file in the first folder that contains it, or in the first folder if none does."""
    root = folders[0]
    for folder in folders:
        path = folder / name
        if is_below(root, path) and path.is_file():
            return path
    return root / name


def images_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """Return the images in all folders with one of these names, by split and id.

    The split is read from the path. The id is the path without the folder's name and the suffix, so that both files of
    a pair have the same id.
    """
    paths_of_splits = defaultdict(dict)
    for path in image_files(root):
        folders = path.relative_to(root).parent.parts
        level = level_of(folders, names)
        if level is None:
            continue
        split = UNSPLIT
        for folder in reversed(folders):
            split = split_in(folder) or split
        image_id = "/".join((*folders[:level], *folders[level + 1 :], path.stem))
        add_file(paths_of_splits[split], image_id, path)
    splits = {}
    for split, paths in paths_of_splits.items():
        splits[split] = {image_id: (path,) for image_id, path in paths.items()}
    return splits


def level_of(folders: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first folder that has one of the names, compared without case, or `None`."""
    lowercase_names = {name.lower() for name in names}
    for index, folder in enumerate(folders):
        if folder.lower() in lowercase_names:
            return index
    return None


def masks_in(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the masks in all folders with one of these names, by id."""
    masks = {}
    for files in images_in(root, names).values():
        for mask_id, (path,) in files.items():
            masks[mask_id] = path
    return masks


def have_common_names(root: Path, *groups: tuple[str, ...]) -> bool:
    """Return whether an image id occurs in the folders of each of several groups of names, see [`images_in`]."""
    ids_of_groups = [set() for _ in groups]
    for folder, _, files in os.walk(root):
        folders = Path(folder).relative_to(root).parts
        for ids, names in zip(ids_of_groups, groups):
            level = level_of(folders, names)
            if level is None:
                continue
            for file in files:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in IMAGE_SUFFIXES:
                    ids.add((*folders[:level], *folders[level + 1 :], stem))
    return bool(set.intersection(*ids_of_groups))
