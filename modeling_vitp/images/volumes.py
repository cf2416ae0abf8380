"""Volumes of voxels, NIfTI files and DICOM series, and their slices; no more is in memory than a slice."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
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
        """Of the slices in a plane."""
        return self.canonical_shape[PLANES[plane]]

    def size(self, plane: str) -> tuple[int, int]:
        """Height and width of a slice."""
        across, up = (length for axis, length in enumerate(self.canonical_shape) if axis != PLANES[plane])
        return up, across

    def spacing(self, plane: str) -> tuple[float, float, float]:
        """Millimeters from slice to slice, from row to row and from column to column."""
        unit = MILLIMETERS.get(self.header.get_xyzt_units()[0], 1.0)
        sizes = (unit * voxel_sizes(self.canonical_affine)).tolist()
        between = sizes.pop(PLANES[plane])
        across, up = sizes
        return between, up, across

    def cut(self, plane: str, index: int) -> np.ndarray:
        """A slice, float32 of shape `(height, width)`, in the volume's own units."""
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
        """Slices as [`cut`] gives them as a volume is stored, a view of them: `(number, height, width, …)` becomes
        `(i, j, k, …)`."""
        canonical = np.moveaxis(np.rot90(slices, -1, axes=(1, 2)), 0, PLANES[plane])
        return apply_orientation(canonical, ornt_transform(io_orientation(np.eye(4)), self.orientation))

    def window(self, percentiles: Sequence[float]) -> tuple[float, float]:
        """Percentiles of the values that are not 0; of at most 16 million, evenly spread, of larger volumes.

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
    """Whether a path is that of a NIfTI file or of a folder, as a DICOM series is."""
    return path.is_dir() or path.name.lower().endswith(NIFTI)


def files_of(path: Path) -> list[Path]:
    """The file, or of a series all that its folder has."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def open_volume(path: Path) -> Volume:
    """A NIfTI file, or a folder with the files of a DICOM series.

    What is compressed is unpacked into an unnamed temporary file, so that any slice is read without the others.

    Raises:
        ValueError: in one line that names the file, if it cannot be read, has not three axes, no spacing, colors, or
            values that are NaN or infinite; of a series see
            [`~modeling_vitp.images.dicom_series.read_series`], whose padding becomes the least value.
        FileNotFoundError: if there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    return open_series(path) if path.is_dir() else open_nifti(path)


def open_series(folder: Path) -> Volume:
    from .dicom_series import read_series

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
    """Whether a header has the size of a voxel; nibabel takes 1 for a size of 0."""
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
    """Raises a `ValueError` that names one that is of another shape or place than the first, or turned otherwise."""
    first = volumes[0]
    for other in volumes[1:]:
        if other.canonical_shape != first.canonical_shape:
            raise ValueError(
                f"{other.path} has shape {other.canonical_shape}, but {first.path} {first.canonical_shape}."
            )
        if not np.allclose(other.canonical_affine, first.canonical_affine, atol=1e-2):
            raise ValueError(f"{other.path} lies elsewhere than {first.path}: their affines differ.")


def to_grey(values: np.ndarray, window: tuple[float, float], path: Path) -> np.ndarray:
    """A slice in 8 bits, uint8: black below the window, white above."""
    low, high = window
    if not low < high:
        raise ValueError(f"{path}: the window from {low} to {high} is empty.")
    return (255 * np.clip((values - low) / (high - low), 0, 1)).round().astype(np.uint8)
