"""Crops of `recipes/data/aerial_trees` by how dense trees stand, for `recipes/configs/aerial_trees_density.yaml`.

    python recipes/data/build_tree_classes.py [--output_dir data/aerial_trees_density]

A class is a range of the number of trees that have their centres in a crop; the four ranges are about quarters of the
crops to train on. The splits are folders with a folder for each class:

    train         crops of the training ground that end above `HELD_OUT` of the big scene, or are of the small scenes
    val           crops of the training ground that begin there, to choose settings by
    test          ground of the same scene, 320 pixels away from any of these
    second_scene  another scene
"""

import argparse
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset
from PIL import Image

from modeling_vitp.images.reading import window_starts
from modeling_vitp.instructions.boxes import Box
from modeling_vitp.recipes.data.build_tree_masks import SAMPLE, places

MOST = (1, 4, 7)  # trees in a crop of the first class, the second and the third
CLASSES = ("0 to 1", "2 to 4", "5 to 7", "8 and more")
CROP, STRIDE = 224, 96
SCENE, HELD_OUT = "yellowstone", 1960


def class_of(trees: int) -> str:
    return CLASSES[bisect_left(MOST, trees)]


def crops(rows: Dataset) -> Iterator[tuple[str, Box, Image.Image, int]]:
    """The scene of each crop, its left, top, right and bottom there, its pixels and the number of its trees."""
    for row, (scene, (left, top, right, bottom)) in zip(rows, places(rows)):
        centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in row["boxes"]]
        for y in window_starts(bottom - top, CROP, STRIDE):
            for x in window_starts(right - left, CROP, STRIDE):
                trees = sum(x <= one < x + CROP and y <= other < y + CROP for one, other in centres)
                place = (left + x, top + y, left + x + CROP, top + y + CROP)
                yield scene, place, row["image"].crop((x, y, x + CROP, y + CROP)), trees


def split_of(scene: str, place: Box) -> str | None:
    """The split of a crop of the training ground; those that lie in both parts are in none."""
    if scene != SCENE or place[3] <= HELD_OUT:
        return "train"
    return "val" if place[1] >= HELD_OUT else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/aerial_trees_density"))
    args = parser.parse_args(argv)
    counts = Counter()
    for name, rows in load_dataset(str(SAMPLE)).items():
        for scene, place, image, trees in crops(rows):
            split = split_of(scene, place) if name == "train" else name
            if split is not None:
                folder = args.output_dir / split / class_of(trees)
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{scene}_{place[0]}_{place[1]}.png")
                counts[split, class_of(trees)] += 1
    for split in ("train", "val", "test", "second_scene"):
        print(f"{split}: {', '.join(f'{counts[split, name]} of {name} trees' for name in CLASSES)}")
    print(f"Images: {args.output_dir}")


if __name__ == "__main__":
    main()
