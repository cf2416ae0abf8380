"""Description of how a model sees stored images: their type, bands, values and transparency."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers.image_utils import ChannelDimension

from ..image_decoding import TIFF, open_raster
from ..input_spec import InputSpec, band_percentiles, range_of_type
from .large import chosen_bands, transparency
from .pixels import IMAGE_PROCESSOR
from .reading import Picture, Window, is_tiff, read_image, read_picture, stored_size

NUM_IMAGES = 16  # Number of images that are read, drawn with a fixed seed.
SIDE = 512  # Longest side in pixels of the part of a TIFF that is read, its center.
MOST_VALUES = 1 << 16  # Number of values of an image that are looked at.
PERCENTILES = (1, 99)  # Of the values, so that single pixels do not count.
LOW_SHARE = 0.1  # Share of the range from black to white below which a warning is given.
Source = Path | bytes | Picture


def describe_images(
    length: int, source_of: Callable[[int], Source], spec: InputSpec | None, name: str = "images"
) -> str:
    """Return in one line how images are seen, and in a second line a warning and an input spec if they are too dark.

    At most 16 images are read. Images that cannot be read are left out, because the reader of the data names them.

    Args:
        length: number of images.
        source_of: function from an index to a file, its content, or the decoded image.
        spec: input spec of the images.
        name: name of the images in the text.

    Returns:
        Text, empty if no image can be read.
    """
    indices = np.random.default_rng(0).choice(length, min(length, NUM_IMAGES), replace=False)
    kinds = set()
    stored_values = []
    seen_values = []
    has_alpha = False
    for index in sorted(indices.tolist()):
        try:
            source = source_of(index)
            picture = read_center(source, spec)
            has_alpha = has_alpha or blends_alpha(source, picture, spec)
            bands = IMAGE_PROCESSOR.stored_bands(picture, spec, ChannelDimension.LAST)
            seen = IMAGE_PROCESSOR.process_image(picture, spec=spec, input_data_format=ChannelDimension.LAST)
        except Exception:  # The type depends on the decoder.
            continue
        kinds.add(f"{str(bands.dtype).removeprefix('torch.')}, {len(bands)} band(s)")
        stored_values.append(some_values(bands if spec is None or spec.bands is None else bands[list(spec.bands)]))
        seen_values.append(some_values(seen))
        black_and_white = range_in_words(bands, spec)
    if not kinds:
        return ""
    low, high = band_percentiles(torch.cat(stored_values), PERCENTILES)
    black, white = band_percentiles(torch.cat(seen_values), PERCENTILES)
    share = (white - black) / 255
    line = (
        f"sees {name}: {' and '.join(sorted(kinds))}, values {low:.6g} to {high:.6g}, {black_and_white} is black to "
        f"white, of which they use {share:.0%}"
    )
    if has_alpha:
        line += '; the alpha band is blended with white (if it is another band, set input_spec {"bands": [0, 1, 2]})'
    if black_and_white.startswith("-") and not bands.dtype.is_signed:
        line += "\nWARNING: the window of the input spec begins below 0, so it is in other units than these images."
    if len(kinds) == 1 and share < LOW_SHARE and low < high:
        window = [float(f"{low:.4g}"), float(f"{high:.4g}")]
        proposal = {"window": window}
        if spec is not None and spec.bands is not None:
            proposal["bands"] = spec.bands
        line += f"\nWARNING: {name} use {share:.1%} of the range. Set input_spec to {json.dumps(proposal)}."
    return line


def report_images(
    length: int, source_of: Callable[[int], Source], spec: InputSpec | None, name: str = "images"
) -> None:
    """Print the text of [`describe_images`], if it has any."""
    text = describe_images(length, source_of, spec, name)
    if text:
        print(text)


def read_center(source: Source, spec: InputSpec | None) -> Picture:
    """Return an image, or the center of a large TIFF."""
    if isinstance(source, bytes):
        return read_picture(source, spec)
    if not isinstance(source, Path):
        return source
    return read_image(source, center_of(source) if is_tiff(source) else None, spec)


def center_of(path: Path) -> Window | None:
    height, width = stored_size(path)
    if max(height, width) <= SIDE:
        return None
    top = max(height - SIDE, 0) // 2
    left = max(width - SIDE, 0) // 2
    return left, top, min(left + SIDE, width), min(top + SIDE, height)


def blends_alpha(source: Source, picture: Picture, spec: InputSpec | None) -> bool:
    """Return whether a transparency band is blended with white: of a Pillow image, or as GDAL marks it in a TIFF."""
    if isinstance(picture, PIL.Image.Image):
        return "A" in picture.getbands() or "transparency" in picture.info
    is_tiff_file = isinstance(source, Path) and is_tiff(source)
    is_tiff_content = isinstance(source, bytes) and source.startswith(TIFF)
    if not is_tiff_file and not is_tiff_content:
        return False
    spec = spec or InputSpec()
    with open_raster(source) as dataset:
        return transparency(dataset, chosen_bands(dataset, spec), spec) is not None


def some_values(bands: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced finite values, float64."""
    values = bands.flatten().double()
    values = values[:: max(len(values) // MOST_VALUES, 1)]
    return values[values.isfinite()]


def range_in_words(bands: torch.Tensor, spec: InputSpec | None) -> str:
    if spec is not None and spec.windows is not None:
        return " and ".join(f"{low:g} to {high:g}" for low, high in spec.windows)
    if spec is not None and spec.percentiles is not None:
        low, high = spec.percentiles
        return f"percentile {low:g} to {high:g} of each image"
    low, high = range_of_type(bands)
    return f"{low:g} to {high:g}"
