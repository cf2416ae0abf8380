"""Generated pictures for tests."""

import warnings
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
