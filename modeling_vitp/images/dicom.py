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
Header = tuple[Path, pydicom.Dataset]  # Path of a file, and its tags without pixels.
GEOMETRY = {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2}  # Tags and their lengths.
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
    has_size = "Rows" in dataset and "Columns" in dataset
    lacks_pixels = with_pixels and "PixelData" not in dataset
    if not has_size or lacks_pixels:
        modality = dataset.get("Modality", "unknown")
        raise ValueError(f"{name} is DICOM without an image (modality {modality}).")
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
    if index is None:
        index = number_of_frames(dataset) // 2
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
        return gray_frame(dataset, pixels, index)
    has_palette = photometric == "PALETTE COLOR"
    bits = dataset.BitsStored
    if has_palette:
        pixels = apply_color_lut(pixels, dataset)
        bits = 8 * pixels.dtype.itemsize
    input_spec = {"window": (0, 2**bits - 1)}
    return Frame(pixels, input_spec, has_palette=has_palette)


def gray_frame(dataset: pydicom.Dataset, pixels: np.ndarray, index: int) -> Frame:
    """Return a gray frame in units, from its stored values and its index."""
    rescale_tags = tags_of_frame(dataset, index, "PixelValueTransformationSequence")
    values = apply_modality_lut(pixels, rescale_tags)
    is_padding = padding(dataset, pixels)
    if np.any(is_padding):
        float_type = np.result_type(values.dtype, np.float32)
        values = values.astype(float_type)
        values[is_padding] = np.nan
    window_tags = tags_of_frame(dataset, index, "FrameVOILUTSequence")
    input_spec = tagged_window(window_tags)
    if input_spec is None:
        input_spec = {"percentiles": PERCENTILES}
    is_inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return Frame(values, input_spec, is_inverted=is_inverted)


def to_picture(
    file: BinaryIO,
    name: str | Path,
    spec: InputSpec | None = None,
    as_stored: bool = False,
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
    dataset = open_dicom(file, name)
    frame = read_frame(dataset, name)
    is_gray = frame.values.ndim == 2
    in_units = as_stored or (spec is not None and spec.is_in_units)
    if not is_gray or not in_units:
        return in_8_bits(frame)
    values = frame.values.astype(np.float32)
    if as_stored or not frame.is_inverted:
        return values
    windows = spec.windows or [(0, 0)]
    mirrored_zeros = {low + high for low, high in windows}
    if len(mirrored_zeros) > 1:
        raise ValueError(
            "a MONOCHROME1 image, whose low values are bright, needs windows with the same center, got "
            f"{spec.windows}. Use one window, or save the image as MONOCHROME2"
        )
    (mirrored_zero,) = mirrored_zeros
    return np.float32(mirrored_zero) - values


def in_8_bits(frame: Frame) -> PIL.Image.Image:
    """Return a frame from black to white, in gray or RGB. Padding is black."""
    is_gray = frame.values.ndim == 2
    if is_gray:
        bands = frame.values[None]
    else:
        bands = frame.values.transpose(2, 0, 1)
    to_colors = InputSpec.from_dict(frame.input_spec)
    values = torch.from_numpy(bands.astype(np.float64))
    colors = to_colors(values)
    rounded_colors = colors.round().to(torch.uint8)
    pixels = rounded_colors.movedim(0, -1).numpy()
    if frame.is_inverted:
        is_padding = np.isnan(frame.values)[..., None]
        inverted_pixels = np.where(is_padding, 0, 255 - pixels)
        pixels = inverted_pixels.astype(np.uint8)
    if is_gray:
        pixels = pixels[..., 0]
    return PIL.Image.fromarray(pixels)


def tags_of_frame(dataset: pydicom.Dataset, index: int, name: str) -> pydicom.Dataset:
    """Return the data set that holds the tags of a frame.

    This is the sequence `name` of the functional groups of the frame or of all frames (DICOM PS3.3, C.7.6.16), or else
    the data set itself.
    """
    groups_of_frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared_groups = dataset.get("SharedFunctionalGroupsSequence") or []
    groups_of_frame = list(groups_of_frames[index : index + 1])
    groups_of_frame += shared_groups
    for group in groups_of_frame:
        if group.get(name):
            return group[name][0]
    return dataset


def stated(dataset: pydicom.Dataset, name: str) -> Any:
    """Return the value of a tag, or `None` if the tag is missing or empty, as after anonymization."""
    value = dataset.get(name)
    is_empty = hasattr(value, "__len__") and len(value) == 0
    return None if is_empty else value


def first_number(value: Any) -> float:
    """Return the value of a tag, or the first of its values."""
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0]
    return float(value)


