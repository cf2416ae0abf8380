"""Description of how a model sees stored images: their type, bands, values and transparency."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class SeenImage:
    """Image as it is stored and as a model sees it.

    Args:
        kind: type and number of bands, in words.
        stored: some stored values of the bands that are used, float64.
        seen: some of the values that the model sees, from 0 (black) to 255 (white), float64.
        has_alpha: whether a transparency band is blended with white.
        range_text: stored values from black to white, in words.
        is_unsigned: whether stored values cannot be negative.
    """

    kind: str
    stored: torch.Tensor
    seen: torch.Tensor
    has_alpha: bool
    range_text: str
    is_unsigned: bool


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
    generator = np.random.default_rng(0)
    indices = generator.choice(length, min(length, NUM_IMAGES), replace=False)
    images = []
    for index in sorted(indices.tolist()):
        try:
            image = look_at(source_of(index), spec)
        except Exception:  # The type depends on the decoder.
            continue
        images.append(image)
    if not images:
        return ""
    kinds = sorted({image.kind for image in images})
    low, high = band_percentiles(torch.cat([image.stored for image in images]), PERCENTILES)
    black, white = band_percentiles(torch.cat([image.seen for image in images]), PERCENTILES)
    share = (white - black) / 255
    last_image = images[-1]
    line = (
        f"sees {name}: {' and '.join(kinds)}, values {low:.6g} to {high:.6g}, {last_image.range_text} is black to "
        f"white, of which they use {share:.0%}"
    )
    if any(image.has_alpha for image in images):
        line += '; the alpha band is blended with white (if it is another band, set input_spec {"bands": [0, 1, 2]})'
    if last_image.range_text.startswith("-") and last_image.is_unsigned:
        line += "\nWARNING: the window of the input spec begins below 0, so it is in other units than these images."
    if len(kinds) == 1 and share < LOW_SHARE and low < high:
        proposal = json.dumps(propose_spec(low, high, spec))
        line += f"\nWARNING: {name} use {share:.1%} of the range. Set input_spec to {proposal}."
    return line


def look_at(source: Source, spec: InputSpec | None) -> SeenImage:
    """Return an image as it is stored and as a model sees it.

    Args:
        source: file, its content, or the decoded image.
        spec: input spec of the image.
    """
    picture = read_center(source, spec)
    bands = IMAGE_PROCESSOR.stored_bands(picture, spec, ChannelDimension.LAST)
    seen = IMAGE_PROCESSOR.process_image(picture, spec=spec, input_data_format=ChannelDimension.LAST)
    used_bands = bands
    if spec is not None and spec.bands is not None:
        used_bands = bands[list(spec.bands)]
    dtype_name = str(bands.dtype).removeprefix("torch.")
    return SeenImage(
        kind=f"{dtype_name}, {len(bands)} band(s)",
        stored=some_values(used_bands),
        seen=some_values(seen),
        has_alpha=blends_alpha(source, picture, spec),
        range_text=range_in_words(bands, spec),
        is_unsigned=not bands.dtype.is_signed,
    )


def propose_spec(low: float, high: float, spec: InputSpec | None) -> dict[str, Any]:
    """Return an input spec whose window are the values of the images, with the bands of the present one."""
    proposal = {"window": [float(f"{low:.4g}"), float(f"{high:.4g}")]}
    if spec is not None and spec.bands is not None:
        proposal["bands"] = spec.bands
    return proposal


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
    window = None
    if is_tiff(source):
        window = center_of(source)
    return read_image(source, window, spec)


def center_of(path: Path) -> Window | None:
    height, width = stored_size(path)
    if max(height, width) <= SIDE:
        return None
    top = max(height - SIDE, 0) // 2
    left = max(width - SIDE, 0) // 2
    right = min(left + SIDE, width)
    bottom = min(top + SIDE, height)
    return left, top, right, bottom


def blends_alpha(source: Source, picture: Picture, spec: InputSpec | None) -> bool:
    """Return whether a transparency band is blended with white: of a Pillow image, or as GDAL marks it in a TIFF."""
    if isinstance(picture, PIL.Image.Image):
        return "A" in picture.getbands() or "transparency" in picture.info
    if not holds_tiff(source):
        return False
    if spec is None:
        spec = InputSpec()
    with open_raster(source) as dataset:
        bands = chosen_bands(dataset, spec)
        alpha_band = transparency(dataset, bands, spec)
    return alpha_band is not None


def holds_tiff(source: Source) -> bool:
    """Return whether a source is the file or the content of a TIFF."""
    if isinstance(source, Path):
        return is_tiff(source)
    if isinstance(source, bytes):
        return source.startswith(TIFF)
    return False


def some_values(bands: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced finite values, float64."""
    values = bands.flatten().double()
    step = max(len(values) // MOST_VALUES, 1)
    spaced_values = values[::step]
    return spaced_values[spaced_values.isfinite()]


def range_in_words(bands: torch.Tensor, spec: InputSpec | None) -> str:
    if spec is not None and spec.windows is not None:
        return " and ".join(f"{low:g} to {high:g}" for low, high in spec.windows)
    if spec is not None and spec.percentiles is not None:
        low, high = spec.percentiles
        return f"percentile {low:g} to {high:g} of each image"
    low, high = range_of_type(bands)
    return f"{low:g} to {high:g}"
