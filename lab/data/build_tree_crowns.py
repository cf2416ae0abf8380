"""Build tiles of aerial images with boxes of tree crowns, in COCO layout, from the wheel `deepforest`.

    python -m lab.data.build_tree_crowns [--output_dir data/tree_crowns]

The wheel `deepforest` 2.1.0 (MIT) contains images of the National Ecological Observatory Network. A model is trained
on one scene, and tested on unseen ground of this scene and on three other scenes:

    yellowstone/train     big Yellowstone scene, x < 1289 and y < 1832
    yellowstone/val       x < 1289 and y >= 1960, to choose settings
    yellowstone/test      x >= 1609
    yellowstone_2/test    another Yellowstone scene
    osbs_029/test         a scene in Florida
    soap_061/test         a scene in California

Each folder is cut into tiles without overlap. A tile has the boxes whose centers lie in it, cut at its border.
"""

import argparse
import zipfile
from pathlib import Path

from lab.data.build_aerial_trees import BIG_SCENE, GAP, SECOND_SCENE, SMALL_SCENES, TEST_START, cut, read_scene
from lab.data.build_sample import write_coco
from lab.data.wheels import open_wheel, read_license
from modeling_vitp.data.boxes import Box

REQUIREMENT = "deepforest==2.1.0"
TILE = 200  # in pixels; the small scenes have 400 x 400
TRAIN_RIGHT = TEST_START - GAP
TRAIN_BOTTOM = 1832
VAL_TOP = 1960


def home_areas(width: int, height: int) -> dict[str, Box]:
    """Return the area of each split in the big scene: left, top, right and bottom in pixels."""
    return {
        "train": (0, 0, TRAIN_RIGHT, TRAIN_BOTTOM),
        "val": (0, VAL_TOP, TRAIN_RIGHT, height),
        "test": (TEST_START, 0, width, height),
    }


def whole_tiles(area: Box, tile: int) -> Box:
    """Return the part of an area from its top left corner that consists of whole tiles."""
    left, top, right, bottom = area
    num_columns = (right - left) // tile
    num_rows = (bottom - top) // tile
    return left, top, left + num_columns * tile, top + num_rows * tile


def build(wheel: zipfile.ZipFile, tile: int) -> dict[str, list[dict]]:
    """Return the rows of each folder, see [`~lab.data.build_aerial_trees.cut`]."""
    folders = {}
    image, boxes = read_scene(wheel, BIG_SCENE)
    for split, area in home_areas(image.width, image.height).items():
        tiled_area = whole_tiles(area, tile)
        folders[f"yellowstone/{split}"] = cut(
            image, boxes, scene="yellowstone", area=tiled_area, size=tile, stride=tile
        )
    other_scenes = {"yellowstone_2": SECOND_SCENE}
    for name in SMALL_SCENES:
        other_scenes[name.lower()] = name
    for site, name in other_scenes.items():
        image, boxes = read_scene(wheel, name)
        width, height = image.size
        tiled_area = whole_tiles((0, 0, width, height), tile)
        folders[f"{site}/test"] = cut(image, boxes, scene=site, area=tiled_area, size=tile, stride=tile)
    return folders


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of deepforest 2.1.0. Default: download with pip.")
    parser.add_argument("--tile", type=int, default=TILE, help="Side of a tile in pixels.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/tree_crowns"))
    args = parser.parse_args(argv)
    with open_wheel(REQUIREMENT, args.wheel) as wheel:
        folders = build(wheel, args.tile)
        license_text = read_license(wheel)
    for folder, rows in folders.items():
        num_boxes = write_coco(rows, args.output_dir / folder, f"Tree crowns in aerial images, {folder}")
        print(f"{folder}: {len(rows)} tiles, {num_boxes} boxes")
    (args.output_dir / "LICENSE").write_bytes(license_text)


if __name__ == "__main__":
    main()
