"""Volumes from NIfTI files or DICOM series, and their slices as 8-bit images. One slice is in memory at a time."""

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

from .reading import read_errors, whole_numbers

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
NIFTI = (".nii", ".nii.gz")
MILLIMETERS = {"micron": 1e-3, "meter": 1e3}  # Length of other units that a NIfTI header may have.
MAX_SAMPLED = 1 << 24  # Largest number of values from which percentiles are computed.


@dataclass(frozen=True)
class Volume:
    """Volume with its stored values and its position.

    Slices show a patient from the feet, from the front or from the left. For this, the volume is reoriented to the
    closest canonical axes (right, anterior, superior). Of the two axes of a slice, the last one points up and the first
    one to the left, as in DICOM: the first column is the right of the patient, or anterior in a sagittal slice. Values
    are not resampled.

    Args:
        path: path of the NIfTI file, or of the folder of the DICOM series.
        stored: stored values of shape `(i, j, k)`, mapped from a file.
        affine: affine from indices to right, anterior and superior, float64 of shape `(4, 4)`, in millimeters unless
            the header has other units.
        header: header of the file, or a new header for a series.
        scale: slope and intercept that convert stored values to units.
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
        """Return height and width of a slice."""
        across, up = (length for axis, length in enumerate(self.canonical_shape) if axis != PLANES[plane])
        return up, across

    def spacing(self, plane: str) -> tuple[float, float, float]:
        """Return the spacing in millimeters between slices, rows and columns."""
        unit = MILLIMETERS.get(self.header.get_xyzt_units()[0], 1.0)
        sizes = (unit * voxel_sizes(self.canonical_affine)).tolist()
        between = sizes.pop(PLANES[plane])
        across, up = sizes
        return between, up, across

    def cut(self, plane: str, index: int) -> np.ndarray:
        """Return a slice in the units of the volume, float32 of shape `(height, width)`."""
        canonical = apply_orientation(self.stored, self.orientation)
        indices = [slice(None)] * 3
        indices[PLANES[plane]] = index
        return self.scaled(np.ascontiguousarray(np.rot90(canonical[tuple(indices)])[:, ::-1]))

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        slope, intercept = self.scale
        if (slope, intercept) == (1, 0):
            return stored.astype(np.float32)
        return (stored.astype(np.float64) * slope + intercept).astype(np.float32)

    def uncut(self, slices: np.ndarray, plane: str) -> np.ndarray:
        """Return slices of [`cut`], `(number, height, width, …)`, in the axes of the stored volume, `(i, j, k, …)`.

        The result is a view.
        """
        canonical = np.moveaxis(np.rot90(slices[:, :, ::-1], -1, axes=(1, 2)), 0, PLANES[plane])
        return apply_orientation(canonical, ornt_transform(io_orientation(np.eye(4)), self.orientation))

    def window(self, percentiles: Sequence[float]) -> tuple[float, float]:
        """Return percentiles of the non-zero values.

        At most 16 million evenly spaced values of a large volume are used.

        Raises:
            ValueError: if all values are 0.
        """
        every = math.ceil(self.stored.size / MAX_SAMPLED)
        values = self.scaled(self.stored.ravel(order="K")[::every])
        values = values[np.isfinite(values) & (values != 0)]
        if not values.size:
            raise ValueError(f"Expected non-zero values for percentiles, {self.path} is 0 everywhere.")
        low, high = np.percentile(values, percentiles)
        return float(low), float(high)


def is_volume(path: Path) -> bool:
    """Return whether a path is a NIfTI file, or a folder, as for a DICOM series."""
    return path.is_dir() or path.name.lower().endswith(NIFTI)


def files_of(path: Path) -> list[Path]:
    """Return all files of a volume: the NIfTI file, or the files in the folder of a series."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def open_volume(path: Path) -> Volume:
    """Open a NIfTI file, or a folder with the files of a DICOM series.

    A compressed file is unpacked to an unnamed temporary file, so that single slices can be read. Padding of a DICOM
    series becomes the smallest value.

    Raises:
        ValueError: if a NIfTI file cannot be read, does not have three axes, has no spacing, or has colors, NaN or
            infinite values. For a series, see [`~modeling_vitp.images.dicom.read_series`].
        FileNotFoundError: if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"Volume not found: {path}.")
    return open_series(path) if path.is_dir() else open_nifti(path)


def open_series(folder: Path) -> Volume:
    from .dicom import read_series  # pydicom is optional.

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
    with read_errors(path):
        image = nibabel.load(path)
        proxy = image.dataobj
        if len(proxy.shape) == 3 and 0 not in proxy.shape:
            stored = map_file(Path(image.file_map["image"].filename), proxy)
    if len(proxy.shape) != 3:
        raise ValueError(
            f"Expected a volume with three axes, {path} has {len(proxy.shape)}. Save its volumes separately, for "
            "example with nibabel.four_to_three."
        )
    if 0 in proxy.shape:
        raise ValueError(f"{path} is empty: its shape is {proxy.shape}.")
    if stored.dtype.kind not in "buif":
        raise ValueError(f"Expected one number per voxel, {path} has values of type {stored.dtype}.")
    if not has_spacing(image):
        raise ValueError(f"{path} has no spacing: the header has neither an affine nor a voxel size (pixdim).")
    if stored.dtype.kind == "f":
        wrong = sum(int((~np.isfinite(part)).sum()) for part in stored.T)
        if wrong:
            raise ValueError(f"{path} has {wrong} values that are NaN or infinite. Repair or remove the file.")
    header = image.header
    if not isinstance(header, nibabel.Nifti1Header):
        header = nibabel.Nifti1Header.from_header(header)
    try:
        header.get_xyzt_units()
    except KeyError as error:
        raise ValueError(f"{path} has the unknown unit {int(header['xyzt_units'])} in xyzt_units.") from error
    return Volume(path, stored, image.affine, header, (float(proxy.slope), float(proxy.inter)))


def has_spacing(image: nibabel.spatialimages.SpatialImage) -> bool:
    """Return whether a header has a voxel size, from the stored header, because nibabel replaces a size of 0 by 1."""
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
    """Raise a `ValueError` if a volume differs in shape, position or orientation from the first."""
    first = volumes[0]
    for other in volumes[1:]:
        if other.canonical_shape != first.canonical_shape:
            raise ValueError(
                f"Expected volumes of the same shape, {other.path} has {other.canonical_shape} and {first.path} has "
                f"{first.canonical_shape}."
            )
        if not np.allclose(other.canonical_affine, first.canonical_affine, atol=1e-2):
            raise ValueError(
                f"Expected volumes at the same position, the affines of {other.path} and {first.path} differ."
            )


def to_gray(values: np.ndarray, window: tuple[float, float], path: Path) -> np.ndarray:
    """Convert a slice to uint8: values below the window become black, values above become white."""
    low, high = window
    if not low < high:
        raise ValueError(f"{path}: the low value of the window must be below the high value, got {low} and {high}.")
    return (255 * np.clip((values - low) / (high - low), 0, 1)).round().astype(np.uint8)


def check_cut(plane: str, window: Sequence[float] | None, percentiles: Sequence[float] | None) -> None:
    """Raise a `ValueError` if `plane`, `window` or `percentiles` are invalid."""
    if plane not in PLANES:
        raise ValueError(f"`plane` must be one of {', '.join(sorted(PLANES))}, got {plane!r}.")
    if (window is None) == (percentiles is None):
        raise ValueError(
            "Expected either `window` or `percentiles` for volumes, which set the values of black and white."
        )
    name, pair = ("percentiles", percentiles) if window is None else ("window", window)
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
    if len(pair) != 2 or not are_numbers or not pair[0] < pair[1]:
        raise ValueError(f"`{name}` must be two increasing numbers, for black and for white, got {list(pair)}.")


class VolumeSlices:
    """Slices of a volume, or of three volumes as channels, as 8-bit images with optional masks.

    Args:
        paths: paths of one volume, or of three volumes.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value in the units of the volumes, mapped to black and white.
        percentiles: low and high percentile in [0, 100] of the non-zero values of each volume, instead of `window`.
        mask: path of the volume of the mask, or `None`.

    Raises:
        ValueError: if a volume cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), or differs in shape
            or position from the first.
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
            raise ValueError(f"Expected one volume, or three volumes as channels, got {len(paths)}.")
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
        """Return the mask of a slice, uint8 or, for other values than 0 to 255, int32 of shape `(height, width)`."""
        values = whole_numbers(self.labels.cut(self.plane, index), self.labels.path)
        return values.astype(np.uint8 if 0 <= values.min() <= values.max() < 256 else np.int32)
