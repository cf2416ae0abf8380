"""Volumes, as NIfTI files or DICOM series, and their slices as 8-bit images; no more is in memory than a slice."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
from nibabel.affines import voxel_sizes
from nibabel.openers import ImageOpener
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
NIFTI = (".nii", ".nii.gz")
MILLIMETERS = {"micron": 1e-3, "meter": 1e3}  # of the units that a NIfTI header may name
MAX_SAMPLED = 1 << 24  # values that percentiles are taken of


@dataclass(frozen=True)
class Volume:
    """A volume as it is stored, and where it is.

    A slice is as a patient lies who is seen from the feet, from the front or from the left: the volume is turned to the
    closest canonical axes (right, anterior, superior), and in a slice the last axis of the two that are left points up
    and the first one to the right. Nothing is resampled.

    Args:
        path: the NIfTI file, or the folder of the DICOM series.
        stored: values of shape `(i, j, k)`, mapped from a file.
        affine: from their indices to the right, to the front and up, float64 of shape `(4, 4)`; in millimeters unless
            the header names other units.
        header: the file's, or one made for the series.
        scale: slope and intercept, from what is stored to values.
    """

    path: Path
    stored: np.ndarray
    affine: np.ndarray
    header: nibabel.Nifti1Header
    scale: tuple[float, float] = (1.0, 0.0)

    @property
    def orientation(self) -> np.ndarray:
        return io_orientation(self.affine)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        return apply_orientation(self.stored, self.orientation).shape

    @property
    def canonical_affine(self) -> np.ndarray:
        return self.affine @ inv_ornt_aff(self.orientation, self.stored.shape)

    def number(self, plane: str) -> int:
        """Return the number of slices in a plane."""
        return self.canonical_shape[PLANES[plane]]

    def size(self, plane: str) -> tuple[int, int]:
        """Height and width of a slice."""
        across, up = (length for axis, length in enumerate(self.canonical_shape) if axis != PLANES[plane])
        return up, across

    def spacing(self, plane: str) -> tuple[float, float, float]:
        """Return the millimeters from slice to slice, from row to row and from column to column."""
        unit = MILLIMETERS.get(self.header.get_xyzt_units()[0], 1.0)
        sizes = (unit * voxel_sizes(self.canonical_affine)).tolist()
        between = sizes.pop(PLANES[plane])
        across, up = sizes
        return between, up, across

    def cut(self, plane: str, index: int) -> np.ndarray:
        """Return a slice, float32 of shape `(height, width)`, in the volume's own units."""
        canonical = apply_orientation(self.stored, self.orientation)
        where = [slice(None)] * 3
        where[PLANES[plane]] = index
        return self.scaled(np.ascontiguousarray(np.rot90(canonical[tuple(where)])))

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        slope, intercept = self.scale
        if (slope, intercept) == (1, 0):
            return stored.astype(np.float32)
        return (stored.astype(np.float64) * slope + intercept).astype(np.float32)

    def uncut(self, slices: np.ndarray, plane: str) -> np.ndarray:
        """Return slices as [`cut`] gives them in the axes of the stored volume, as a view: `(number, height, width, …)`
        becomes `(i, j, k, …)`."""
        canonical = np.moveaxis(np.rot90(slices, -1, axes=(1, 2)), 0, PLANES[plane])
        return apply_orientation(canonical, ornt_transform(io_orientation(np.eye(4)), self.orientation))

    def window(self, percentiles: Sequence[float]) -> tuple[float, float]:
        """Return percentiles of the values that are not 0; of at most 16 million, evenly spread, of larger volumes.

        Raises:
            ValueError: if there are none.
        """
        every = math.ceil(self.stored.size / MAX_SAMPLED)
        values = self.scaled(self.stored.ravel(order="K")[::every])
        values = values[np.isfinite(values) & (values != 0)]
        if not values.size:
            raise ValueError(f"{self.path} is 0 everywhere.")
        low, high = np.percentile(values, percentiles)
        return float(low), float(high)


def is_volume(path: Path) -> bool:
    """Return whether a path is that of a NIfTI file or of a folder, as a DICOM series is."""
    return path.is_dir() or path.name.lower().endswith(NIFTI)


def files_of(path: Path) -> list[Path]:
    """Return the file, or all files in the folder of a series."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def open_volume(path: Path) -> Volume:
    """Open a NIfTI file, or a folder with the files of a DICOM series.

    What is compressed is unpacked into an unnamed temporary file, so that any slice is read without the others.

    Raises:
        ValueError: in one line that names the file, if it cannot be read, has not three axes, no spacing, colors, or
            values that are NaN or infinite; of a series see
            [`~modeling_vitp.images.dicom.read_series`], whose padding becomes the least value.
        FileNotFoundError: if there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    return open_series(path) if path.is_dir() else open_nifti(path)


def open_series(folder: Path) -> Volume:
    from .dicom import read_series  # needs pydicom

    values, affine = read_series(folder)
    low = min((float(np.nanmin(part)) for part in values.T if np.isfinite(part).any()), default=0.0)
    for part in values.T:
        part[np.isnan(part)] = low
    header = nibabel.Nifti1Header()
    header.set_data_shape(values.shape)
    header.set_sform(affine, "scanner")
    header.set_qform(affine, "scanner")
    header.set_xyzt_units("mm")
    return Volume(folder, values, affine, header)


