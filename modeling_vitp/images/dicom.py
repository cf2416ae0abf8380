"""DICOM files to pixels: one frame, in the units of its tags or in 8 bits as viewers show it; and series of slices."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch

from ..input_spec import InputSpec
from .reading import is_dicom_file

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
except ModuleNotFoundError as error:
    raise ImportError("DICOM needs pydicom: pip install 'modeling-vitp[medical]'.") from error

PERCENTILES = (2, 98)  # become black and white where the tags do not say what does
TOLERANCE = 0.05  # of the distance of slices, by which a slice may lie beside its place
SAME = 1e-4  # of direction cosines and spacings, which files have with few digits


@dataclass(frozen=True)
class Frame:
    """The pixels of a DICOM file.

    Args:
        values: gray in the units of the rescale tags (Hounsfield units of CT), of shape `(height, width)`, NaN where
            there is padding; or colors as they are stored, `(height, width, 3)`.
        input_spec: which values become black and white: the first linear window of the tags, the range of the bits of
            colors, or else percentiles.
        is_inverted: whether low values are bright (MONOCHROME1).
        has_palette: whether colors are those of a palette.
    """

    values: np.ndarray
    input_spec: dict
    is_inverted: bool = False
    has_palette: bool = False


def open_dicom(file: BinaryIO | str | os.PathLike, name: str | Path, with_pixels: bool = True) -> pydicom.Dataset:
    """Return the tags of a file that has an image.

    Args:
        name: the name of the file, for errors.
        with_pixels: whether the stored pixels are read, too.

    Raises:
        ValueError: if it is damaged, or has no image.
    """
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=not with_pixels)
    except Exception as error:  # of many kinds, for a broken file
        raise ValueError(f"{name} cannot be read: {error}") from error
    if "Rows" not in dataset or "Columns" not in dataset or (with_pixels and "PixelData" not in dataset):
        raise ValueError(f"{name} is DICOM without an image (modality {dataset.get('Modality', 'unknown')}).")
    return dataset


def number_of_frames(dataset: pydicom.Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def read_frame(dataset: pydicom.Dataset, name: str | Path, index: int | None = None) -> Frame:
    """Read a frame of a file.

    Args:
        index: from 0; the middle one if not given.

    Raises:
        ValueError: names the file and the transfer syntax if there is no decoder for it.
        Exception: of many kinds, if it is damaged.
    """
    index = number_of_frames(dataset) // 2 if index is None else index
    try:
        pixels = pixel_array(dataset, index=index)
    except RuntimeError as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise ValueError(
            f"{name} is compressed as {syntax}, which cannot be decoded here: install pylibjpeg, pylibjpeg-libjpeg and "
            "pylibjpeg-openjpeg, or save it uncompressed (dcmdjpeg, gdcmconv --raw)."
        ) from error
    photometric = dataset.PhotometricInterpretation
    if photometric.startswith("MONOCHROME"):
        rescaled = apply_modality_lut(pixels, tags_of_frame(dataset, index, "PixelValueTransformationSequence"))
        values = np.ma.masked_where(padding(dataset, pixels), rescaled)
        if np.ma.is_masked(values):
            values = values.astype(np.result_type(values.dtype, np.float32)).filled(np.nan)
        spec = tagged_window(tags_of_frame(dataset, index, "FrameVOILUTSequence")) or {"percentiles": PERCENTILES}
        return Frame(np.ma.getdata(values), spec, is_inverted=photometric == "MONOCHROME1")
    has_palette = photometric == "PALETTE COLOR"
    if has_palette:
        pixels = apply_color_lut(pixels, dataset)
    bits = 8 * pixels.dtype.itemsize if has_palette else dataset.BitsStored
    return Frame(pixels, {"window": (0, 2**bits - 1)}, has_palette=has_palette)


def to_picture(
    file: BinaryIO, name: str | Path, spec: InputSpec | None = None, as_stored: bool = False
) -> PIL.Image.Image | np.ndarray:
    """Return the middle frame as an image.

    Args:
        spec: how the image will be read. For one with a window or percentiles, gray images are returned in the units of
            their tags, float32 of shape `(height, width)`; MONOCHROME1, whose low values are bright, is mirrored in the
            middle of the window, or negative for percentiles. Otherwise it is of 8 bits, windowed as the tags say.
        as_stored: whether it is wanted in units whatever the spec, and not mirrored.

    Raises:
        Exception: of many kinds, if it has no image, is damaged, or cannot be decoded; a `ValueError` if it is
            MONOCHROME1 and there are windows with several middles.
    """
    frame = read_frame(open_dicom(file, name), name)
    if frame.values.ndim == 2 and (as_stored or (spec is not None and spec.is_in_units)):
        values = frame.values.astype(np.float32)
        if as_stored or not frame.is_inverted:
            return values
        ends = {sum(window) for window in spec.windows or [(0, 0)]}
        if len(ends) > 1:
            raise ValueError(
                "low values are bright in it (MONOCHROME1), which can be mirrored in the middle of one window, and "
                f"{spec.windows} have several: give one window, or save it as MONOCHROME2"
            )
        return np.float32(ends.pop()) - values
    bands = frame.values[None] if frame.values.ndim == 2 else frame.values.transpose(2, 0, 1)
    shown = InputSpec.from_dict(frame.input_spec)(torch.from_numpy(bands.astype(np.float64)))
    shown = shown.round().to(torch.uint8).movedim(0, -1).numpy()
    if frame.is_inverted:
        shown = np.where(np.isnan(frame.values)[..., None], 0, 255 - shown).astype(np.uint8)
    return PIL.Image.fromarray(shown if frame.values.ndim == 3 else shown[..., 0])


def tags_of_frame(dataset: pydicom.Dataset, index: int, name: str) -> pydicom.Dataset:
    """Return where the tags of a frame are: in the sequence of that name of its functional groups, or of those of all
    frames (DICOM PS3.3, C.7.6.16), or in the data set itself.
    """
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*own[index : index + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])):
        if group.get(name):
            return group[name][0]
    return dataset


def stated(dataset: pydicom.Dataset, name: str) -> Any:
    """Return the value of a tag; `None` if it is missing or empty, as anonymization leaves many."""
    value = dataset.get(name)
    return None if value is None or (hasattr(value, "__len__") and not len(value)) else value


def tagged_window(dataset: pydicom.Dataset) -> dict | None:
    """Return the first linear window of the tags (DICOM PS3.3, C.11.2.1.2), in units after rescaling."""
    found = [stated(dataset, name) for name in ("WindowCenter", "WindowWidth")]
    if None in found:
        return None
    center, width = (float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value) for value in found)
    function = stated(dataset, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if function not in ("LINEAR", "LINEAR_EXACT") or width <= 0:
        return None
    return {"window": (center - width / 2, center + width / 2)}


def padding(dataset: pydicom.Dataset, pixels: np.ndarray) -> np.ndarray | bool:
    """Return where the stored values are padding."""
    value, limit = (stated(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return False
    low, high = sorted((value, value if limit is None else limit))
    return (pixels >= low) & (pixels <= high)


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the values of a series in the units of its tags, and where they are.

    Returns:
        Float32 of shape `(columns, rows, slices)`, NaN where there is padding, mapped from an unnamed file, so that it
        takes no memory; and the affine from its indices to millimeters to the right, to the front and up, float64 of
        shape `(4, 4)`. Slices go along the normal of the image plane (DICOM PS3.3, C.7.6.2.1.1).

    Raises:
        ValueError: in one line that names the file, if there is no series, or more than one; slices are missing, are
            there twice, or differ in size, spacing or orientation; there is no spacing; a file has several frames or
            colors, is damaged, or is compressed without a decoder for it.
    """
    slices = read_headers(folder)
    check_alike(slices)
    slices, affine = in_order(slices)
    first = slices[0][1]
    values = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(len(slices), first.Rows, first.Columns))
    for index, (path, _) in enumerate(slices):
        try:
            values[index] = read_frame(open_dicom(path, path), path).values
        except Exception as error:  # of many kinds, for a broken file
            is_named = isinstance(error, ValueError) and str(path) in str(error)
            raise error if is_named else ValueError(f"{path} cannot be read: {error}") from error
    return values.transpose(2, 1, 0), affine


