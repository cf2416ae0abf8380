"""Limits on the memory of an image file, estimated from its header before it is decoded."""

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

from modeling_vitp.images.reading import PNG, TIFF

JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ")  # first bytes of a JP2 file and of a bare codestream


def check_header(path: Path) -> None:
    """Raise `UnreadableImage` if an image would take more memory than `limits` allow.

    Files that are not images pass this check and are refused by the reader.
    """
    if is_volume(path):
        _check_volume(path)
        return
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":  # The 128 bytes before are arbitrary and may look like a TIFF.
        _check_deflated(path)
    elif head[:4] in TIFF:
        _check_blocks(path)
    elif head.startswith(JPEG_2000):
        _check_bands(path)
    else:
        is_deep = head.startswith(PNG) and head[24:26] in (b"\x10\4", b"\x10\6")  # 16 bits with transparency
        _check_pixels(path, limits.DEEP_PIXELS if is_deep else limits.SOURCE_PIXELS)


def _check_pixels(path: Path, limit: int) -> None:
    try:
        with PIL.Image.open(path) as image:
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return
    if width * height > limit:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels in {frames} frame(s). At most "
            f"{limit // 10**6} million can be opened as {image.format}. Reduce the image or save it as "
            "a tiled GeoTIFF."
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
            f"{path.name} is stored in blocks of {height:,} × {width:,} pixels, {size / 1e6:,.0f} MB each. At most "
            f"{limits.BLOCK_BYTES / 1e6:.0f} MB can be opened. Save it in tiles."
        )


def _check_bands(path: Path) -> None:
    """Check a JPEG 2000, of which all bands are decoded even if only some are read."""
    try:
        options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
        with rasterio.Env(**options), rasterio.open(path, driver="JP2OpenJPEG") as source:
            width, height, bands = source.width, source.height, source.count
    except RasterioError:
        return
    if 4 * width * height * bands > limits.JPEG_2000_BYTES or bands > 4:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels in {bands} band(s), too many for a JPEG 2000. Save it as a "
            "tiled GeoTIFF."
        )


def _bytes(dtype: str) -> int:
    return int("".join(filter(str.isdigit, dtype)) or 128) // 8


def _check_volume(path: Path) -> None:
    try:
        if _nifti_offset(path) > limits.NIFTI_HEADER_BYTES:
            raise UnreadableImage(
                f"{path.name} has more than {limits.NIFTI_HEADER_BYTES / 1e6:g} MB before its values. Save it without "
                "header extensions."
            )
        image = nibabel.load(path)
        size = math.prod(image.shape) * image.get_data_dtype().itemsize
        if path.suffix.lower() == ".gz" and size <= limits.VOLUME_BYTES:
            with gzip.open(path) as file:
                chunks = iter(lambda: file.read(1 << 20), b"")  # one MiB each
                size = max(size, sum(map(len, itertools.islice(chunks, 1 + (limits.VOLUME_BYTES >> 20)))))
    except UnreadableImage:
        raise
    except Exception:  # nibabel raises many kinds of errors for a broken file. The reader reports them.
        return
    if size > limits.VOLUME_BYTES:
        raise UnreadableImage(
            f"{path.name} has {size / 1e6:,.0f} MB when unpacked, more than {limits.VOLUME_BYTES / 1e6:.0f} MB."
        )


def _nifti_offset(path: Path) -> float:
    """Return the offset of the values in a NIfTI file, up to which nibabel reads the whole header."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(540)
    for order in "<>":
        for size, place, kind in ((348, 108, "f"), (540, 168, "q")):  # NIfTI-1, and 2
            if struct.unpack_from(f"{order}i", head)[0] == size:
                return struct.unpack_from(f"{order}{kind}", head, place)[0]
    return 0


def _check_deflated(path: Path) -> None:
    """Measure a deflated DICOM data set by inflating it in chunks that are not kept."""
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
            f"{path.name} has more than {limits.BLOCK_BYTES / 1e6:.0f} MB when inflated. Save it uncompressed."
        )
