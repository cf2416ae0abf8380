"""DICOM files to pixels: one frame, in the units of its tags or in 8 bits as viewers show it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch

from ..input_spec import InputSpec

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
except ModuleNotFoundError as error:
    raise ImportError("DICOM needs pydicom: pip install 'modeling-vitp[medical]'.") from error

PERCENTILES = (2, 98)  # become black and white where the tags do not say what does


@dataclass(frozen=True)
class Frame:
    """The pixels of a DICOM file.

    Args:
        values: grey in the units of the rescale tags (Hounsfield units of CT), of shape `(height, width)`, NaN where
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
    """The tags of a file that has an image.

    Args:
        name: of the file, for errors.
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
    """A frame of a file.

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
    """The middle frame as an image.

    Args:
        spec: how it will be read. One with a window or percentiles gets grey in the units of its tags, float32 of shape
            `(height, width)`; of MONOCHROME1, whose low values are bright, mirrored in the middle of the window, or
            negative for percentiles. Otherwise it is of 8 bits, windowed as the tags say.
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
    """Where the tags of a frame are: in the sequence of that name of its functional groups, or of those of all frames
    (DICOM PS3.3, C.7.6.16), or in the data set itself.
    """
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*own[index : index + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])):
        if group.get(name):
            return group[name][0]
    return dataset


def stated(dataset: pydicom.Dataset, name: str) -> Any:
    """The value of a tag; `None` if it is not there or empty, as anonymisation leaves many."""
    value = dataset.get(name)
    return None if value is None or (hasattr(value, "__len__") and not len(value)) else value


def tagged_window(dataset: pydicom.Dataset) -> dict | None:
    """The first linear window of the tags (DICOM PS3.3, C.11.2.1.2), in units after rescaling."""
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
    """Where the stored values are padding."""
    value, limit = (stated(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return False
    low, high = sorted((value, value if limit is None else limit))
    return (pixels >= low) & (pixels <= high)
