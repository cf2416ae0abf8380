"""Folders of images, one for each class."""

from functools import cached_property
from pathlib import Path

from ...images.reading import IMAGE_SUFFIXES, check_file, image_files, stored_size
from ..annotations import AnnotatedImage
from ..folders import SPLIT_NAME, UNSPLIT, split_in
from .base import ClassLayout, register_layout
from .masks import Masks


@register_layout("folders")
class ClassFolders(ClassLayout):
    """Image folders, one per class: `SPLIT/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` without splits."""

    has_class_folders = True

    @classmethod
    def matches(cls, root):
        split_folders = cls(root)._split_folders
        class_folders = []
        for parent in split_folders.values() or [root]:
            class_folders += class_folders_in(parent)
        names = {folder.name for folder in class_folders}
        if len(names) < 2:
            return False
        num_splits = 0
        for name in names:
            is_of_masks = name.lower() in (*Masks.image_folders, *Masks.mask_folders)
            if is_of_masks or SPLIT_NAME.fullmatch(name):
                return False
            if split_in(name) is not None:
                num_splits += 1
        # Several folders such as `areas_train` and `areas_test` are splits.
        if num_splits > 1 and not split_folders:
            return False
        return all(has_image(folder) for folder in class_folders)

    @cached_property
    def _split_folders(self) -> dict[str, Path]:
        folders = {}
        for path in sorted(self.root.iterdir()):
            is_split = path.is_dir() and SPLIT_NAME.fullmatch(path.name)
            if is_split and any(child.is_dir() for child in path.iterdir()):
                folders[split_in(path.name)] = path
        return folders

    def splits(self):
        folders = self._split_folders or {UNSPLIT: self.root}
        splits = {}
        for split, folder in folders.items():
            splits[split] = {}
            for path in image_files(folder):
                image_id = path.relative_to(self.root).as_posix()
                splits[split][image_id] = (path,)
        return splits

    def data_settings(self):
        splits = {}
        for split, images in self.splits().items():
            if images:
                split_folder = next(iter(images)).split("/")[0]
                prefix = "" if split == UNSPLIT else f"{split_folder}/"
                splits[split] = {"image": f"{prefix}{{class}}/{{name:[^/]+}}.*"}
        return {"splits": splits}

    def annotate(self, image_id, paths):
        (path,) = paths
        expected_parts = ("SPLIT", "CLASS", "NAME") if self._split_folders else ("CLASS", "NAME")
        parts = path.relative_to(self.root).parts
        if len(parts) != len(expected_parts):
            pattern = "/".join(expected_parts)
            raise ValueError(f"Expected images at {pattern} in {self.root}, got {path}. Move the file.")
        size = stored_size(path)  # Of any orientation, which the class does not depend on.
        check_file(path)
        return [AnnotatedImage(image_id, paths, size, labels=self.phrases([path.parent.name]))]


def class_folders_in(parent: Path) -> list[Path]:
    """Return the visible folders in a folder, without empty ones, which the readers of classes name in their error."""
    folders = []
    for folder in parent.iterdir():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            folders.append(folder)
    return folders


def has_image(folder: Path) -> bool:
    """Return whether an image is directly in a folder."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
