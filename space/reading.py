"""Opens uploaded images: photographs, TIFF, GeoTIFF and JPEG 2000 of any depth and number of bands, DICOM and NIfTI.

The format of a file, except NIfTI, is detected from its content, not from its name. No file other than the upload is
read. Bands, levels, slice and window follow the controls of the page.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import limits
import numpy as np
import PIL.ExifTags
import PIL.Image
import rasterio
import torch
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window
from torch.nn import functional as F
from transformers.image_utils import ChannelDimension

from modeling_vitp import InputSpec
from modeling_vitp.image_decoding import JPEG_2000, PNG, TIFF, open_raster, upright
from modeling_vitp.images.dicom import PERCENTILES, number_of_frames, open_dicom, read_frame
from modeling_vitp.images.pixels import shown, to_pixels
from modeling_vitp.images.reading import is_dicom
from modeling_vitp.images.volumes import NIFTI, open_volume

CACHE = 64  # GDAL's cache in MiB; the default is 5% of the machine's memory
Fractions = tuple[float, float, float, float]
PHOTOGRAPHS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")  # HEIF if a plugin of Pillow reads it
FORMATS = "JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, GeoTIFF, JPEG 2000, DICOM or NIfTI"
AS_STATED = "as the file says"
KINDS_OF_RASTERS = {"GTiff": "TIFF", "JP2OpenJPEG": "JPEG 2000"}  # by the name of the driver of GDAL
PRESETS = {  # Hounsfield units that become black and white, by the usual centers and widths
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "soft tissue": (-160.0, 240.0),
    "brain": (0.0, 80.0),
}
COLORS = ("red", "green", "blue")
SENTINEL_2 = ("4", "3", "2")  # numbers of red, green and blue; the same for Landsat 8, Landsat 9 and HLS
LANDSAT_4_TO_7 = ("3", "2", "1")
OLDER = re.compile(r"(?:^|[^A-Z0-9])(?:L[ETM]0?[457]|LANDSAT[ _-]?[457])", re.IGNORECASE)
NUMBER = re.compile(r"(?:^|[^A-Z0-9])(?:SR_|ST_|TOA_|BAND[ _-]?)?B?0?(\d{1,2}A?)(?![A-Z0-9])", re.IGNORECASE)
IN_A_NAME = re.compile(r"(?<![A-Z0-9])B0?(\d{1,2}A?)(?![A-Z0-9])", re.IGNORECASE)
# Errors that the decoders raise for damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError)


class UnreadableImage(ValueError):
    """Error for an uploaded file that cannot be opened. The message is one line for the visitor."""


@dataclass(frozen=True)
class Adjustment:
    """Settings of a visitor for reading an image, with the values of the page's controls in their order.

    Args:
        position: position in a volume (from the feet up) or in the frames of a DICOM file, in percent.
        preset: `AS_STATED` or a key of `PRESETS`.
        bands: numbers, from 1, of the bands for red, green and blue, or of one band for gray. If empty, the bands are
            found by their names.
        low, high: percentiles of each band that become black and white. If they equal `PERCENTILES`, the levels in
            the file take precedence.
        window_percent: size of the visible window, in percent of each side of the image.
        center_x, center_y: center of the visible window, in percent from the left and from the top.

    Raises:
        ValueError: if the bands are not one or three numbers, or the percentiles are not ascending.
    """

    position: float = 50.0
    preset: str = AS_STATED
    bands: str | None = ""
    low: float = PERCENTILES[0]
    high: float = PERCENTILES[1]
    window_percent: float = 100.0
    center_x: float = 50.0
    center_y: float = 50.0

    def __post_init__(self):
        numbers = self.band_numbers
        has_other_characters = re.search(r"[^\d\s,;/-]", self.bands or "")
        if has_other_characters or len(numbers) not in (0, 1, 3) or 0 in numbers:
            raise ValueError(f"Expected one or three band numbers from 1, such as 4, 3, 2, got {self.bands[:50]!r}.")
        if not self.low < self.high:
            raise ValueError(
                f"The percentile of black must be below that of white, got {self.low:g} and {self.high:g}."
            )

    @property
    def band_numbers(self) -> list[int]:
        text = (self.bands or "")[:50]
        return [int(number) for number in re.findall(r"\d+", text)]

    @property
    def window(self) -> Fractions | None:
        """Left, top, right and bottom of the visible window, as fractions; `None` for the whole image."""
        if self.window_percent >= 100:
            return None
        half = self.window_percent / 200
        # The window lies within the image.
        x = min(max(self.center_x / 100, half), 1 - half)
        y = min(max(self.center_y / 100, half), 1 - half)
        return x - half, y - half, x + half, y + half

    def spec(self, stated: dict | None) -> dict | None:
        """Return the fields of the input spec to read an image with, based on those of a model or a file."""
        spec = dict(stated or {})
        has_percentiles = (self.low, self.high) != PERCENTILES
        if self.preset != AS_STATED or has_percentiles:
            spec.pop("window", None)
            spec.pop("percentiles", None)
            if self.preset == AS_STATED:
                spec["percentiles"] = (self.low, self.high)
            else:
                spec["window"] = PRESETS[self.preset]
        if self.band_numbers and "band_names" not in spec:  # A model with named bands takes all of them.
            spec["bands"] = [band - 1 for band in self.band_numbers]
        return spec or None


UNADJUSTED = Adjustment()


@dataclass(frozen=True)
class Reading:
    """Image with the input spec for [`~modeling_vitp.ViTPImageProcessor`] and [`~modeling_vitp.ViTPProcessor`]."""

    image: PIL.Image.Image | np.ndarray
    """8-bit Pillow image, or array of shape `(bands, height, width)` with one band, three, or those of the model."""
    input_spec: dict | None
    """Conversion of the array to 8-bit RGB, which is passed to the processor along with the image."""
    note: str
    """One line that describes the file and how it was read."""

    def pixels(self) -> torch.Tensor:
        """Return the pixels that the model sees, before tiling, see [`~modeling_vitp.images.pixels.to_pixels`]."""
        spec = None if self.input_spec is None else InputSpec.from_dict(self.input_spec)
        return to_pixels(self.image, spec, ChannelDimension.FIRST)

    def to_rgb(self) -> PIL.Image.Image:
        """Return the image for display as 8-bit RGB. Red, green and blue of other bands are found by their names."""
        pixels = self.pixels().movedim(0, -1).contiguous().numpy()
        band_names = None if self.input_spec is None else self.input_spec.get("band_names")
        return PIL.Image.fromarray(in_colors(pixels, band_names))


def in_colors(pixels: np.ndarray, band_names: Sequence[str] | None) -> np.ndarray:
    """Convert the pixels of a model with these bands to an image for display, uint8 of shape `(height, width, 3)`."""
    if band_names is None:
        return pixels
    return shown(torch.from_numpy(pixels).movedim(-1, 0), band_names)


def read_image(
    path: str | os.PathLike,
    max_side: int = limits.SIDE,
    input_spec: dict | None = None,
    position: float = 50.0,
    window: Fractions | None = None,
) -> Reading:
    """Read an image file of a size that [`checking.check_header`] accepts, and reduce its sides to `max_side` pixels.

    - JPEG, PNG, WebP, GIF (the first frame), BMP and AVIF with 8 bits are rotated by their EXIF tag.
    - TIFF, GeoTIFF, JPEG 2000 and 16-bit PNG: the bands that the file names red, green and blue are read, otherwise the
      first three, or the first of one or two. Nodata is ignored by the percentiles and becomes black. Values of more
      than 8 bits are scaled from the 2nd to the 98th percentile of each band. Complex values are replaced by their
      magnitude.
    - DICOM: one frame is read, in the units of its rescale tags, with its first (linear) window or else percentiles.
      MONOCHROME1 is inverted, and padding becomes black.

    Args:
        input_spec: fields of [`~modeling_vitp.InputSpec`] that replace the default window, percentiles and bands. With
            `band_names`, all bands of the file are read.
        position: position of the frame among those of a DICOM file, in percent.
        window: left, top, right and bottom of the part to read, as fractions of the sides. Only this part of a tiled
            TIFF is read.

    Raises:
        UnreadableImage: if the file is missing, empty, damaged, too large, or not an image.
        ValueError: if the input spec contradicts itself.
    """
    InputSpec.from_dict(input_spec)
    path = Path(path)
    if not path.is_file():
        raise UnreadableImage(f"{path.name} was not found.")
    with path.open("rb") as file:
        head = file.read(132)
    if not head:
        raise UnreadableImage(f"{path.name} is empty (0 bytes).")
    reader = _reader_of(path, head, position)
    try:
        return reader(path, max_side, input_spec, window)
    except UnreadableImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UnreadableImage(f"{path.name} cannot be opened. Expected an image in the format {FORMATS}.") from error
    except (PIL.Image.DecompressionBombError, MemoryError) as error:
        raise UnreadableImage(f"{path.name} is too large to be opened: {error}") from error
    except (*DECODING_ERRORS, RasterioError) as error:
        if isinstance(error, ValueError) and path.name in str(error):  # of the readers of this package
            raise UnreadableImage(str(error).replace(str(path), path.name)) from error
        raise _damage(path, error) from error


def _reader_of(path: Path, head: bytes, position: float) -> Callable[..., Reading]:
    """Return the function that reads a file that begins with `head`."""
    if is_volume(path):
        return partial(_read_volume, position=position)
    if is_dicom(head):
        return partial(_read_dicom, position=position)
    is_deep_png = head.startswith(PNG) and head[24:25] == b"\x10"  # 16 bits
    if is_deep_png or head.startswith((*TIFF, *JPEG_2000)):
        return _read_raster
    return _read_photograph


def _damage(path: Path, error: BaseException) -> UnreadableImage:
    """Return the error for a file that a decoder refuses."""
    message = str(error.__cause__ or error).replace(str(path), path.name)
    reason = " ".join(message.split())[:200] or type(error).__name__
    return UnreadableImage(f"{path.name} is damaged, incomplete or of an unsupported kind: {reason}")


@contextmanager
def open_raster_alone(path: Path) -> Iterator[rasterio.DatasetReader]:
    """Open an uploaded TIFF, JPEG 2000 or PNG, without the files beside it.

    Raises:
        UnreadableImage: if the file cannot be opened, or names another file as its overview.
    """
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        try:
            source = stack.enter_context(open_raster(path, with_sidecars=False))
        except ValueError as error:
            raise _damage(path, error.__cause__) from error
        yield source


def is_volume(path: str | Path) -> bool:
    return str(path).lower().endswith(NIFTI)


class Area(NamedTuple):
    """Part of an image to read, in pixels, and its size after reduction (width, height)."""

    left: int
    top: int
    size: tuple[int, int]
    reduced: tuple[int, int]
    is_part: bool

    @classmethod
    def of(
        cls,
        path: Path,
        size: tuple[int, int],
        window: Fractions | None,
        max_side: int,
    ) -> "Area":
        """Return the area of a window in an image of a width and height. Raise [`UnreadableImage`] if it is empty."""
        width, height = size
        if width == 0 or height == 0:
            raise UnreadableImage(f"{path.name} is empty: {width} × {height} pixels.")
        left_fraction, top_fraction, right_fraction, bottom_fraction = window or (0, 0, 1, 1)
        left = min(int(left_fraction * width), width - 1)
        top = min(int(top_fraction * height), height - 1)
        area_width = max(1, round(right_fraction * width) - left)
        area_height = max(1, round(bottom_fraction * height) - top)
        scale = min(1.0, max_side / max(area_width, area_height))
        reduced_width = max(1, round(scale * area_width))
        reduced_height = max(1, round(scale * area_height))
        return cls(
            left=left,
            top=top,
            size=(area_width, area_height),
            reduced=(reduced_width, reduced_height),
            is_part=window is not None,
        )

    def note(self, kind: str, steps: Sequence[str] = ()) -> str:
        """Describe how the area was read, with further steps of the reading."""
        note = f"{kind}, {self.size[0]} × {self.size[1]} pixels"
        if self.reduced != self.size:
            note += f", reduced to {self.reduced[0]} × {self.reduced[1]}"
        if self.is_part:
            note += f", window from {self.left}, {self.top}"
        return ", ".join([note, *steps])


def open_photograph(path: Path) -> PIL.Image.Image:
    """Open a photograph of 8 bits, without the decoders of Pillow for other formats, which a visitor might attack."""
    PIL.Image.init()
    formats = [name for name in PHOTOGRAPHS if name in PIL.Image.OPEN]
    return PIL.Image.open(path, formats=formats)


def _read_photograph(
    path: Path,
    max_side: int,
    input_spec: dict | None,
    window: Fractions | None,
) -> Reading:
    with open_photograph(path) as image:
        kind = f"{image.format}, {image.mode}"
        width, height = image.size
        if window is None:
            # A JPEG is decoded at a reduced size.
            image.thumbnail(Area.of(path, (width, height), window, max_side).reduced)
        is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 4
        upright_size = (height, width) if is_turned else (width, height)
        area = Area.of(path, upright_size, window, max_side)
        photograph = upright(image)
    if window is not None:
        area_width, area_height = area.size
        photograph = photograph.crop((area.left, area.top, area.left + area_width, area.top + area_height))
    photograph.thumbnail(area.reduced)
    return Reading(photograph, input_spec, area.note(kind))


def _read_raster(
    path: Path,
    max_side: int,
    input_spec: dict | None,
    window: Fractions | None,
) -> Reading:
    spec = dict(input_spec or {})
    with open_raster_alone(path) as source:
        kind = KINDS_OF_RASTERS.get(source.driver, source.driver)
        dtype = source.dtypes[0]
        count = source.count
        area = Area.of(path, (source.width, source.height), window, max_side)
        stated_bands = spec.pop("bands", None)
        if "band_names" in spec:
            bands = list(range(count))
        else:
            bands = list(stated_bands or _bands_of(source, path.stem))
        if max(bands) >= count:
            raise UnreadableImage(
                f"{path.name} has {count} band(s), but the input spec asks for band {max(bands) + 1}."
            )
        palette = source.colormap(1) if source.colorinterp[0] == ColorInterp.palette else None
        array = _read_bands(source, bands, area, has_palette=bool(palette))
    steps = []
    if count > 1:
        plural = "s" if len(bands) > 1 else ""
        numbers = ", ".join(str(band + 1) for band in bands)
        steps.append(f"band{plural} {numbers} of {count}")
    if palette:
        array = _in_palette_colors(array[0], palette)
        steps.append("palette colors")
    if np.iscomplexobj(array):
        array = np.abs(array)
        steps.append("magnitude of complex values")
    if np.ma.is_masked(array):
        array = array.astype(np.result_type(array.dtype, np.float32)).filled(np.nan)
    array = np.ma.getdata(array)
    is_8_bit = array.dtype == np.uint8
    if is_8_bit and not spec:
        height, width = array.shape[1:]
        rgb = np.broadcast_to(array, (3, height, width)).transpose(1, 2, 0).copy()
        return Reading(PIL.Image.fromarray(rgb), None, area.note(f"{kind}, {dtype}", steps))
    spec = _or_default(spec, {} if is_8_bit else {"percentiles": PERCENTILES})
    _check_values(path, array)
    return Reading(array, spec, area.note(f"{kind}, {dtype}", steps + _described(spec)))


def _read_bands(
    source: rasterio.DatasetReader,
    bands: Sequence[int],
    area: Area,
    has_palette: bool,
) -> np.ndarray | np.ma.MaskedArray:
    """Read an area of some bands (indices from 0) at its reduced size; nodata is masked unless the values are 8-bit."""
    width, height = area.size
    reduced_width, reduced_height = area.reduced
    return source.read(
        [band + 1 for band in bands],
        out_shape=(len(bands), reduced_height, reduced_width),
        window=Window(area.left, area.top, width, height),
        resampling=Resampling.nearest if has_palette else Resampling.average,
        masked=source.dtypes[0] != "uint8",
    )


def _in_palette_colors(indices: np.ndarray, palette: dict[int, tuple]) -> np.ndarray:
    """Return the colors, of shape `(3, height, width)`, of indices into a palette."""
    colors = [palette.get(index, (0, 0, 0))[:3] for index in range(256)]
    return np.array(colors, dtype=np.uint8)[indices].transpose(2, 0, 1)


def _read_dicom(
    path: Path,
    max_side: int,
    input_spec: dict | None,
    window: Fractions | None,
    position: float,
) -> Reading:
    dataset = open_dicom(path, path.name)
    frames = number_of_frames(dataset)
    index = min(int(position / 100 * frames), frames - 1)
    frame = read_frame(dataset, path.name, index)
    steps = []
    if frames > 1:
        steps.append(f"frame {index + 1} of {frames}")
    if frame.has_palette:
        steps.append("palette colors")
    spec = _or_default(dict(input_spec or {}), frame.input_spec)
    steps += _described(spec)
    array = frame.values
    if frame.is_inverted:
        array = -array.astype(np.float64)
        spec = _mirrored(spec)
        steps.append("inverted (MONOCHROME1)")
    modality = dataset.get("Modality", dataset.PhotometricInterpretation)
    return _from_values(path, array, max_side, spec, window, f"DICOM, {modality}", steps)


def _read_volume(
    path: Path,
    max_side: int,
    input_spec: dict | None,
    window: Fractions | None,
    position: float,
) -> Reading:
    """Read an axial slice of a NIfTI volume, in radiological orientation (seen from the feet)."""
    volume = open_volume(path)
    count = volume.number("axial")
    index = min(int(position / 100 * count), count - 1)
    spec = _or_default(dict(input_spec or {}), {"percentiles": PERCENTILES})
    spec.pop("bands", None)
    kind = f"NIfTI, slice {index + 1} of {count}"
    values = volume.cut("axial", index)
    return _from_values(path, values, max_side, spec, window, kind, _described(spec))


def _from_values(
    path: Path,
    values: np.ndarray,
    max_side: int,
    spec: dict,
    window: Fractions | None,
    kind: str,
    steps: Sequence[str],
) -> Reading:
    """Cut and reduce values of shape `(height, width)` or `(height, width, bands)`."""
    height, width = values.shape[:2]
    area = Area.of(path, (width, height), window, max_side)
    area_width, area_height = area.size
    array = values[area.top : area.top + area_height, area.left : area.left + area_width]
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if area.reduced != area.size:
        reduced_width, reduced_height = area.reduced
        tensor = torch.from_numpy(array.astype(np.float64))
        array = F.adaptive_avg_pool2d(tensor, (reduced_height, reduced_width)).numpy()
    _check_values(path, array)
    return Reading(np.ascontiguousarray(array), spec, area.note(kind, steps))


def _bands_of(source: rasterio.DatasetReader, name: str) -> list[int]:
    """Return the indices, from 0, of red, green and blue, else of the first three bands or the first.

    The bands are recognized by GDAL's descriptions, such as `B4`, `SR_B4`, `B04 (665 nm)` or `Red`, by the file name if
    it lists all bands, such as `scene_B02_B03_B04_B08.tif`, or by their color interpretation.
    """
    descriptions = [description or "" for description in source.descriptions]
    color_words = [_color_word(description) for description in descriptions]
    described_numbers = [_band_number(description) for description in descriptions]
    numbers_in_name = [number.upper() for number in IN_A_NAME.findall(name)]
    interpretations = [interpretation.name for interpretation in source.colorinterp]
    tags = " ".join(source.tags().values())[:1000]
    numbers = LANDSAT_4_TO_7 if OLDER.search(f" {name} {tags}") else SENTINEL_2
    candidates = [(color_words, COLORS), (described_numbers, numbers)]
    if len(numbers_in_name) == source.count:
        candidates.append((numbers_in_name, numbers))
    candidates.append((interpretations, COLORS))
    for band_names, rgb_names in candidates:
        if all(band_names.count(rgb_name) == 1 for rgb_name in rgb_names):
            return [band_names.index(rgb_name) for rgb_name in rgb_names]
    return [0, 1, 2] if source.count >= 3 else [0]


def _color_word(description: str) -> str | None:
    """Return `red`, `green` or `blue` if a description begins or ends with the word, but not for `red edge`."""
    words = re.findall(r"[a-z]+", description.lower())
    if not words or "edge" in words:
        return None
    for word in (words[0], words[-1]):
        if word in COLORS:
            return word
    return None


def _band_number(description: str) -> str | None:
    """Return the number of a band, such as `B04`, `SR_B4` or `Band 4`, without leading zeros."""
    match = NUMBER.search(f" {description}")
    return None if match is None else match[1].upper()


def _or_default(spec: dict, default: dict) -> dict:
    """Return the spec, with the default window or percentiles if it has none."""
    if "window" in spec or "percentiles" in spec:
        return spec
    return {**spec, **default}


def _mirrored(spec: dict) -> dict:
    """Return the input spec that shows negated values as the inverted image."""
    mirrored = dict(spec)
    if "window" in spec:
        windows = InputSpec.from_dict(spec).windows
        mirrored["window"] = tuple((-high, -low) for low, high in windows)
    if "percentiles" in spec:
        mirrored["percentiles"] = tuple(100 - value for value in reversed(spec["percentiles"]))
    return mirrored


def _described(spec: dict) -> list[str]:
    """Return the steps of the conversion to 8 bits in words."""
    steps = []
    windows = InputSpec.from_dict(spec).windows if "window" in spec else None
    if windows:
        steps.append("window " + " and ".join(f"{low:g} to {high:g}" for low, high in windows))
    if "percentiles" in spec:
        low, high = spec["percentiles"]
        steps.append(f"percentiles {low:g} to {high:g}")
    if "gamma" in spec:
        steps.append(f"gamma {spec['gamma']:g}")
    return steps


def _check_values(path: Path, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).any():
        raise UnreadableImage(f"{path.name} has no valid value: all are nodata, padding, NaN or infinite.")
