"""Finds the red, green and blue bands of a satellite image by band descriptions or by the file name."""

import re
from collections.abc import Sequence
from pathlib import Path

import rasterio
from rasterio.errors import RasterioError

from modeling_vitp.images.reading import TIFF

WORDS = ("red", "green", "blue")
SENTINEL_2 = LANDSAT_8 = ("4", "3", "2")  # numbers of red, green and blue; the same for Landsat 9 and HLS
LANDSAT_4_TO_7 = ("3", "2", "1")
OLDER = re.compile(r"(?:^|[^A-Z0-9])(?:L[ETM]0?[457]|LANDSAT[ _-]?[457])", re.IGNORECASE)
NUMBER = re.compile(r"(?:^|[^A-Z0-9])(?:SR_|ST_|TOA_|BAND[ _-]?)?B?0?(\d{1,2}A?)(?![A-Z0-9])", re.IGNORECASE)
IN_A_NAME = re.compile(r"(?<![A-Z0-9])B0?(\d{1,2}A?)(?![A-Z0-9])", re.IGNORECASE)


def rgb_bands(path: str | Path) -> list[int] | None:
    """Return the indices, from 0, of red, green and blue in a GeoTIFF of more than three bands.

    Band names are read from GDAL's descriptions, such as `B4`, `SR_B4`, `B04 (665 nm)` or `Red`, or from the file name
    if it lists all bands, such as `scene_B02_B03_B04_B08.tif`. The result is `None` if the bands are not named.
    """
    with open(path, "rb") as file:
        if file.read(4) not in TIFF:
            return None
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path, driver="GTiff") as source:
            descriptions, tags = [name or "" for name in source.descriptions], " ".join(source.tags().values())
    except RasterioError:
        return None
    if len(descriptions) <= 3:
        return None
    stem = Path(path).stem
    numbers = LANDSAT_4_TO_7 if OLDER.search(f" {stem} {tags[:1000]}") else SENTINEL_2
    listed = IN_A_NAME.findall(stem)
    return (
        indices_of([word_of(name) for name in descriptions], WORDS)
        or indices_of([number_of(name) for name in descriptions], numbers)
        or (indices_of([name.upper() for name in listed], numbers) if len(listed) == len(descriptions) else None)
    )


def indices_of(names: Sequence[str | None], wanted: Sequence[str]) -> list[int] | None:
    """Return the index of each wanted name, or `None` unless each name occurs exactly once."""
    return [names.index(name) for name in wanted] if all(names.count(name) == 1 for name in wanted) else None


def word_of(description: str) -> str | None:
    """Return `red`, `green` or `blue` if a description begins or ends with the word, but not for `red edge`."""
    words = re.findall(r"[a-z]+", description.lower())
    return next((words[index] for index in (0, -1) if words and words[index] in WORDS and "edge" not in words), None)


def number_of(description: str) -> str | None:
    """Return the number of a band, such as `B04`, `SR_B4` or `Band 4`, without leading zeros."""
    found = NUMBER.search(f" {description}")
    return found[1].upper() if found else None
