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
        lengths = list(self.canonical_shape)
        lengths.pop(PLANES[plane])
        across, up = lengths
        return up, across

    def spacing(self, plane: str) -> tuple[float, float, float]:
        """Return the spacing in millimeters between slices, rows and columns."""
        unit_name, _ = self.header.get_xyzt_units()
        unit = MILLIMETERS.get(unit_name, 1.0)
        sizes_in_millimeters = unit * voxel_sizes(self.canonical_affine)
        sizes = sizes_in_millimeters.tolist()
        between = sizes.pop(PLANES[plane])
        across, up = sizes
        return between, up, across

    def cut(self, plane: str, index: int) -> np.ndarray:
        """Return a slice in the units of the volume, float32 of shape `(height, width)`."""
        axis = PLANES[plane]
        canonical = apply_orientation(self.stored, self.orientation)
        slices = np.moveaxis(canonical, axis, 0)
        turned = np.rot90(slices[index])
        mirrored = np.ascontiguousarray(turned[:, ::-1])
        return self.scaled(mirrored)

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        slope, intercept = self.scale
        if slope == 1 and intercept == 0:
            return stored.astype(np.float32)
        values = stored.astype(np.float64) * slope + intercept
        return values.astype(np.float32)

    def uncut(self, slices: np.ndarray, plane: str) -> np.ndarray:
        """Return slices of [`cut`], `(number, height, width, …)`, in the axes of the stored volume, `(i, j, k, …)`.

        The result is a view.
        """
        axis = PLANES[plane]
        mirrored = slices[:, :, ::-1]
        turned = np.rot90(mirrored, -1, axes=(1, 2))
        canonical = np.moveaxis(turned, 0, axis)
        identity = np.eye(4)
        canonical_orientation = io_orientation(identity)
        to_stored = ornt_transform(canonical_orientation, self.orientation)
        return apply_orientation(canonical, to_stored)

    def window(self, percentiles: Sequence[float]) -> tuple[float, float]:
        """Return percentiles of the non-zero values.

        At most 16 million evenly spaced values of a large volume are used.

        Raises:
            ValueError: if all values are 0, or the percentiles are equal.
        """
        every = math.ceil(self.stored.size / MAX_SAMPLED)
        sampled_values = self.stored.ravel(order="K")[::every]
        values = self.scaled(sampled_values)
        is_counted = np.isfinite(values) & (values != 0)
        counted_values = values[is_counted]
        low = 0.0
        high = 0.0
        if len(counted_values) > 0:
            low, high = np.percentile(counted_values, percentiles)
        if not low < high:
            raise ValueError(
                f"Expected several non-zero values, of which two percentiles become black and white, {self.path} has "
                f"the percentiles {low} and {high}."
            )
        return float(low), float(high)


def is_volume(path: Path) -> bool:
    """Return whether a path is a NIfTI file, or a folder, as for a DICOM series."""
    return path.is_dir() or path.name.lower().endswith(NIFTI)


def files_of(path: Path) -> list[Path]:
    """Return all files of a volume: the NIfTI file, or the files in the folder of a series."""
    if not path.is_dir():
        return [path]
    files = []
    for file in sorted(path.iterdir()):
        if file.is_file():
            files.append(file)
    return files


def open_volume(path: Path) -> Volume:
    """Open a NIfTI file, or a folder with the files of a DICOM series.

    A compressed file is unpacked to an unnamed temporary file, so that single slices can be read. Padding of a DICOM
    series becomes the smallest value.

    Raises:
        ValueError: if a NIfTI file cannot be read, does not have three axes, has no spacing, or has colors, NaN or
            infinite values. For a series, see [`~modeling_vitp.images.dicom.read_series`].
    """
    if path.is_dir():
        return open_series(path)
    return open_nifti(path)


def open_series(folder: Path) -> Volume:
    from .dicom import read_series  # pydicom is optional.

    values, affine = read_series(folder)
    lowest_values = []
    for values_of_slice in values.T:
        if np.isfinite(values_of_slice).any():
            lowest_of_slice = np.nanmin(values_of_slice)
            lowest_values.append(float(lowest_of_slice))
    lowest = min(lowest_values, default=0.0)
    for values_of_slice in values.T:
        values_of_slice[np.isnan(values_of_slice)] = lowest
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
        has_voxels = len(proxy.shape) == 3 and 0 not in proxy.shape
        has_numbers = proxy.dtype.kind in "buif"
        if not has_voxels or not has_numbers:
            raise ValueError(
                "expected a volume with three axes, each of at least one voxel, and one number per voxel, got the "
                f"shape {proxy.shape} with values of type {proxy.dtype}. Save several volumes separately, for example "
                "with nibabel.four_to_three"
            )
        file_name = image.file_map["image"].filename
        stored = map_file(Path(file_name), proxy)
    header = image.header
    if not isinstance(header, nibabel.Nifti1Header):
        header = nibabel.Nifti1Header.from_header(header)
    if not has_spacing(image) or not has_known_unit(header):
        raise ValueError(
            f"{path} has no spacing: its header has neither an affine nor a voxel size (pixdim), or has the unknown "
            f"unit {header['xyzt_units']} in xyzt_units."
        )
    if stored.dtype.kind == "f":
        num_invalid = 0
        for stored_slice in stored.T:  # Slices of a mapped file take little memory.
            is_invalid = ~np.isfinite(stored_slice)
            num_invalid += int(is_invalid.sum())
        if num_invalid > 0:
            raise ValueError(f"{path} has {num_invalid} values that are NaN or infinite. Repair or remove the file.")
    scale = (float(proxy.slope), float(proxy.inter))
    return Volume(path, stored, image.affine, header, scale)


