"""Readers of DICOM files (one frame, in units or in 8 bits) and of DICOM series of slices."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch

from ..input_spec import InputSpec
from .reading import is_dicom_file, read_errors

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
except ModuleNotFoundError as error:
    raise ImportError("DICOM needs pydicom: pip install 'modeling-vitp[medical]'.") from error

PERCENTILES = (2, 98)  # Percentiles of black and white for files without a window in their tags.
TOLERANCE = 0.05  # Largest deviation of a slice from its expected position, relative to the slice spacing.
SAME = 1e-4  # Tolerance for direction cosines and spacings, which files store with few digits.


@dataclass(frozen=True)
class Frame:
    """Pixels of a frame of a DICOM file.

    Args:
        values: gray values in the units of the rescale tags (Hounsfield units for CT), of shape `(height, width)`, NaN
            for padding; or stored colors, `(height, width, 3)`.
        input_spec: input spec with the values of black and white: the first linear window of the tags, the value range
            of colors, or else percentiles.
        is_inverted: whether low values are bright (MONOCHROME1).
        has_palette: whether the colors come from a palette.
    """

    values: np.ndarray
    input_spec: dict
    is_inverted: bool = False
    has_palette: bool = False


def open_dicom(file: BinaryIO | str | os.PathLike, name: str | Path, with_pixels: bool = True) -> pydicom.Dataset:
    """Return the tags of a file with an image.

    Args:
        file: path or open file.
        name: name of the file in errors.
        with_pixels: whether to read the stored pixels too.

    Raises:
        ValueError: if the file is damaged, or has no image.
    """
    with read_errors(name):
        dataset = pydicom.dcmread(file, stop_before_pixels=not with_pixels)
    if "Rows" not in dataset or "Columns" not in dataset or (with_pixels and "PixelData" not in dataset):
        raise ValueError(f"{name} is DICOM without an image (modality {dataset.get('Modality', 'unknown')}).")
    return dataset


def number_of_frames(dataset: pydicom.Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def read_frame(dataset: pydicom.Dataset, name: str | Path, index: int | None = None) -> Frame:
    """Read a frame of a file.

    Args:
        dataset: tags with pixels, see [`open_dicom`].
        name: name of the file in errors.
        index: index of the frame, from 0. Default: the middle frame.

    Raises:
        ValueError: if no decoder is installed for the transfer syntax of the file.
        Exception: if the file is damaged. The type depends on the decoder.
    """
    index = number_of_frames(dataset) // 2 if index is None else index
    try:
        pixels = pixel_array(dataset, index=index)
    except RuntimeError as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise ValueError(
            f"{name} is compressed as {syntax}, which no installed decoder supports. Install pylibjpeg, "
            "pylibjpeg-libjpeg and pylibjpeg-openjpeg, or save the file uncompressed (dcmdjpeg, gdcmconv --raw)."
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
        file: open file.
        name: name of the file in errors.
        spec: input spec of the image. With a window or percentiles, gray images are returned in units, float32 of shape
            `(height, width)`. MONOCHROME1 images, whose low values are bright, are then mirrored about the center of
            the window, or negated for percentiles. Otherwise the image is converted to 8 bits with the window of the
            tags.
        as_stored: whether to return units for any spec, without mirroring.

    Raises:
        ValueError: if the image is MONOCHROME1 and the windows of the spec have different centers.
        Exception: if the file has no image, is damaged, or cannot be decoded. The type depends on the decoder.
    """
    frame = read_frame(open_dicom(file, name), name)
    if frame.values.ndim == 2 and (as_stored or (spec is not None and spec.is_in_units)):
        values = frame.values.astype(np.float32)
        if as_stored or not frame.is_inverted:
            return values
        ends = {sum(window) for window in spec.windows or [(0, 0)]}
        if len(ends) > 1:
            raise ValueError(
                "a MONOCHROME1 image, whose low values are bright, needs windows with the same center, got "
                f"{spec.windows}. Use one window, or save the image as MONOCHROME2"
            )
        return np.float32(ends.pop()) - values
    bands = frame.values[None] if frame.values.ndim == 2 else frame.values.transpose(2, 0, 1)
    shown = InputSpec.from_dict(frame.input_spec)(torch.from_numpy(bands.astype(np.float64)))
    shown = shown.round().to(torch.uint8).movedim(0, -1).numpy()
    if frame.is_inverted:
        shown = np.where(np.isnan(frame.values)[..., None], 0, 255 - shown).astype(np.uint8)
    return PIL.Image.fromarray(shown if frame.values.ndim == 3 else shown[..., 0])


def tags_of_frame(dataset: pydicom.Dataset, index: int, name: str) -> pydicom.Dataset:
    """Return the data set that holds the tags of a frame.

    This is the sequence `name` of the functional groups of the frame or of all frames (DICOM PS3.3, C.7.6.16), or else
    the data set itself.
    """
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*own[index : index + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])):
        if group.get(name):
            return group[name][0]
    return dataset


