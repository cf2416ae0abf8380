"""What the header of an image file says it will take, before any of it is decoded."""

import zlib
from pathlib import Path

import limits
import PIL.Image
import pydicom
import rasterio
from pydicom.uid import DeflatedExplicitVRLittleEndian
from rasterio.errors import RasterioError
from reading import UnreadableImage

from modeling_vitp.images.reading import TIFF


def check_header(path: Path) -> None:
    """Raises `UnreadableImage` if an image would take more memory than `limits` allow.

    What is no image at all is left to the reader to tell.
    """
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":  # before which there may be anything, a TIFF's beginning too
        _check_deflated(path)
    elif head[:4] in TIFF:
        _check_blocks(path)
    else:
        _check_pixels(path)


def _check_pixels(path: Path) -> None:
    try:
        with PIL.Image.open(path) as image:
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return
    if width * height > limits.SOURCE_PIXELS:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels, {frames} time(s). At most "
            f"{limits.SOURCE_PIXELS // 10**6} million can be opened as {image.format}: reduce it, or save it as a "
            "tiled GeoTIFF."
        )


def _check_blocks(path: Path) -> None:
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path, driver="GTiff") as source:
            height, width = map(max, zip(*source.block_shapes))
            bands = source.count if source.interleaving and source.interleaving.name == "pixel" else 1
            size = height * width * bands * max(_bytes(dtype) for dtype in source.dtypes)
    except RasterioError:
        return
    if size > limits.BLOCK_BYTES:
        raise UnreadableImage(
            f"{path.name} is stored in pieces of {height:,} × {width:,} pixels, {size / 1e6:,.0f} MB at once; at most "
            f"{limits.BLOCK_BYTES / 1e6:.0f} MB can be opened: save it in tiles."
        )


def _bytes(dtype: str) -> int:
    return int("".join(filter(str.isdigit, dtype)) or 128) // 8


def _check_deflated(path: Path) -> None:
    """Of a data set that is compressed as a whole, counts what it will be without keeping it."""
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
    except (OSError, ValueError, AttributeError, KeyError, EOFError, pydicom.errors.InvalidDicomError):
        return
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as file:
        file.seek(132 + 12 + meta.get("FileMetaInformationGroupLength", 0))
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        data = file.read()
    while data and not inflate.eof and size <= limits.BLOCK_BYTES:
        size += len(inflate.decompress(data, 1 << 20))
        data = inflate.unconsumed_tail
    if size > limits.BLOCK_BYTES:
        raise UnreadableImage(
            f"{path.name} grows to more than {limits.BLOCK_BYTES / 1e6:.0f} MB when inflated: save it uncompressed."
        )
