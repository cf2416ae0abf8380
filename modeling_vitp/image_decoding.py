"""Opening of image files: with Pillow for 8 bits, with one GDAL driver for more bits or bands.

Training, the Space and the image processor that travels with a model share this file. It does not import torch, and
rasterio only when an image needs it.
"""

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

if TYPE_CHECKING:  # input_spec imports torch, which would slow down `--help`.
    from .input_spec import InputSpec

NEEDS_RASTERIO = "multi-band images and color images of more than 8 bits need rasterio: pip install rasterio"

# First bytes of files by format.
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG = b"\xff\xd8\xff"
JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")  # File with boxes, and raw code stream.
# GDAL drivers of single images by these bytes, without WebP, whose bytes enclose the size of the file.
DRIVERS = {"GTiff": TIFF, "PNG": PNG, "JPEG": JPEG, "JP2OpenJPEG": JPEG_2000, "GIF": b"GIF8", "BMP": b"BM"}
SIDECARS = (".ovr", ".msk", ".OVR", ".MSK")  # Suffixes of overviews and masks that GDAL opens beside an image.

# Modes that Pillow converts to RGB without losing range; its other modes ("I;16", "I", "F" …) have more than 8 bits.
PIL_8BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an 8-bit image to RGB, with transparency composited onto white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend a color of unsigned integers with white, by an opacity of the same type."""
    white = np.iinfo(color.dtype).max
    share = alpha.astype(np.float64) / white
    return (color * share + white * (1 - share)).round().astype(color.dtype)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, and raise a `ValueError` for a pipe or a device, which has no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a pipe or a device, expected a file")
    return path.open("rb")


def read_header(file: BinaryIO) -> tuple[int, int, int]:
    """Return stored height, width and orientation, from 1 (upright) to 8, of an open image other than DICOM."""
    head = file.read(4)
    file.seek(0)
    if head in TIFF:
        tags = tiff_tags(file)
        return int(tags[257]), int(tags[256]), orientation_of(tags)
    with PIL.Image.open(file) as image:  # getexif of the base class, because that of PNG decodes the image.
        return image.height, image.width, orientation_of(PIL.Image.Image.getexif(image))


def tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    """Return the first directory of an open TIFF."""
    header = file.read(8)
    if header[2:3] == b"+" or header[3:4] == b"+":  # BigTIFF has a longer header.
        header += file.read(8)
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags


def orientation_of(tags) -> int:
    """Return the orientation in EXIF or TIFF tags, from 1 (upright) to 8."""
    orientation = tags.get(PIL.ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decode an opened image, and rotate it by its EXIF orientation."""
    image.load()
    if image.getexif().get(PIL.ExifTags.Base.Orientation) is None:
        return image
    return PIL.ImageOps.exif_transpose(image)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an array of shape `(height, width[, bands])` in upright orientation."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    pixels = np.rot90(pixels, {3: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0))
    if orientation == 2:
        pixels = np.fliplr(pixels)
    elif orientation == 4:
        pixels = np.flipud(pixels)
    return np.ascontiguousarray(pixels)


def raster_driver(head: bytes) -> str:
    """Return the GDAL driver for the first 12 bytes of a file.

    A file that is opened by this driver alone reads no other file and asks no server, unlike a VRT.

    Raises:
        OSError: if the file is not a TIFF, PNG, JPEG, JPEG 2000, WebP, GIF or BMP.
    """
    for driver, signature in DRIVERS.items():
        if head.startswith(signature):
            return driver
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return "WEBP"
    raise OSError(
        f"expected a TIFF, PNG, JPEG, JPEG 2000, WebP, GIF or BMP, got a file that begins with {head!r}. Convert it "
        "with gdal_translate"
    )


def import_rasterio() -> ModuleType:
    """Return rasterio, which is not a requirement of the model that this file travels with."""
    try:
        import rasterio
    except ImportError:
        raise ValueError(NEEDS_RASTERIO) from None
    return rasterio


def sidecars_of(path: Path) -> list[Path]:
    """Return the existing files of overviews and masks that GDAL opens beside an image."""
    sidecars = []
    for suffix in SIDECARS:
        sidecar = Path(f"{path}{suffix}")
        if sidecar.exists():
            sidecars.append(sidecar)
    return sidecars


