"""Volumes (NIfTI, DICOM series) with masks, of which each slice is an image."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...images.reading import is_dicom_file, whole_numbers
from ...images.volumes import NIFTI, VolumeSlices, check_cut, open_volume
from ..annotations import AnnotatedImage, LabelMap, mask_key, names_of_values, number_classes, regions_of
from ..folders import NNUNET_FOLDERS, split_of_path
from .base import Layout, register_layout

logger = logging.getLogger(__name__)

DEFAULT_PERCENTILES = (1.0, 99.0)
FIRST_CHANNEL, FURTHER_CHANNEL = "_0000", re.compile(r"_(?!0000)\d{4}$")  # Suffixes of nnU-Net's file names.


@register_layout("volumes")
class Volumes(Layout):
    """Volumes and masks of the same name: `SPLIT/images/CASE.nii.gz` with `SPLIT/masks/CASE.nii.gz`.

    The folders of nnU-Net are read as well: `imagesTr`, `imagesTs` with `labelsTr`, `labelsTs`, of whose channels only
    the first is used. A volume may be a folder `CASE` with a DICOM series. Each slice is an image.

    `names` has each value of the masks as text, with `null` for the background; for the default see
    [`names_of_values`].

    Args:
        root, names, annotations: see [`Layout`].
        plane: plane of the slices, see [`~modeling_vitp.images.volumes.VolumeSlices`].
        intensities, percentiles: intensities or percentiles that are shown as black and white, see the same class. By
            default the percentiles `DEFAULT_PERCENTILES`.
    """

    subject = "regions"
    options = ("plane", "intensities", "percentiles")
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
        if intensities is None and percentiles is None:
            percentiles = DEFAULT_PERCENTILES
        check_cut(plane, intensities, percentiles)
        window, percentiles = (None if pair is None else tuple(pair) for pair in (intensities, percentiles))
        self.plane, self.cut = plane, (plane, window, percentiles)

    def splits(self):
        volumes = volumes_in(self.root, self.image_folders)
        return {split: {case: (path,) for case, path in cases.items()} for split, cases in volumes.items()}

    @cached_property
    def _masks(self) -> dict[str, dict[str, Path]]:
        return volumes_in(self.root, self.mask_folders)

    def default_names(self):
        values: set[str] = set()
        for path in (path for cases in self._masks.values() for path in cases.values()):
            with suppress(Exception):  # Reading the labels reports the mask, if its volume is used.
                volume = open_volume(path)
                for index in range(volume.number(self.plane)):
                    numbers = whole_numbers(volume.cut(self.plane, index), path)
                    values.update(mask_key(value, False) for value in np.unique(numbers).tolist())
        return names_of_values(values)

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
