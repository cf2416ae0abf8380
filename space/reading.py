"""Opens uploaded images: photographs, TIFF, GeoTIFF and JPEG 2000 of any depth and number of bands, DICOM and NIfTI.

The format of a file, except NIfTI, is detected from its content, not from its name. No file other than the upload is
read. Bands, levels, slice and window follow the controls of the page.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
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
PRESETS = {  # Hounsfield units that become black and white, by the usual centers and widths
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "soft tissue": (-160.0, 240.0),
    "brain": (0.0, 80.0),
}
COLORS = ("red", "green", "blue")
SENTINEL_2 = LANDSAT_8 = ("4", "3", "2")  # numbers of red, green and blue; the same for Landsat 9 and HLS
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
        part: size of the visible window, in percent of each side of the image.
        center_x, center_y: center of the visible window, in percent from the left and from the top.

    Raises:
        ValueError: if the bands are not one or three numbers, or the percentiles are not ascending.
    """

    position: float = 50.0
    preset: str = AS_STATED
    bands: str | None = ""
    low: float = PERCENTILES[0]
    high: float = PERCENTILES[1]
    part: float = 100.0
    center_x: float = 50.0
    center_y: float = 50.0

    def __post_init__(self):
        numbers = self.band_numbers
        if len(numbers) not in (0, 1, 3) or 0 in numbers or re.search(r"[^\d\s,;/-]", self.bands or ""):
            raise ValueError(f"Expected one or three band numbers from 1, such as 4, 3, 2, got {self.bands[:50]!r}.")
        if not self.low < self.high:
            raise ValueError(
                f"The percentile of black must be below that of white, got {self.low:g} and {self.high:g}."
            )

    @property
    def band_numbers(self) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", (self.bands or "")[:50])]

    @property
    def window(self) -> Fractions | None:
        """Left, top, right and bottom of the visible window, as fractions; `None` for the whole image."""
        if self.part >= 100:
            return None
        half = self.part / 200
        x, y = (min(max(at / 100, half), 1 - half) for at in (self.center_x, self.center_y))
        return x - half, y - half, x + half, y + half

    def spec(self, stated: dict | None) -> dict | None:
        """Return the fields of the input spec to read an image with, based on those of a model or a file."""
        spec = dict(stated or {})
        if self.preset != AS_STATED or (self.low, self.high) != PERCENTILES:
            spec = {key: value for key, value in spec.items() if key not in ("window", "percentiles")}
            is_stated = self.preset == AS_STATED
            spec |= {"percentiles": (self.low, self.high)} if is_stated else {"window": PRESETS[self.preset]}
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
        return PIL.Image.fromarray(in_colors(pixels, (self.input_spec or {}).get("band_names")))


def in_colors(pixels: np.ndarray, band_names: Sequence[str] | None) -> np.ndarray:
    """Convert the pixels of a model with these bands to an image for display, uint8 of shape `(height, width, 3)`."""
    return pixels if band_names is None else shown(torch.from_numpy(pixels).movedim(-1, 0), band_names)


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
    if is_volume(path):
        read = partial(_read_volume, position=position)
    elif is_dicom(head):
        read = partial(_read_dicom, position=position)
    elif head.startswith((*TIFF, *JPEG_2000)) or (head.startswith(PNG) and head[24:25] == b"\x10"):
        read = _read_raster
    else:
        read = _read_photograph
    try:
        return read(path, max_side, input_spec, window)
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


def _damage(path: Path, error: BaseException) -> UnreadableImage:
    """Return the error for a file that a decoder refuses."""
    reason = " ".join(str(error.__cause__ or error).replace(str(path), path.name).split())[:200]
    return UnreadableImage(
        f"{path.name} is damaged, incomplete or of an unsupported kind: {reason or type(error).__name__}"
    )


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
    def of(cls, path: Path, size: tuple[int, int], window: Fractions | None, max_side: int) -> "Area":
        """Return the area of a window in an image of a width and height. Raise [`UnreadableImage`] if it is empty."""
        if not all(size):
            raise UnreadableImage(f"{path.name} is empty: {size[0]} × {size[1]} pixels.")
        left, top, right, bottom = window or (0, 0, 1, 1)
        x, y = min(int(left * size[0]), size[0] - 1), min(int(top * size[1]), size[1] - 1)
        width, height = max(1, round(right * size[0]) - x), max(1, round(bottom * size[1]) - y)
        scale = min(1.0, max_side / max(width, height))
        reduced = max(1, round(scale * width)), max(1, round(scale * height))
        return cls(x, y, (width, height), reduced, window is not None)

    def note(self, kind: str, *done: str) -> str:
        """Describe how the area was read."""
        note = f"{kind}, {self.size[0]} × {self.size[1]} pixels"
        if self.reduced != self.size:
            note += f", reduced to {self.reduced[0]} × {self.reduced[1]}"
        window = [f"window from {self.left}, {self.top}"] if self.is_part else []
        return ", ".join([note, *window, *done])