def tagged_window(dataset: pydicom.Dataset) -> dict | None:
    """Return the first linear window of the tags (DICOM PS3.3, C.11.2.1.2), in units after rescaling."""
    center = stated(dataset, "WindowCenter")
    width = stated(dataset, "WindowWidth")
    if center is None or width is None:
        return None
    center = first_number(center)
    width = first_number(width)
    function = stated(dataset, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR":
        center = center - 0.5
        width = width - 1
    if function not in ("LINEAR", "LINEAR_EXACT") or width <= 0:
        return None
    return {"window": (center - width / 2, center + width / 2)}


def padding(dataset: pydicom.Dataset, pixels: np.ndarray) -> np.ndarray | bool:
    """Return whether stored values are padding, as a mask, or `False` without padding."""
    value = stated(dataset, "PixelPaddingValue")
    if value is None:
        return False
    limit = stated(dataset, "PixelPaddingRangeLimit")
    if limit is None:
        limit = value
    lowest = min(value, limit)
    highest = max(value, limit)
    return (pixels >= lowest) & (pixels <= highest)


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
    headers = read_headers(folder)
    check_alike(headers)
    headers, affine = in_order(headers)
    first_path, first = headers[0]
    with read_errors(first_path):
        shape = (len(headers), int(first.Rows), int(first.Columns))
        unnamed_file = tempfile.TemporaryFile()
        values = np.memmap(unnamed_file, np.float32, "w+", shape=shape)
    for index, (path, _) in enumerate(headers):
        with read_errors(path):
            dataset = open_dicom(path, path)
            frame = read_frame(dataset, path)
            values[index] = frame.values
    return values.transpose(2, 1, 0), affine


def read_headers(folder: Path) -> list[Header]:
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
        hint = ""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and is_dicom_file(path):
                hint = f" Found images in {path.parent}. Use the folder of one series."
                break
        raise ValueError(f"No DICOM images found in {folder}.{hint}")
    return headers


def check_alike(headers: list[Header]) -> None:
    """Raise a `ValueError` unless the files are gray slices of one series with the same size and spacing."""
    first_path, first = headers[0]
    for path, dataset in headers:
        different_tags = []
        with read_errors(path):  # pydicom converts the values of tags when they are read.
            check_slice(path, dataset)
            for tag in ("SeriesInstanceUID", "Rows", "Columns"):
                if dataset.get(tag) != first.get(tag):
                    different_tags.append(tag)
            for tag in ("ImageOrientationPatient", "PixelSpacing"):
                if not np.allclose(dataset[tag].value, first[tag].value, atol=SAME, rtol=0):
                    different_tags.append(tag)
        if different_tags:
            tag = different_tags[0]
            raise ValueError(
                f"Expected slices with the same {tag}, {path} has {dataset.get(tag)} and {first_path} has "
                f"{first.get(tag)}. Move each series to a separate folder."
            )


def check_slice(path: Path, dataset: pydicom.Dataset) -> None:
    """Raise a `ValueError` unless a file is one gray slice with a position and spacing."""
    tag = invalid_tag(dataset)
    if number_of_frames(dataset) > 1:
        problem = "several frames"
    elif dataset.get("SamplesPerPixel", 1) != 1:
        problem = "several colors"
    elif tag is not None:
        problem = f"no valid {tag}, but {dataset.get(tag)}"
    else:
        return
    raise ValueError(
        f"Expected one gray slice with its spacing and position per file, {path} has {problem}. Repair the file, or "
        "convert it to NIfTI, for example with dcm2niix."
    )


def invalid_tag(dataset: pydicom.Dataset) -> str | None:
    """Return the first tag of position and spacing that is missing or impossible, or `None`."""
    for tag, length in GEOMETRY.items():
        try:
            numbers = np.array(dataset[tag].value, dtype=np.float64)
        except (KeyError, TypeError, ValueError):  # The tag is missing, or one of its values is no number.
            return tag
        if numbers.shape != (length,) or not np.isfinite(numbers).all():
            return tag
    if min(dataset.PixelSpacing) <= 0:
        return "PixelSpacing"
    orientation = np.array(dataset.ImageOrientationPatient, dtype=np.float64)
    axes = orientation.reshape(2, 3)
    products = axes @ axes.T  # The identity, if the axes are perpendicular and of length 1.
    if not np.allclose(products, np.eye(2), atol=0.01):
        return "ImageOrientationPatient"
    return None


def in_order(headers: list[Header]) -> tuple[list[Header], np.ndarray]:
    """Sort slices along their normal, and return them with the affine of `(column, row, slice)`.

    Raises:
        ValueError: if slices are missing, duplicated, or not on one line with the others.
    """
    _, first = headers[0]
    directions = np.array(first.ImageOrientationPatient, dtype=np.float64)
    along_row, along_column = directions.reshape(2, 3)
    normal = np.cross(along_row, along_column)

    def height_of(header: Header) -> float:
        """Return the position of a slice along the normal."""
        _, dataset = header
        position = np.array(dataset.ImagePositionPatient, dtype=np.float64)
        return normal @ position

    headers = sorted(headers, key=height_of)
    stated_positions = [dataset.ImagePositionPatient for _, dataset in headers]
    positions = np.array(stated_positions, dtype=np.float64)
    if len(headers) == 1:
        path, dataset = headers[0]
        step = thickness_of(path, dataset) * normal
    else:
        check_distances(headers, positions @ normal)
        num_steps = len(headers) - 1
        step = (positions[-1] - positions[0]) / num_steps
        check_line(headers, positions, step)

    between_rows, between_columns = first.PixelSpacing
    affine = np.eye(4)
    affine[:3, 0] = float(between_columns) * along_row
    affine[:3, 1] = float(between_rows) * along_column
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    # DICOM axes point left and posterior, NIfTI axes point right and anterior.
    to_nifti_axes = np.diag([-1.0, -1.0, 1.0, 1.0])
    return headers, to_nifti_axes @ affine


def thickness_of(path: Path, dataset: pydicom.Dataset) -> float:
    """Return the thickness of a single slice, in millimeters."""
    with read_errors(path):
        thickness = float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 0)
    if thickness <= 0:
        raise ValueError(f"{path} is a single slice without SliceThickness, which is required for its spacing.")
    return thickness


