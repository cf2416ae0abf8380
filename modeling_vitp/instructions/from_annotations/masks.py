"""Masks: an image of values, as class numbers, and the connected parts of each class."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ...images.reading import VALUES, read_image, whole_numbers
from .annotations import Labels, Region

MIN_REGION_SHARE = 1e-4  # of the image; a smaller connected part of a mask is a speck


def labels_of(path: Path, size: tuple[int, int], names: Mapping[str, str | None]) -> Labels:
    """The classes in a mask, of that height and width; `phrases` are all those of `names`, in their order.

    Raises:
        ValueError: names the mask if it cannot be read, or holds a value that `names` has not.
    """
    return numbered(*mask_values(path, size), names, path)


def numbered(values: np.ndarray, is_color: bool, names: Mapping[str, str | None], path: Path) -> Labels:
    """The same of a mask's values, see [`mask_values`]; `path` is for errors."""
    phrases = tuple(dict.fromkeys(phrase for phrase in names.values() if phrase is not None))
    numbers = np.zeros(values.shape, dtype=np.int32)
    for value in np.unique(values).tolist():
        key = f"{value >> 16},{value >> 8 & 255},{value & 255}" if is_color else str(value)
        if key not in names:
            raise ValueError(f"{path} holds the value {key}, which --names does not name.")
        if names[key] is not None:
            numbers[values == value] = phrases.index(names[key]) + 1
    return Labels(numbers, phrases)


def regions_of(labels: Labels) -> tuple[Region, ...]:
    """The connected parts of each class."""
    return tuple(
        region
        for number in np.unique(labels.numbers).tolist()
        if number
        for region in connected_regions(labels.numbers == number, labels.phrases[number - 1])
    )


def mask_values(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """A mask's values, int64 of shape (height, width), and whether they are colours, as 0xRRGGBB."""
    picture = read_image(path, None, as_stored=True)
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture if picture.mode in VALUES else picture.convert("RGB"))
    is_color = picture.ndim == 3
    if is_color and (picture.shape[2] != 3 or picture.dtype != np.uint8):
        raise ValueError(
            f"The mask {path} has {picture.shape[2]} bands of {picture.dtype}, not one, or three of 8 bits."
        )
    values = whole_numbers(picture, path)
    if values.shape[:2] != size:
        raise ValueError(f"The mask {path} is of height and width {values.shape[:2]}, its image of {size}.")
    return (values @ [1 << 16, 1 << 8, 1] if is_color else values), is_color


def connected_regions(mask: np.ndarray, label: str) -> list[Region]:
    """The connected parts (by eight neighbours) of a boolean mask, of shape (height, width)."""
    _, _, parts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return [
        Region(
            label,
            (left, top, left + width, top + height),
            float(area),
            is_clear=area >= MIN_REGION_SHARE * mask.size,
        )
        for left, top, width, height, area in parts[1:].tolist()
    ]