@contextmanager
def open_raster(source: Path | bytes, with_sidecars: bool = True) -> Iterator["rasterio.DatasetReader"]:  # noqa: F821
    """Open a file or its content with GDAL, without the warning about a missing georeference.

    Args:
        source: path or content of the file.
        with_sidecars: whether GDAL may open overviews, masks and metadata in files beside the file.

    Raises:
        ValueError: if rasterio is not installed, or the file is not an image or names another file as its overview.
        OSError: if the content is not an image.
    """
    is_content = isinstance(source, bytes)
    with ExitStack() as stack:
        try:
            with io.BytesIO(source) if is_content else open_file(source) as file:
                driver = raster_driver(file.read(12))
            rasterio = import_rasterio()
            if not with_sidecars:
                stack.enter_context(rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            if is_content:
                memory = stack.enter_context(rasterio.MemoryFile(source))
                dataset = stack.enter_context(memory.open(driver=driver))
            else:
                dataset = stack.enter_context(rasterio.open(source, driver=driver))
            if dataset.tags(ns="OVERVIEWS"):
                raise ValueError("its metadata names another file as its overview")
            if with_sidecars and not is_content:
                for sidecar in sidecars_of(source):
                    stack.enter_context(open_raster(sidecar))
        except (OSError, ValueError) as error:
            if is_content:
                raise
            raise ValueError(f"{source} cannot be read: {error}") from error
        yield dataset


def decode_image(content: bytes, spec: "InputSpec") -> PIL.Image.Image | np.ndarray:
    """Decode an image for a processor: upright, as a Pillow image, or as an array if Pillow would lose bits or bands.

    For a spec with band names, the bands of any format are returned as they are stored.

    Returns:
        Pillow image, or array of shape `(bands, height, width)`.

    Raises:
        ValueError: if the image has other bands than the spec, or needs rasterio, which is not installed.
        Exception: if the content is broken. The type depends on the decoder.
    """
    if spec.band_names is not None:
        return decode_bands(content, spec)
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            if not is_reduced(image, spec.bands is not None):
                return upright(image)
    except PIL.UnidentifiedImageError:
        try:
            return decode_bands(content, spec)
        except OSError:
            raise PIL.UnidentifiedImageError("cannot identify image file") from None
    return decode_bands(content, spec)


def decode_bands(content: bytes, spec: "InputSpec") -> np.ndarray:
    """Decode all bands with rasterio, upright, of shape `(bands, height, width)`.

    Transparency of a PNG becomes white, unless the spec has band names.
    """
    with open_raster(content) as file:
        has_alpha = spec.band_names is None and file.driver == "PNG" and file.count in (2, 4)
        spec.check_number(file.count - has_alpha)
        bands = file.read()
    if has_alpha:
        bands = over_white(bands[:-1], bands[-1:])
    if content.startswith(JPEG_2000):  # The format has no orientation.
        return bands
    orientation = read_header(io.BytesIO(content))[2]
    return turn(bands.transpose(1, 2, 0), orientation).transpose(2, 0, 1)


def is_reduced(image: PIL.Image.Image, bands: bool) -> bool:
    """Return whether Pillow would lose bits of an opened file or, if `bands` is set, some of its bands."""
    if image.format == "JPEG2000":
        position = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(position)
        return is_reduced_jpeg_2000(content, bands)
    if image.format == "TIFF":
        depth = max(image.tag_v2.get(258, (1,)))
        number = image.tag_v2.get(277, 1)
        is_unsigned = set(image.tag_v2.get(339, (1,))) == {1}
        if image.mode in PIL_8BIT_MODES and (depth > 8 or not is_unsigned):
            return True
        if image.mode == "I" and is_unsigned:  # Pillow reads 32 bits as signed.
            return True
        return number != len(image.getbands()) or (bands and number not in (1, 3))
    return image.format == "PNG" and image.mode in PIL_8BIT_MODES and ";16" in image.tile[0].args


def is_reduced_jpeg_2000(content: bytes, bands: bool) -> bool:
    """Return the same for JPEG 2000, by its SIZ marker (ISO/IEC 15444-1, A.5.1).

    Three bands that are marked as gray, as GDAL marks bands without color, are not decoded by Pillow.
    """
    header = content.partition(b"\xff\x4f\xff\x51")[2][36:39]  # Number of bands; bits of the first band minus one.
    number = int.from_bytes(header[:2], "big")
    is_deep = len(header) > 2 and header[2] & 0x7F >= 8
    is_gray = b"colr\1\0\0\0\0\0\x11" in content
    return is_deep or (number == 3 and is_gray) or (bands and number not in (0, 1, 3))
