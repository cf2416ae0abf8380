"""What is annotated in an image: regions with boxes, or a mask with the class of every pixel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from ...images.reading import VALUES, Window, read_image, whole_numbers
from ..boxes import Box

MIN_REGION_SHARE = 1e-4  # of the image; a smaller connected part of a mask is a speck


@dataclass(frozen=True)
class Region:
    """An object, or a connected part of a mask.

    `box` lies inside the image. `area` is that of the outline where one is annotated and of the box otherwise. A
    region that is not `is_clear` (a crowd, marked as difficult, a speck) is there, but its class is neither counted
    nor pointed at.
    """

    label: str
    box: Box
    area: float
    caption: str | None = None
    is_clear: bool = True

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class LabelMap(NamedTuple):
    """The class of every pixel."""

    numbers: np.ndarray
    """Integers of shape (height, width): 0 for no class, otherwise the place in `phrases`, from 1."""
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image, or a pair before and after, with its annotation: regions, one class of the whole, or captions.

    `window` is the part of the file that the image shows; `size`, height and width, and boxes are in pixels of that
    part. `slivers` are the visible parts of regions that lie mostly outside of the window. `mask` reads the class of
    each pixel, if annotated. `picture` renders the image if no file holds it, as for a slice of a volume.
    """

    id: str
    paths: tuple[Path, ...]
    size: tuple[int, int]
    regions: tuple[Region, ...] = ()
    label: str | None = None
    captions: tuple[str, ...] = ()
    window: Window | None = None
    slivers: tuple[Region, ...] = ()
    mask: Callable[[], LabelMap] | None = None
    picture: Callable[[], Image.Image] | None = None

    @property
    def visible(self) -> tuple[Region, ...]:
        return (*self.regions, *self.slivers)

    @property
    def cut(self) -> set[str]:
        """The classes of the slivers: their regions are not all that is visible of them."""
        return {region.label for region in self.slivers}

    @property
    def classes(self) -> set[str]:
        return {region.label for region in self.regions} | ({self.label} - {None})


def read_labels(path: Path, size: tuple[int, int], names: Mapping[str, str | None]) -> LabelMap:
    """Read the classes in the mask of an image of that height and width; `phrases` are those of `names`, in order.

    Raises:
        ValueError: names the mask if it cannot be read, or holds a value that is missing in `names`.
    """
    return number_classes(*read_mask_values(path, size), names, path)


def read_mask_values(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """Return the values of a mask, int64 of shape (height, width), and whether they are colors, as 0xRRGGBB."""
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


def number_classes(values: np.ndarray, is_color: bool, names: Mapping[str, str | None], path: Path) -> LabelMap:
    """Return the classes of the values of a mask, see [`read_mask_values`]; `path` is for errors."""
    phrases = tuple(dict.fromkeys(phrase for phrase in names.values() if phrase is not None))
    numbers = np.zeros(values.shape, dtype=np.int32)
    for value in np.unique(values).tolist():
        key = f"{value >> 16},{value >> 8 & 255},{value & 255}" if is_color else str(value)
        if key not in names:
            raise ValueError(f"{path} holds the value {key}, which --names does not name.")
        if names[key] is not None:
            numbers[values == value] = phrases.index(names[key]) + 1
    return LabelMap(numbers, phrases)


def regions_of(labels: LabelMap) -> tuple[Region, ...]:
    """Return the connected parts of each class."""
    return tuple(
        region
        for number in np.unique(labels.numbers).tolist()
        if number
        for region in connected_regions(labels.numbers == number, labels.phrases[number - 1])
    )


def connected_regions(mask: np.ndarray, label: str) -> list[Region]:
    """Return the connected parts (by eight neighbors) of a boolean mask of shape (height, width)."""
    _, _, parts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return [
        Region(label, (x, y, x + width, y + height), float(area), is_clear=area >= MIN_REGION_SHARE * mask.size)
        for x, y, width, height, area in parts[1:].tolist()
    ]