def open_photograph(path: Path) -> PIL.Image.Image:
    """Open a photograph of 8 bits, without the decoders of Pillow for other formats, which a visitor might attack."""
    PIL.Image.init()
    return PIL.Image.open(path, formats=[name for name in PHOTOGRAPHS if name in PIL.Image.OPEN])


def _read_photograph(path: Path, max_side: int, input_spec: dict | None, window: Fractions | None) -> Reading:
    with open_photograph(path) as image:
        kind, size = f"{image.format}, {image.mode}", image.size
        if window is None:
            image.thumbnail(Area.of(path, size, window, max_side).reduced)
        is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 4
        area = Area.of(path, size[::-1] if is_turned else size, window, max_side)
        photograph = upright(image)
    if window is not None:
        photograph = photograph.crop((area.left, area.top, area.left + area.size[0], area.top + area.size[1]))
    photograph.thumbnail(area.reduced)
    return Reading(photograph, input_spec, area.note(kind))


def _read_raster(path: Path, max_side: int, input_spec: dict | None, window: Fractions | None) -> Reading:
    spec = dict(input_spec or {})
    with open_raster_alone(path) as source:
        driver = source.driver
        area = Area.of(path, (source.width, source.height), window, max_side)
        count, dtype = source.count, source.dtypes[0]
        named = spec.pop("bands", None) or _bands_of(source, path.stem)
        bands = list(range(count)) if "band_names" in spec else list(named)
        if max(bands) >= count:
            raise UnreadableImage(
                f"{path.name} has {count} band(s), but the input spec asks for band {max(bands) + 1}."
            )
        palette = source.colormap(1) if source.colorinterp[0] == ColorInterp.palette else None
        array = source.read(
            [band + 1 for band in bands],
            out_shape=(len(bands), *area.reduced[::-1]),
            window=Window(area.left, area.top, *area.size),
            resampling=Resampling.nearest if palette else Resampling.average,
            masked=dtype != "uint8",
        )
    done = []
    if count > 1:
        done.append(f"band{'s' * (len(bands) > 1)} {', '.join(str(band + 1) for band in bands)} of {count}")
    if palette:
        colors = np.array([palette.get(index, (0, 0, 0))[:3] for index in range(256)], dtype=np.uint8)
        array = colors[array[0]].transpose(2, 0, 1)
        done.append("palette colors")
    if np.iscomplexobj(array):
        array = np.abs(array)
        done.append("magnitude of complex values")
    if np.ma.is_masked(array):
        array = array.astype(np.result_type(array.dtype, np.float32)).filled(np.nan)
    array, kind = np.ma.getdata(array), {"GTiff": "TIFF", "JP2OpenJPEG": "JPEG 2000"}.get(driver, driver)
    if array.dtype == np.uint8 and not spec:
        image = PIL.Image.fromarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0).copy())
        return Reading(image, None, area.note(f"{kind}, {dtype}", *done))
    spec = _or_default(spec, {} if array.dtype == np.uint8 else {"percentiles": PERCENTILES})
    _check_values(path, array)
    return Reading(array, spec, area.note(f"{kind}, {dtype}", *done, *_described(spec)))


def _read_dicom(
    path: Path, max_side: int, input_spec: dict | None, window: Fractions | None, position: float
) -> Reading:
    dataset = open_dicom(path, path.name)
    frames = number_of_frames(dataset)
    index = min(int(position / 100 * frames), frames - 1)
    frame = read_frame(dataset, path.name, index)
    done = [f"frame {index + 1} of {frames}"] if frames > 1 else []
    done += ["palette colors"] if frame.has_palette else []
    spec, array = _or_default(dict(input_spec or {}), frame.input_spec), frame.values
    done += _described(spec)
    if frame.is_inverted:
        array, spec = -array.astype(np.float64), _mirrored(spec)
        done.append("inverted (MONOCHROME1)")
    modality = dataset.get("Modality", dataset.PhotometricInterpretation)
    return _from_values(path, array, max_side, spec, window, f"DICOM, {modality}", done)


