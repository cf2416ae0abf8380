"""Generated pictures for tests."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a random RGB image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_bands(path: Path, bands: np.ndarray, **profile) -> Path:
    """Write bands of shape `(bands, height, width)` as GeoTIFF, or as PNG by the file name."""
    count, height, width = bands.shape
    driver = "PNG" if path.suffix == ".png" else "GTiff"
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver=driver, count=count, height=height, width=width, dtype=bands.dtype, **profile
        ) as file:
            file.write(bands)
    return path


def png_file(width: int, height: int, depth: int = 8, color: int = 2, num_bytes: int = 1000) -> bytes:
    """Return a PNG whose header has this size, bit depth and color type, with zeros as data, usually too few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(bytes(num_bytes))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
