"""Volumes, NIfTI or DICOM, with masks: each of their slices is an image."""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...images.reading import is_dicom_file
from ...images.volumes import NIFTI, VolumeSlices, check_cut
from .annotations import UNSPLIT, AnnotatedImage, Labels, Layout, split_in
from .masks import numbered, regions_of

IMAGES, MASKS = ("images", "image"), ("masks", "mask", "labels", "label")  # folders
ENDINGS = {"tr": "train", "va": "val", "ts": "test"}  # of nnU-Net's folders: imagesTr, labelsTr …
OF_NNUNET = {f"{kind}{ending}": split for kind in ("images", "labels") for ending, split in ENDINGS.items()}
FIRST_CHANNEL = "_0000"  # of nnU-Net
FURTHER_CHANNEL = re.compile(r"_(?!0000)\d{4}$")

logger = logging.getLogger(__name__)


class Volumes(Layout):
    """Volumes and masks of the same name: `SPLIT/images/CASE.nii.gz` with `SPLIT/masks/CASE.nii.gz`, or `imagesTr`,
    `imagesTs` with `labelsTr`, `labelsTs`, as nnU-Net has them, of whose channels the first is shown. A volume may be a
    folder `CASE` with a DICOM series.

    `names` has every value of the masks as text; `null` for what is no class.

    Args:
        plane, intensities, percentiles: which slices are cut, and what becomes black and white, see
            [`~modeling_vitp.images.volumes.VolumeSlices`].
    """

    subject = "regions"

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
        if not self.names:
            raise ValueError('Masks hold numbers: give --names, a JSON file such as {"0": null, "1": "liver"}.')
        check_cut(plane, intensities, percentiles)
        window, percentiles = (None if pair is None else tuple(pair) for pair in (intensities, percentiles))
        self.plane, self.cut = plane, (plane, window, percentiles)

    def splits(self):
        return {
            split: {case: (path,) for case, path in cases.items()}
            for split, cases in volumes_in(self.root, IMAGES).items()
        }

    @cached_property
    def _masks(self) -> dict[tuple[str, str], Path]:
        where = volumes_in(self.root, MASKS)
        return {(split, case): path for split, cases in where.items() for case, path in cases.items()}

    def case(self, path):
        return super().case(path) or f"The case {case_of(path)}"

    def annotate_file(self, image_id, paths):
        (path,) = paths
        split = split_of(path.relative_to(self.root))
        mask_path = self._masks.get((split, image_id))
        if mask_path is None:
            raise ValueError(f"{path} has no mask of the same name.")
        slices = open_slices(path, mask_path, *self.cut)
        images = []
        for index in range(len(slices)):
            mask = partial(self._labels, path, mask_path, index)
            found = AnnotatedImage(
                f"{image_id}/{self.plane}_{index:04d}",
                paths,
                slices.size,
                regions_of(mask()),
                mask=mask,
                picture=partial(self._picture, path, mask_path, index),
            )
            images.append(found)
        return images

    def _labels(self, path: Path, mask_path: Path, index: int) -> Labels:
        values = open_slices(path, mask_path, *self.cut).mask(index).astype(np.int64)
        return numbered(values, False, self.names, mask_path)

    def _picture(self, path: Path, mask_path: Path, index: int) -> Image.Image:
        return open_slices(path, mask_path, *self.cut).image(index)


@lru_cache(maxsize=1)
def open_slices(path: Path, mask: Path, plane: str, intensities: tuple, percentiles: tuple) -> VolumeSlices:
    """Kept for the next slice."""
    return VolumeSlices([path], plane, intensities, percentiles, mask)


def volumes_in(root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """The volumes in the folders of one of these names: split -> case -> file or folder."""
    splits = defaultdict(dict)
    names = {*names, *(name for name in OF_NNUNET if name.startswith(names))}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir() and path.name.lower() in names):
        paths = sorted(folder.iterdir())
        if folder.name.lower() in OF_NNUNET:
            paths = first_channels(paths)
        for path in paths:
            is_nifti = path.is_file() and path.name.lower().endswith(NIFTI)
            if is_nifti or (path.is_dir() and any(file.is_file() and is_dicom_file(file) for file in path.iterdir())):
                case, cases = case_of(path), splits[split_of(path.relative_to(root))]
                if case in cases:
                    raise ValueError(f"{cases[case]} and {path} have one name.")
                cases[case] = path
    return dict(splits)


def first_channels(paths: Sequence[Path]) -> list[Path]:
    """Without the further channels of volumes, `CASE_0001` and on, which are passed over with a warning."""
    cases = {name.removesuffix(FIRST_CHANNEL) for name in map(bare_name, paths) if name.endswith(FIRST_CHANNEL)}
    further = [path for path in paths if FURTHER_CHANNEL.sub("", name := bare_name(path)) in cases - {name}]
    if further:
        logger.warning("%s and %d more are further channels: the first is shown.", further[0], len(further) - 1)
    return sorted(set(paths) - set(further))


def case_of(path: Path) -> str:
    """The name of a volume without what its format, or nnU-Net, adds."""
    return bare_name(path).removesuffix(FIRST_CHANNEL)


def bare_name(path: Path) -> str:
    suffix = next((suffix for suffix in NIFTI[::-1] if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]


def split_of(path: Path) -> str:
    """The split that the folders of a volume speak of."""
    folders = path.parent.parts
    named = (split_in(folder) or OF_NNUNET.get(folder.lower()) for folder in folders)
    return next(filter(None, named), UNSPLIT)
