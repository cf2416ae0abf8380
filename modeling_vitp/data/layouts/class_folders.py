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

    def data_settings(self):
        splits = {}
        for split, images in self.splits().items():
            if images:
                split_folder = next(iter(images)).split("/")[0]
                prefix = "" if split == UNSPLIT else f"{split_folder}/"
                splits[split] = {"image": f"{prefix}{{class}}/{{name:[^/]+}}.*"}
        return {"splits": splits}

    def annotate(self, image_id, paths):
        expected = ("SPLIT", "CLASS", "NAME") if self._split_folders else ("CLASS", "NAME")
        if len(paths[0].relative_to(self.root).parts) != len(expected):
            raise ValueError(f"Expected images at {'/'.join(expected)} in {self.root}, got {paths[0]}. Move the file.")
        size = stored_size(paths[0])  # of any orientation, which the class does not depend on
        check_file(paths[0])
        return [AnnotatedImage(image_id, paths, size, label=self.phrase(paths[0].parent.name))]