def read_headers(folder: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """Read the tags of the files in a folder itself that have an image, whatever their names."""
    headers = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not is_dicom_file(path):
            continue
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        except Exception as error:  # of many kinds, for a broken file
            raise ValueError(f"{path} cannot be read: {error}") from error
        if "Rows" in dataset and "Columns" in dataset:
            headers.append((path, dataset))
    if not headers:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        below = next((path.parent for path in files if is_dicom_file(path)), None)
        found = f"; {below} has: give the folder of one series" if below else ""
        raise ValueError(f"{folder} has no DICOM image in it{found}.")
    return headers


def check_alike(headers: list[tuple[Path, pydicom.Dataset]]) -> None:
    """Raise a `ValueError` that names the file if files are no gray slices of one series, alike in size and spacing."""
    first_path, first = headers[0]
    for path, dataset in headers:
        if number_of_frames(dataset) > 1 or dataset.get("SamplesPerPixel", 1) != 1:
            kind = "frames" if number_of_frames(dataset) > 1 else "colors"
            raise ValueError(f"{path} has several {kind}, not one grey slice: convert it to NIfTI, with dcm2niix say.")
        for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            if not dataset.get(tag):
                raise ValueError(f"{path} has no {tag}, so its spacing and place are not known.")
        if min(dataset.PixelSpacing) <= 0:
            raise ValueError(f"{path} has no spacing: PixelSpacing is {list(map(float, dataset.PixelSpacing))}.")
        if dataset.get("SeriesInstanceUID") != first.get("SeriesInstanceUID"):
            raise ValueError(
                f"{path} is of another series than {first_path}: put each series into a folder of its own."
            )
        if (dataset.Rows, dataset.Columns) != (first.Rows, first.Columns):
            raise ValueError(
                f"{path} is {dataset.Columns} x {dataset.Rows} pixels, but {first_path} {first.Columns} x {first.Rows}."
            )
        for tag, what in (("ImageOrientationPatient", "orientation"), ("PixelSpacing", "spacing")):
            if not np.allclose(dataset[tag].value, first[tag].value, atol=SAME, rtol=0):
                found, expected = (", ".join(f"{float(n):.4g}" for n in one[tag].value) for one in (dataset, first))
                raise ValueError(
                    f"{path} has another {what} than {first_path}, {found} and {expected}: they are no slices of one "
                    "volume."
                )


def in_order(headers: list[tuple[Path, pydicom.Dataset]]) -> tuple[list[tuple[Path, pydicom.Dataset]], np.ndarray]:
    """Sort slices along their normal, and return them with the affine of `(column, row, slice)`.

    Raises:
        ValueError: if slices are missing, there twice, or beside the line of the others.
    """
    first = headers[0][1]
    along_row, along_column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    headers = sorted(headers, key=lambda header: normal @ np.array(header[1].ImagePositionPatient, dtype=np.float64))
    positions = np.array([dataset.ImagePositionPatient for _, dataset in headers], dtype=np.float64)
    if len(headers) == 1:
        path, dataset = headers[0]
        thickness = float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 0)
        if thickness <= 0:
            raise ValueError(f"{path} is one slice without SliceThickness, so its spacing is not known.")
        step = thickness * normal
    else:
        gaps = np.diff(positions @ normal)
        usual = np.median(gaps)
        for (before, _), (after, _), gap in zip(headers, headers[1:], gaps):
            if gap <= TOLERANCE * usual or gap <= SAME:
                raise ValueError(f"{before} and {after} are at the same place: a series has one file for each slice.")
            if abs(gap - usual) > TOLERANCE * usual:
                raise ValueError(
                    f"{before} and {after} are {gap:.2f} mm apart, but most neighbors {usual:.2f} mm: slices are "
                    "missing."
                )
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
        beside = np.linalg.norm(positions - positions[0] - np.arange(len(headers))[:, None] * step, axis=1)
        worst = int(beside.argmax())
        if beside[worst] > TOLERANCE * np.linalg.norm(step):
            raise ValueError(f"{headers[worst][0]} lies {beside[worst]:.2f} mm beside the line of the other slices.")
    between_rows, between_columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([between_columns * along_row, between_rows * along_column, step, positions[0]], axis=1)
    # DICOM's axes go to the left and to the back, NIfTI's to the right and to the front.
    return headers, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
