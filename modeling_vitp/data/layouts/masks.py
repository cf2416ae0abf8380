"""Images with masks of the same names."""

from contextlib import suppress
from functools import cached_property, partial

import numpy as np

from ...images.reading import image_files
from ..annotations import (
    AnnotatedImage,
    mask_key,
    names_of_values,
    read_labels,
    read_mask_values,
    regions_of,
    upright_size,
)
from ..folders import have_common_names, masks_in
from .base import PairedLayout, register_layout


@register_layout("masks")
class Masks(PairedLayout):
    """Image and mask pairs of the same name: `SPLIT/images` with `SPLIT/masks`, or `images/SPLIT` with `masks/SPLIT`.

    A mask has one channel of class numbers (or three equal channels), or three color channels. `names` has each value
    as text (`"3"` or `"255,0,0"`), with `null` for the background; for the default see [`names_of_values`]. A region is
    an 8-connected component of a class.
    """

    subject = "regions"
    annotation = "mask"
    image_folders = ("images", "img_dir", "images_png", "image")
    mask_folders = ("masks", "ann_dir", "masks_png", "mask", "labels", "label", "annotations")

    @classmethod
    def matches(cls, root):
        return have_common_names(root, cls.image_folders, cls.mask_folders)

    @cached_property
    def _files(self):
        if self.annotations is None:
            return masks_in(self.root, self.mask_folders)
        files = {}
        for path in image_files(self.annotations):
            image_id = path.relative_to(self.annotations).with_suffix("").as_posix()
            files[image_id] = path
        return files

    def default_names(self):
        values: set[str] = set()
        for path in self._files.values():
            with suppress(Exception):  # Reading the labels reports the mask, if its image is used.
                numbers, is_color = read_mask_values(path)
                for value in np.unique(numbers).tolist():
                    values.add(mask_key(value, is_color))
        return names_of_values(values)

    def annotate(self, image_id, paths):
        (path,) = paths
        size = upright_size(path)
        mask = partial(read_labels, self._file(image_id, path), size, self.names)
        return [AnnotatedImage(image_id, paths, size, regions_of(mask()), mask=mask)]
