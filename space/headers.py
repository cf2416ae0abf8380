"""What the header of an image file says it will take, before any of it is decoded."""

import gzip
import itertools
import math
import struct
import zlib
from pathlib import Path

import limits
import nibabel
import PIL.Image
import pydicom
import rasterio
from adjusting import is_volume
from pydicom.uid import DeflatedExplicitVRLittleEndian
from rasterio.errors import RasterioError
from reading import UnreadableImage

from modeling_vitp.images.reading import TIFF

JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ")  # how a file, and a codestream without one, begin


def check_header(path: Path) -> None:
    """Raises `UnreadableImage` if an image would take more memory than `limits` allow.

    What is no image at all is left to the reader to tell.
    """
    if is_volume(path):
        _check_volume(path)
        return
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":  # before which there may be anything, a TIFF's beginning too
        _check_deflated(path)
    elif head[:4] in TIFF:
        _check_blocks(path)
    elif head.startswith(JPEG_2000):
        _check_bands(path)
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


def _check_bands(path: Path) -> None:
    """Of a JPEG 2000, of which all are decoded, whichever are read."""
    try:
        options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
        with rasterio.Env(**options), rasterio.open(path, driver="JP2OpenJPEG") as source:
            width, height, bands = source.width, source.height, source.count
    except RasterioError:
        return
    if 4 * width * height * bands > limits.JPEG_2000_BYTES or bands > 4:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels in {bands} band(s), too much for a JPEG 2000: save it as a "
            "tiled GeoTIFF."
        )


def _bytes(dtype: str) -> int:
    return int("".join(filter(str.isdigit, dtype)) or 128) // 8


def _check_volume(path: Path) -> None:
    try:
        if _nifti_offset(path) > limits.NIFTI_HEADER_BYTES:
            raise UnreadableImage(
                f"{path.name} has more than {limits.NIFTI_HEADER_BYTES / 1e6:g} MB before its values: save it without "
                "header extensions."
            )
        image = nibabel.load(path)
        size = math.prod(image.shape) * image.get_data_dtype().itemsize
        if path.suffix.lower() == ".gz" and size <= limits.VOLUME_BYTES:
            with gzip.open(path) as file:
                pieces = iter(lambda: file.read(1 << 20), b"")  # a megabyte each, counted and not kept
                size = max(size, sum(map(len, itertools.islice(pieces, 1 + (limits.VOLUME_BYTES >> 20)))))
    except UnreadableImage:
        raise
    except Exception:  # nibabel raises many kinds for a broken file; the reader tells
        return
    if size > limits.VOLUME_BYTES:
        raise UnreadableImage(
            f"{path.name} would be {size / 1e6:,.0f} MB unpacked; {limits.VOLUME_BYTES / 1e6:.0f} MB are the most."
        )


def _nifti_offset(path: Path) -> float:
    """Where the values of a volume begin, as the first bytes of its file say; nibabel reads what is before them."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(540)
    for order in "<>":
        for size, place, kind in ((348, 108, "f"), (540, 168, "q")):  # NIfTI-1, and 2
            if struct.unpack_from(f"{order}i", head)[0] == size:
                return struct.unpack_from(f"{order}{kind}", head, place)[0]
    return 0


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