def has_spacing(image: nibabel.spatialimages.SpatialImage) -> bool:
    """Return whether a header has a voxel size, from the stored header, because nibabel replaces a size of 0 by 1."""
    if isinstance(image, nibabel.Nifti1Image):
        header_class = type(image.header)
        with ImageOpener(image.file_map["image"].filename) as file:
            stored_header = header_class.from_fileobj(file, check=False)
        sizes = stored_header["pixdim"][1:4]
        has_sizes = (sizes > 0).all()
        has_affine = bool(stored_header["sform_code"])
        if not has_sizes and not has_affine:
            return False
    if not np.isfinite(image.affine).all():
        return False
    axes = image.affine[:3, :3]
    volume_of_voxel = abs(np.linalg.det(axes))
    return bool(volume_of_voxel > 1e-12)


def has_known_unit(header: nibabel.Nifti1Header) -> bool:
    try:
        header.get_xyzt_units()
    except KeyError:
        return False
    return True


def map_file(path: Path, proxy: nibabel.arrayproxy.ArrayProxy) -> np.memmap:
    file = path
    if path.suffix.lower() in ImageOpener.compress_ext_map:
        file = tempfile.TemporaryFile()
        with ImageOpener(path) as packed:
            shutil.copyfileobj(packed, file)
    return np.memmap(
        file,
        dtype=proxy.dtype,
        mode="r",
        offset=proxy.offset,
        shape=proxy.shape,
        order="F",
    )


def check_same_place(volumes: Sequence[Volume]) -> None:
    """Raise a `ValueError` if a volume differs in shape, position or orientation from the first."""
    first = volumes[0]
    for volume in volumes[1:]:
        has_same_shape = volume.canonical_shape == first.canonical_shape
        has_same_affine = np.allclose(volume.canonical_affine, first.canonical_affine, atol=1e-2)
        if not has_same_shape or not has_same_affine:
            raise ValueError(
                f"Expected volumes of the same shape at the same position, {volume.path} has "
                f"{volume.canonical_shape} with the affine {volume.canonical_affine.tolist()} and {first.path} has "
                f"{first.canonical_shape} with the affine {first.canonical_affine.tolist()}."
            )


def to_gray(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Convert a slice to uint8: values below the window become black, values above become white."""
    low, high = window
    shares = (values - low) / (high - low)
    levels = 255 * np.clip(shares, 0, 1)
    return levels.round().astype(np.uint8)


def check_cut(plane: str, window: Sequence[float] | None, percentiles: Sequence[float] | None) -> None:
    """Raise a `ValueError` if `plane`, `window` or `percentiles` are invalid."""
    is_one_set = (window is None) != (percentiles is None)
    pair = percentiles if window is None else window
    if plane not in PLANES or not is_one_set or not is_increasing_pair(pair):
        planes = ", ".join(sorted(PLANES))
        raise ValueError(
            f"Expected for volumes a `plane` of {planes}, and either `window` or `percentiles`, as "
            f"two increasing numbers that become black and white, got plane={plane!r}, window={window} and "
            f"percentiles={percentiles}."
        )


def is_increasing_pair(numbers: Sequence[float]) -> bool:
    if len(numbers) != 2:
        return False
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return False
    return numbers[0] < numbers[1]


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
        volumes_and_labels = list(self.volumes)
        if self.labels is not None:
            volumes_and_labels.append(self.labels)
        check_same_place(volumes_and_labels)
        self.windows = []
        for volume in self.volumes:
            window_of_volume = tuple(window) if window else volume.window(percentiles)
            self.windows.append(window_of_volume)

    def __len__(self) -> int:
        return self.volumes[0].number(self.plane)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a slice."""
        return self.volumes[0].size(self.plane)

    def image(self, index: int) -> PIL.Image.Image:
        channels = []
        for volume, window in zip(self.volumes, self.windows):
            values = volume.cut(self.plane, index)
            channels.append(to_gray(values, window))
        pixels = channels[0]
        if len(channels) > 1:
            pixels = np.stack(channels, axis=-1)
        return PIL.Image.fromarray(pixels)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of a slice, uint8 or, for other values than 0 to 255, int32 of shape `(height, width)`."""
        slice_of_labels = self.labels.cut(self.plane, index)
        labels = whole_numbers(slice_of_labels, self.labels.path)
        fits_uint8 = 0 <= labels.min() and labels.max() < 256
        if fits_uint8:
            return labels.astype(np.uint8)
        return labels.astype(np.int32)
