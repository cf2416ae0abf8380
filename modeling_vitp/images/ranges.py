"""What percentiles make black and white: those of a whole image, of which a window is a part, and of its data alone."""

import io
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from transformers.image_utils import ChannelDimension

from ..input_spec import InputSpec
from .large import chosen_bands, sampled_windows
from .pixels import IMAGE_PROCESSOR
from .reading import PNG, TIFF, read_picture, stores_colors, tiff_tags


def ranged(spec: InputSpec | None, image: Path | bytes, is_part: bool) -> InputSpec | None:
    """The spec for an image or a window of it, which are to be seen as `predict_large` shows them to a model.

    Args:
        spec: with percentiles, which become the window that they are of the whole image; without, it is as it was.
        image: a file, whose percentiles are kept, or what is in one.
        is_part: whether a window is read.

    Raises:
        Exception: of many kinds, if the image is broken; a `ValueError` that names the file.
    """
    if spec is None or spec.percentiles is None:
        return spec
    return of_content(spec, image, is_part) if isinstance(image, bytes) else of_file(spec, image, is_part)


def of_content(spec: InputSpec, content: bytes, is_part: bool) -> InputSpec:
    if is_array(spec, content):
        with rasterio.MemoryFile(content) as memory, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open() as dataset:
                return of_dataset(spec, dataset)
    if not is_part:
        return spec
    picture = read_picture(content, spec)
    layout = ChannelDimension.LAST if isinstance(picture, np.ndarray) else None
    return spec.with_range_of(IMAGE_PROCESSOR.stored_bands(picture, spec, layout))


@lru_cache(maxsize=100_000)
def of_file(spec: InputSpec, path: Path, is_part: bool) -> InputSpec:
    try:
        if not is_array(spec, path):
            return of_content(spec, path.read_bytes(), is_part) if is_part else spec
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as dataset:
                return of_dataset(spec, dataset)
    except Exception as error:  # of many kinds, for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error


def of_dataset(spec: InputSpec, dataset: rasterio.DatasetReader) -> InputSpec:
    bands = chosen_bands(dataset, spec)
    spec.check_number(dataset.count if spec.bands is not None else len(bands))
    return spec.with_windows(sampled_windows(dataset, bands, spec))


def is_array(spec: InputSpec, image: Path | bytes) -> bool:
    """Whether an image is a TIFF whose values are taken as they are stored, or a PNG with transparency."""
    with io.BytesIO(image) if isinstance(image, bytes) else image.open("rb") as file:
        head = file.read(26)
        if head[:4] not in TIFF:
            return head.startswith(PNG) and head[25:] in (b"\4", b"\6")
        file.seek(0)
        return spec.takes_bands or stores_colors(tiff_tags(file))