def _read_volume(
    path: Path, max_side: int, input_spec: dict | None, window: Fractions | None, position: float
) -> Reading:
    """Read an axial slice of a NIfTI volume, in radiological orientation (seen from the feet)."""
    volume = open_volume(path)
    count = volume.number("axial")
    index = min(int(position / 100 * count), count - 1)
    spec = _or_default(dict(input_spec or {}), {"percentiles": PERCENTILES})
    spec.pop("bands", None)
    kind = f"NIfTI, slice {index + 1} of {count}"
    return _from_values(path, volume.cut("axial", index), max_side, spec, window, kind, _described(spec))


def _from_values(
    path: Path,
    values: np.ndarray,
    max_side: int,
    spec: dict,
    window: Fractions | None,
    kind: str,
    done: Sequence[str],
) -> Reading:
    """Cut and reduce values of shape `(height, width)` or `(height, width, bands)`."""
    area = Area.of(path, values.shape[1::-1], window, max_side)
    array = values[area.top : area.top + area.size[1], area.left : area.left + area.size[0]]
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if area.reduced != area.size:
        array = F.adaptive_avg_pool2d(torch.from_numpy(array.astype(np.float64)), area.reduced[::-1]).numpy()
    _check_values(path, array)
    return Reading(np.ascontiguousarray(array), spec, area.note(kind, *done))


def _bands_of(source: rasterio.DatasetReader, name: str) -> list[int]:
    """Return the indices, from 0, of red, green and blue, else of the first three bands or the first.

    The bands are recognized by GDAL's descriptions, such as `B4`, `SR_B4`, `B04 (665 nm)` or `Red`, by the file name if
    it lists all bands, such as `scene_B02_B03_B04_B08.tif`, or by their color interpretation.
    """
    descriptions = [description or "" for description in source.descriptions]
    tags = " ".join(source.tags().values())[:1000]
    numbers = LANDSAT_4_TO_7 if OLDER.search(f" {name} {tags}") else SENTINEL_2
    in_name = [number.upper() for number in IN_A_NAME.findall(name)]
    found = (
        _indices(map(_color_word, descriptions), COLORS)
        or _indices(map(_band_number, descriptions), numbers)
        or (_indices(in_name, numbers) if len(in_name) == source.count else None)
        or _indices((interpretation.name for interpretation in source.colorinterp), COLORS)
    )
    return found or ([0, 1, 2] if source.count >= 3 else [0])


def _indices(names: Iterable[str | None], wanted: Sequence[str]) -> list[int] | None:
    """Return the index of each wanted name, or `None` unless each occurs once."""
    names = list(names)
    return [names.index(name) for name in wanted] if all(names.count(name) == 1 for name in wanted) else None


def _color_word(description: str) -> str | None:
    """Return `red`, `green` or `blue` if a description begins or ends with the word, but not for `red edge`."""
    words = re.findall(r"[a-z]+", description.lower())
    return next((words[index] for index in (0, -1) if words and words[index] in COLORS and "edge" not in words), None)


def _band_number(description: str) -> str | None:
    """Return the number of a band, such as `B04`, `SR_B4` or `Band 4`, without leading zeros."""
    found = NUMBER.search(f" {description}")
    return found and found[1].upper()


def _or_default(spec: dict, default: dict) -> dict:
    """Return the spec, with the default window or percentiles if it has none."""
    return spec if {"window", "percentiles"} & set(spec) else {**spec, **default}


def _mirrored(spec: dict) -> dict:
    """Return the input spec that shows negated values as the inverted image."""
    mirrored = dict(spec)
    if "window" in spec:
        mirrored["window"] = tuple((-high, -low) for low, high in InputSpec.from_dict(spec).windows)
    if "percentiles" in spec:
        mirrored["percentiles"] = tuple(100 - value for value in reversed(spec["percentiles"]))
    return mirrored


def _described(spec: dict) -> list[str]:
    windows = InputSpec.from_dict(spec).windows if "window" in spec else ()
    words = ["window " + " and ".join(f"{low:g} to {high:g}" for low, high in windows)] if windows else []
    words += ["percentiles {:g} to {:g}".format(*spec["percentiles"])] if "percentiles" in spec else []
    return words + ([f"gamma {spec['gamma']:g}"] if "gamma" in spec else [])


def _check_values(path: Path, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).any():
        raise UnreadableImage(f"{path.name} has no valid value: all are nodata, padding, NaN or infinite.")
