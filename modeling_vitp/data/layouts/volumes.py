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
from ..annotation_files import add_file
from ..annotations import AnnotatedImage, LabelMap, mask_key, names_of_values, number_classes, regions_of
from ..folders import NNUNET_FOLDERS, split_of_path
from .base import Layout, register_layout

logger = logging.getLogger(__name__)

DEFAULT_PERCENTILES = (1.0, 99.0)
FIRST_CHANNEL = "_0000"  # Suffix of nnU-Net's file names.
FURTHER_CHANNEL = re.compile(r"_(?!0000)\d{4}$")


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
    image_folders = ("images", "image")
    mask_folders = ("masks", "mask", "labels", "label")

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
        self.plane = plane
        self.intensities = None if intensities is None else tuple(intensities)
        self.percentiles = None if percentiles is None else tuple(percentiles)

    def splits(self):
        splits = {}
        for split, volumes in volumes_in(self.root, self.image_folders).items():
            splits[split] = {case: (path,) for case, path in volumes.items()}
        return splits

    @cached_property
    def _masks(self) -> dict[str, dict[str, Path]]:
        return volumes_in(self.root, self.mask_folders)

    def default_names(self):
        values: set[str] = set()
        for masks in self._masks.values():
            for path in masks.values():
                with suppress(Exception):  # Reading the labels reports the mask, if its volume is used.
                    volume = open_volume(path)
                    for index in range(volume.number(self.plane)):
                        stored_slice = volume.cut(self.plane, index)
                        numbers = whole_numbers(stored_slice, path)
                        for value in np.unique(numbers).tolist():
                            values.add(mask_key(value, is_color=False))
        return names_of_values(values)

    def case(self, path):
        return super().case(path) or f"The case {case_of(path)}"

    def annotate(self, image_id, paths):
        (path,) = paths
        split = split_of_path(path.relative_to(self.root))
        mask_path = self._masks.get(split, {}).get(image_id)
        if mask_path is None:
            raise ValueError(f"No mask of the same name as {path} found.")
        slices = self._slices(path, mask_path)
        images = []
        for index in range(len(slices)):
            mask = partial(self._labels, path, mask_path, index)
            image = AnnotatedImage(
                f"{image_id}/{self.plane}_{index:04d}",
                paths,
                slices.size,
                regions_of(mask()),
                mask=mask,
                picture=partial(self._picture, path, mask_path, index),
            )
            images.append(image)
        return images

    def _slices(self, path: Path, mask_path: Path) -> VolumeSlices:
        return open_slices(path, mask_path, self.plane, self.intensities, self.percentiles)

    def _labels(self, path: Path, mask_path: Path, index: int) -> LabelMap:
        values = self._slices(path, mask_path).mask(index).astype(np.int64)
        return number_classes(
            values,
            is_color=False,
            names=self.names,
            path=mask_path,
        )

    def _picture(self, path: Path, mask_path: Path, index: int) -> Image.Image:
        return self._slices(path, mask_path).image(index)


@lru_cache(maxsize=1)
def open_slices(
    path: Path,
    mask: Path,
    plane: str,
    intensities: tuple,
    percentiles: tuple,
) -> VolumeSlices:
    """Open a volume with its mask, which is cached for the next slice."""
    return VolumeSlices([path], plane, intensities, percentiles, mask)


def volumes_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """Return the files or folders of volumes in all folders with one of these names, by split and case."""
    splits = defaultdict(dict)
    folder_names = set(names)
    for name in NNUNET_FOLDERS:
        if name.startswith(names):
            folder_names.add(name)
    folders = []
    for parent, children, _ in os.walk(root):
        for child in children:
            if child.lower() in folder_names:
                folders.append(Path(parent, child))
    for folder in sorted(folders):
        paths = sorted(folder.iterdir())
        if folder.name.lower() in NNUNET_FOLDERS:
            paths = first_channels(paths)
        for path in paths:
            if is_volume(path):
                split = split_of_path(path.relative_to(root))
                add_file(splits[split], case_of(path), path)
    return dict(splits)


def is_volume(path: Path) -> bool:
    """Return whether a path is a NIfTI file, or a folder with a DICOM file."""
    if path.is_file():
        return path.name.lower().endswith(NIFTI)
    if not path.is_dir():
        return False
    return any(file.is_file() and is_dicom_file(file) for file in path.iterdir())


def first_channels(paths: Sequence[Path]) -> list[Path]:
    """Return the paths without the additional channels of volumes, `CASE_0001` etc.; log these channels."""
    cases = set()
    for path in paths:
        name = bare_name(path)
        if name.endswith(FIRST_CHANNEL):
            cases.add(name.removesuffix(FIRST_CHANNEL))
    further_channels = []
    for path in paths:
        name = bare_name(path)
        case = FURTHER_CHANNEL.sub("", name)
        if case != name and case in cases:
            further_channels.append(path)
    if further_channels:
        logger.warning(
            "%s and %d more channels are ignored: only the first is used.",
            further_channels[0],
            len(further_channels) - 1,
        )
    return sorted(set(paths) - set(further_channels))


def case_of(path: Path) -> str:
    """Return the name of a volume without the suffixes of its format and of nnU-Net."""
    return bare_name(path).removesuffix(FIRST_CHANNEL)


def bare_name(path: Path) -> str:
    for suffix in reversed(NIFTI):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