def open_nifti(path: Path) -> Volume:
    try:
        image = nibabel.load(path)
        proxy = image.dataobj
        if len(proxy.shape) == 3:
            stored = map_file(Path(image.file_map["image"].filename), proxy)
    except Exception as error:  # nibabel raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(proxy.shape) != 3:
        raise ValueError(
            f"{path} has {len(proxy.shape)} axes, but a volume has three: save one of its volumes alone, "
            "nibabel.four_to_three does."
        )
    if stored.dtype.kind not in "buif":
        raise ValueError(f"{path} has values of type {stored.dtype}: one number for each voxel is needed.")
    if not has_spacing(image):
        raise ValueError(f"{path} has no spacing: its header has neither an affine nor the size of a voxel (pixdim).")
    if stored.dtype.kind == "f":
        wrong = sum(int((~np.isfinite(part)).sum()) for part in stored.T)
        if wrong:
            raise ValueError(f"{path} has {wrong} values that are NaN or infinite: repair or remove it.")
    header = image.header
    if not isinstance(header, nibabel.Nifti1Header):
        header = nibabel.Nifti1Header.from_header(header)
    return Volume(path, stored, image.affine, header, (float(proxy.slope), float(proxy.inter)))


def has_spacing(image: nibabel.spatialimages.SpatialImage) -> bool:
    """Return whether a header has the size of a voxel; nibabel takes 1 for a size of 0."""
    if isinstance(image, nibabel.Nifti1Image):
        with ImageOpener(image.file_map["image"].filename) as file:
            stored = type(image.header).from_fileobj(file, check=False)
        if not stored["sform_code"] and not (stored["pixdim"][1:4] > 0).all():
            return False
    return bool(np.isfinite(image.affine).all() and abs(np.linalg.det(image.affine[:3, :3])) > 1e-12)


def map_file(path: Path, proxy: nibabel.arrayproxy.ArrayProxy) -> np.memmap:
    file = path
    if path.suffix.lower() in ImageOpener.compress_ext_map:
        file = tempfile.TemporaryFile()
        with ImageOpener(path) as packed:
            shutil.copyfileobj(packed, file)
    return np.memmap(file, proxy.dtype, "r", proxy.offset, proxy.shape, order="F")


def check_same_place(volumes: Sequence[Volume]) -> None:
    """Raise a `ValueError` that names a volume of another shape, place or orientation than the first."""
    first = volumes[0]
    for other in volumes[1:]:
        if other.canonical_shape != first.canonical_shape:
            raise ValueError(
                f"{other.path} has shape {other.canonical_shape}, but {first.path} {first.canonical_shape}."
            )
        if not np.allclose(other.canonical_affine, first.canonical_affine, atol=1e-2):
            raise ValueError(f"{other.path} lies elsewhere than {first.path}: their affines differ.")


def to_gray(values: np.ndarray, window: tuple[float, float], path: Path) -> np.ndarray:
    """Return a slice as uint8: black below the window, white above."""
    low, high = window
    if not low < high:
        raise ValueError(f"{path}: the window from {low} to {high} is empty.")
    return (255 * np.clip((values - low) / (high - low), 0, 1)).round().astype(np.uint8)


def check_cut(plane: str, window: Sequence[float] | None, percentiles: Sequence[float] | None) -> None:
    """Raise a `ValueError` if plane, window or percentiles do not say how volumes become images."""
    if plane not in PLANES:
        raise ValueError(f"plane={plane!r} is none of {sorted(PLANES)}.")
    if (window is None) == (percentiles is None):
        raise ValueError("Volumes need either `window` or `percentiles`: which values become black and white.")
    name, pair = ("percentiles", percentiles) if window is None else ("window", window)
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
    if len(pair) != 2 or not are_numbers or not pair[0] < pair[1]:
        raise ValueError(f"{name}={list(pair)}: volumes need two numbers, black first.")


class VolumeSlices:
    """The slices of a volume, or of several that are the channels of one, as 8-bit images, and of its mask.

    Args:
        paths: one volume, or three.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value of the volumes' own units, which become black and white.
        percentiles: instead, low and high in [0, 100] of each volume's values that are not 0.
        mask: the volume of the mask, if there is one.

    Raises:
        ValueError: names the volume that cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), or is of
            another shape or place than the first.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        plane: str,
        window: Sequence[float] | None,
        percentiles: Sequence[float] | None,
        mask: Path | None = None,
    ):
        if len(paths) not in (1, 3):
            raise ValueError(f"{len(paths)} volumes cannot be the channels of an image: give one, or three.")
        self.plane = plane
        self.volumes = [open_volume(path) for path in paths]
        self.labels = None if mask is None else open_volume(mask)
        check_same_place(self.volumes if mask is None else [*self.volumes, self.labels])
        self.windows = [tuple(window) if window else volume.window(percentiles) for volume in self.volumes]

    def __len__(self) -> int:
        return self.volumes[0].number(self.plane)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a slice."""
        return self.volumes[0].size(self.plane)

    def image(self, index: int) -> PIL.Image.Image:
        pairs = zip(self.volumes, self.windows)
        channels = [to_gray(volume.cut(self.plane, index), window, volume.path) for volume, window in pairs]
        return PIL.Image.fromarray(channels[0] if len(channels) == 1 else np.stack(channels, -1))

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of a slice, uint8 of shape `(height, width)`."""
        values = self.labels.cut(self.plane, index)
        labels = values.astype(np.uint8)
        if (labels != values).any():
            raise ValueError(f"The mask {self.labels.path} has values that are no whole numbers from 0 to 255.")
        return labels