def check_distances(headers: list[Header], heights: np.ndarray) -> None:
    """Raise a `ValueError` unless sorted slices have equal distances, from their positions along the normal."""
    distances = np.diff(heights)
    usual_distance = np.median(distances)
    for index, distance in enumerate(distances):
        difference = abs(distance - usual_distance)
        is_unusual = difference > TOLERANCE * usual_distance
        if is_unusual or distance <= SAME:
            before, _ = headers[index]
            after, _ = headers[index + 1]
            raise ValueError(
                f"A slice is there twice or missing: {before} and {after} are {distance:.2f} mm apart, most neighbors "
                f"are {usual_distance:.2f} mm apart."
            )


def check_line(headers: list[Header], positions: np.ndarray, step: np.ndarray) -> None:
    """Raise a `ValueError` if a slice is not at a multiple of a step from the first."""
    numbers_of_steps = np.arange(len(headers))
    numbers_of_steps = numbers_of_steps[:, None]
    expected_positions = positions[0] + numbers_of_steps * step
    deviations = np.linalg.norm(positions - expected_positions, axis=1)
    farthest = int(deviations.argmax())
    largest_deviation = deviations[farthest]
    tolerance = TOLERANCE * np.linalg.norm(step)
    if largest_deviation > tolerance:
        path, _ = headers[farthest]
        raise ValueError(f"Expected slices on one line, {path} is {largest_deviation:.2f} mm off the line.")
