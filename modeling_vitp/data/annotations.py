"""Labels of images: objects as annotated, regions with boxes, and masks with the class of each pixel."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from ..images.reading import VALUES, Window, check_file, check_upright, read_image, stored_size, whole_numbers
from .boxes import Box

GRAY = 0x010101  # Color 0xRRGGBB of the gray value 1.
MIN_REGION_SHARE = 1e-4  # Minimum share of the image of a clear region of a mask.
BACKGROUND = ("0", "0,0,0")  # Values of masks that are the background by default.

Point = tuple[float, float]


@dataclass(frozen=True)
class AnnotatedObject:
    """Object as annotated in its file, in pixels and with the class name of the file.

    If the annotation is an oriented box, `corners` has its corners in order around the object, and `box` encloses them.
    `segmentation` has COCO's polygons or run lengths. `where` names the file and the object in error messages.
    """

    where: str
    label: str
    box: Box
    corners: tuple[Point, Point, Point, Point] | None = None
    is_difficult: bool = False
    is_crowd: bool = False
    area: float | None = None
    caption: str | None = None
    segmentation: list | dict | None = None


def oriented_object(
    where: str,
    label: str,
    corners: list[Point],
    is_difficult: bool,
) -> AnnotatedObject:
    """Return an object with an oriented box, and the box that encloses it."""
    xs, ys = zip(*corners)
    box = (min(xs), min(ys), max(xs), max(ys))
    return AnnotatedObject(where, label, box, corners=tuple(corners), is_difficult=is_difficult)


@dataclass(frozen=True)
class Region:
    """Object, or connected component of a mask.

    Args:
        label: class of the region.
        box: box in pixels, inside the image.
        area: area of the outline if it is annotated, or else of the box, in pixels.
        caption: description of the region.
        is_clear: `False` for a crowd, a difficult object or a tiny component. If a class has such a region, no question
            is asked about the number or the positions of its regions.
    """

    label: str
    box: Box
    area: float
    caption: str | None = None
    is_clear: bool = True

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        x = (left + right) / 2
        y = (top + bottom) / 2
        return x, y


class LabelMap(NamedTuple):
    """Class of each pixel: `numbers`, integers `(height, width)`, are 0 for no class, or index `phrases` from 1."""

    numbers: np.ndarray
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class AnnotatedImage:
    """Image, or pair of images before and after a change, with its annotation.

    Args:
        id: id of the image.
        paths: file of the image, or the two files of a pair.
        size: height and width in pixels, of the window if there is one.
        regions: regions with boxes.
        labels: sorted classes of the whole image, `None` if it has only regions.
        captions: captions of the image or the change.
        window: part of the file that is shown. `size` and boxes are in pixels of the window.
        slivers: visible parts of regions that are mostly outside of the window.
        mask: function that reads the class of each pixel, if it is annotated.
        picture: function that renders the image if it has no file of its own, such as a slice of a volume.
    """

    id: str
    paths: tuple[Path, ...]
    size: tuple[int, int]
    regions: tuple[Region, ...] = ()
    labels: tuple[str, ...] | None = None
    captions: tuple[str, ...] = ()
    window: Window | None = None
    slivers: tuple[Region, ...] = ()
    mask: Callable[[], LabelMap] | None = None
    picture: Callable[[], Image.Image] | None = None

    def source(self) -> Path | Image.Image:
        """Return the file of the image, or the image if it has no file of its own."""
        return self.paths[0] if self.picture is None else self.picture()

    @property
    def visible(self) -> tuple[Region, ...]:
        return (*self.regions, *self.slivers)

    @property
    def cut(self) -> set[str]:
        """Classes of the slivers, whose `regions` are incomplete."""
        return {region.label for region in self.slivers}

    @property
    def classes(self) -> set[str]:
        labels = {region.label for region in self.regions}
        labels.update(self.labels or ())
        return labels


def read_labels(
    path: Path,
    size: tuple[int, int],
    names: Mapping[str, str | None],
) -> LabelMap:
    """Read the label map of an image from its mask.

    Args:
        path: file of the mask.
        size: height and width of the image.
        names: phrases by mask value; `None` is the background.

    Raises:
        ValueError: If the mask cannot be read, or has a value that is missing in `names`; the message names the mask.
    """
    values, is_color = read_mask_values(path, size)
    return number_classes(values, is_color, names, path)


def read_mask_values(path: Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, bool]:
    """Return the values of a mask, int64 `(height, width)`, and whether they are colors 0xRRGGBB.

    Args:
        path: file of the mask.
        size: expected height and width; any if `None`.
    """
    picture = read_image(path, None, as_stored=True)
    if isinstance(picture, Image.Image):
        if picture.mode not in VALUES:
            picture = picture.convert("RGB")
        picture = np.asarray(picture)
    is_color = picture.ndim == 3
    has_valid_bands = not is_color or (picture.shape[2] == 3 and picture.dtype == np.uint8)
    has_valid_size = size is None or picture.shape[:2] == size
    if not has_valid_bands or not has_valid_size:
        expected_size = "" if size is None else f" of height and width {size}, as of the image,"
        raise ValueError(
            f"Expected a mask{expected_size} with one band or three 8-bit bands, got shape {picture.shape} and "
            f"{picture.dtype} in {path}."
        )
    values = whole_numbers(picture, path)
    if is_color:
        values = values @ [1 << 16, 1 << 8, 1]
    return values, is_color


def number_classes(
    values: np.ndarray,
    is_color: bool,
    names: Mapping[str, str | None],
    path: Path,
) -> LabelMap:
    """Convert the values of a mask, see [`read_mask_values`], to a label map; `path` is for error messages."""
    has_color_names = any("," in name for name in names)
    # A gray mask may have been saved with three channels. With names of colors, gray values are colors too.
    if is_color and not has_color_names:
        has_gray_values_only = not (values % GRAY).any()
        if has_gray_values_only:
            values = values // GRAY
            is_color = False
    phrases = []
    for phrase in names.values():
        if phrase is not None and phrase not in phrases:
            phrases.append(phrase)
    numbers = np.zeros(values.shape, dtype=np.int32)
    for value in np.unique(values).tolist():
        key = mask_key(value, is_color)
        if key not in names:
            raise ValueError(f"{path} has the value {key}, which is missing in --names.")
        phrase = names[key]
        if phrase is not None:
            has_value = values == value
            numbers[has_value] = phrases.index(phrase) + 1
    return LabelMap(numbers, tuple(phrases))


def mask_key(value: int, is_color: bool) -> str:
    """Return the text that stands for a value of a mask in names: `"3"`, or `"255,0,0"` for a color 0xRRGGBB."""
    if not is_color:
        return str(value)
    red = value >> 16
    green = value >> 8 & 255
    blue = value & 255
    return f"{red},{green},{blue}"


def names_of_values(values: Iterable[str]) -> dict[str, str | None]:
    """Return default names of the values of masks, see [`mask_key`]: `class 1` …, `None` for 0 or black."""

    def channels(value: str) -> list[int]:
        return [int(channel) for channel in value.split(",")]

    names = {}
    for value in sorted(values, key=channels):
        names[value] = None if value in BACKGROUND else f"class {value}"
    return names


def regions_of(labels: LabelMap) -> tuple[Region, ...]:
    """Return the connected components of each class."""
    regions = []
    for number in np.unique(labels.numbers).tolist():
        if number != 0:
            mask = labels.numbers == number
            phrase = labels.phrases[number - 1]
            regions += connected_regions(mask, phrase)
    return tuple(regions)


def connected_regions(mask: np.ndarray, label: str) -> list[Region]:
    """Return the 8-connected components of a boolean mask of shape `(height, width)`."""
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    min_area = MIN_REGION_SHARE * mask.size
    regions = []
    # The first component is the background.
    for x, y, width, height, area in statistics[1:].tolist():
        region = Region(
            label,
            box=(x, y, x + width, y + height),
            area=float(area),
            is_clear=area >= min_area,
        )
        regions.append(region)
    return regions


def plain_words(label: str) -> str:
    """Convert a class to a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` become `annual crop`.

    Acronyms keep their case.
    """
    spaced_label = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    spaced_label = spaced_label.replace("_", " ").replace("-", " ")
    words = []
    for word in spaced_label.split():
        is_acronym = len(word) > 1 and word.isupper()
        words.append(word if is_acronym else word.lower())
    return " ".join(words)


def upright_size(path: Path) -> tuple[int, int]:
    """Return height and width. Raise a `ValueError` if the file is not an upright image, or is truncated."""
    size = stored_size(path)
    check_upright(path)
    check_file(path)
    return size
