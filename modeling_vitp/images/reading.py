"""Files to pixels: images by Pillow, TIFF of any depth and number of bands by rasterio, whole or a window."""

import warnings
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from .windows import Window

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}

# What is read: by Pillow, or of a TIFF the array of shape `(height, width)` or `(height, width, bands)`.
Picture = PIL.Image.Image | np.ndarray


def read_image(path: Path, window: Window | None) -> Picture:
    """A file, or a window of it; of a TIFF no more is read than the window."""
    if is_tiff(path):
        area = None if window is None else ((window[1], window[3]), (window[0], window[2]))  # rows, columns
        with open_tiff(path) as file:
            bands = file.read(window=area)
        return bands[0] if len(bands) == 1 else bands.transpose(1, 2, 0)
    return decode(path) if window is None else decode_scene(path).crop(window)


@cache
def stored_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_image` gives, from the header."""
    with open_tiff(path) if is_tiff(path) else open_image(path) as image:
        return image.height, image.width


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def open_tiff(path: Path) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def open_image(path: Path) -> PIL.Image.Image:
    try:
        return PIL.Image.open(path)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error


def decode(path: Path) -> PIL.Image.Image:
    with open_image(path) as image:
        try:
            image.load()
        except Exception as error:  # as in `open_image`
            raise ValueError(f"{path} cannot be read: {error}") from error
        return image


# Windows of one scene are often read one after another: image or pair, and mask.
decode_scene = lru_cache(maxsize=3)(decode)


def image_files(folder: Path) -> list[Path]:
    """The images under a folder, by their suffixes."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