def stated(dataset: pydicom.Dataset, name: str) -> Any:
    """Return the value of a tag, or `None` if the tag is missing or empty, as after anonymization."""
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
    """Return whether stored values are padding, as a mask, or `False` without padding."""
    value, limit = (stated(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return False
    low, high = sorted((value, value if limit is None else limit))
    return (pixels >= low) & (pixels <= high)


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the values of a series in the units of its tags, and its affine.

    Returns:
        Values, float32 of shape `(columns, rows, slices)`, NaN for padding, mapped from an unnamed file to save memory;
        and the affine from indices to millimeters (right, anterior, superior), float64 of shape `(4, 4)`. Slices are
        ordered along the normal of the image plane (DICOM PS3.3, C.7.6.2.1.1).

    Raises:
        ValueError: if the folder has no series or several; if slices are missing, duplicated, or differ in size,
            spacing or orientation; if the spacing is missing; or if a file has several frames or colors, is damaged, or
            cannot be decoded.
    """
    slices = read_headers(folder)
    check_alike(slices)
    slices, affine = in_order(slices)
    first = slices[0][1]
    values = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(len(slices), first.Rows, first.Columns))
    for index, (path, _) in enumerate(slices):
        with read_errors(path):
            values[index] = read_frame(open_dicom(path, path), path).values
    return values.transpose(2, 1, 0), affine


def read_headers(folder: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """Read the tags of all DICOM files with an image in a folder, without subfolders and with any file name."""
    headers = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not is_dicom_file(path):
            continue
        with read_errors(path):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        if "Rows" in dataset and "Columns" in dataset:
            headers.append((path, dataset))
    if not headers:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        below = next((path.parent for path in files if is_dicom_file(path)), None)
        hint = f" Found images in {below}. Use the folder of one series." if below else ""
        raise ValueError(f"No DICOM images found in {folder}.{hint}")
    return headers


def check_alike(headers: list[tuple[Path, pydicom.Dataset]]) -> None:
    """Raise a `ValueError` unless the files are gray slices of one series with the same size and spacing."""
    first_path, first = headers[0]
    for path, dataset in headers:
        if number_of_frames(dataset) > 1 or dataset.get("SamplesPerPixel", 1) != 1:
            kind = "frames" if number_of_frames(dataset) > 1 else "colors"
            raise ValueError(
                f"Expected one gray slice per file, {path} has several {kind}. Convert it to NIfTI, for example with "
                "dcm2niix."
            )
        for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            if not dataset.get(tag):
                raise ValueError(f"{path} has no {tag}, which is required for its spacing and position.")
            values = np.array(dataset[tag].value, dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"{tag} of {path} must be finite, got {values.tolist()}.")
        if min(dataset.PixelSpacing) <= 0:
            spacing = list(map(float, dataset.PixelSpacing))
            raise ValueError(f"PixelSpacing of {path} must be positive, got {spacing}.")
        axes = np.resize(np.array(dataset.ImageOrientationPatient, dtype=np.float64), (2, 3))
        if len(dataset.ImageOrientationPatient) != 6 or not np.allclose(axes @ axes.T, np.eye(2), atol=0.01):
            raise ValueError(
                f"ImageOrientationPatient of {path} must be perpendicular unit vectors, got {axes.tolist()}."
            )
        if dataset.get("SeriesInstanceUID") != first.get("SeriesInstanceUID"):
            raise ValueError(
                f"{path} and {first_path} belong to different series. Move each series to a separate folder."
            )
        if (dataset.Rows, dataset.Columns) != (first.Rows, first.Columns):
            raise ValueError(
                f"Expected slices of the same size, {path} has {dataset.Columns} x {dataset.Rows} pixels and "
                f"{first_path} has {first.Columns} x {first.Rows}."
            )
        for tag, what in (("ImageOrientationPatient", "orientation"), ("PixelSpacing", "spacing")):
            if not np.allclose(dataset[tag].value, first[tag].value, atol=SAME, rtol=0):
                found, expected = (", ".join(f"{float(n):.4g}" for n in tags[tag].value) for tags in (dataset, first))
                raise ValueError(
                    f"Expected slices with the same {what}, {path} has {found} and {first_path} has {expected}."
                )


def in_order(headers: list[tuple[Path, pydicom.Dataset]]) -> tuple[list[tuple[Path, pydicom.Dataset]], np.ndarray]:
    """Sort slices along their normal, and return them with the affine of `(column, row, slice)`.

    Raises:
        ValueError: if slices are missing, duplicated, or not on one line with the others.
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
            raise ValueError(f"{path} is a single slice without SliceThickness, which is required for its spacing.")
        step = thickness * normal
    else:
        gaps = np.diff(positions @ normal)
        usual = np.median(gaps)
        for (before, _), (after, _), gap in zip(headers, headers[1:], gaps):
            if gap <= TOLERANCE * usual or gap <= SAME:
                raise ValueError(f"Expected one file per slice, {before} and {after} have the same position.")
            if abs(gap - usual) > TOLERANCE * usual:
                raise ValueError(
                    f"Slices are missing: {before} and {after} are {gap:.2f} mm apart, most neighbors are "
                    f"{usual:.2f} mm apart."
                )
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
        offsets = np.linalg.norm(positions - positions[0] - np.arange(len(headers))[:, None] * step, axis=1)
        worst = int(offsets.argmax())
        if offsets[worst] > TOLERANCE * np.linalg.norm(step):
            raise ValueError(
                f"Expected slices on one line, {headers[worst][0]} is {offsets[worst]:.2f} mm off the line."
            )
    between_rows, between_columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([between_columns * along_row, between_rows * along_column, step, positions[0]], axis=1)
    # DICOM axes point left and posterior, NIfTI axes point right and anterior.
    return headers, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
