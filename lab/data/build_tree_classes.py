"""Build crops of `lab/data/aerial_trees` by tree density, for `lab/configs/aerial_trees_density.yaml`.

    python -m lab.data.build_tree_classes [--output_dir data/aerial_trees_density]

A class is a range of the number of trees whose centers lie in a crop. Each of the four ranges has about a quarter of
the training crops. The splits are folders with a folder for each class:

    train         crops of the training ground above row `HELD_OUT` of the big scene, and of the small scenes
    val           crops of the training ground below that row, to choose settings
    test          ground of the same scene, 320 pixels away from the other splits
    second_scene  another scene
"""

import argparse
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset
from PIL import Image

from lab.data.build_tree_masks import SAMPLE, row_boxes
from modeling_vitp.data.boxes import Box
from modeling_vitp.images.reading import window_starts

MOST = (1, 4, 7)  # largest number of trees in the first three classes
CLASSES = ("0 to 1", "2 to 4", "5 to 7", "8 and more")
CROP, STRIDE = 224, 96
SCENE, HELD_OUT = "yellowstone", 1960


def class_of(trees: int) -> str:
    return CLASSES[bisect_left(MOST, trees)]


def crops(rows: Dataset) -> Iterator[tuple[str, Box, Image.Image, int]]:
    """Yield scene, box in the scene, image and number of trees of each crop."""
    for row, (scene, (left, top, right, bottom)) in zip(rows, row_boxes(rows)):
        centers = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in row["boxes"]]
        for y in window_starts(bottom - top, CROP, STRIDE):
            for x in window_starts(right - left, CROP, STRIDE):
                trees = sum(x <= one < x + CROP and y <= other < y + CROP for one, other in centers)
                box = (left + x, top + y, left + x + CROP, top + y + CROP)
                yield scene, box, row["image"].crop((x, y, x + CROP, y + CROP)), trees


def split_of(scene: str, box: Box) -> str | None:
    """Return the split of a crop of the training ground, or `None` for a crop that overlaps both parts."""
    if scene != SCENE or box[3] <= HELD_OUT:
        return "train"
    return "val" if box[1] >= HELD_OUT else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/aerial_trees_density"))
    args = parser.parse_args(argv)
    counts = Counter()
    for name, rows in load_dataset(str(SAMPLE)).items():
        for scene, box, image, trees in crops(rows):
            split = split_of(scene, box) if name == "train" else name
            if split is not None:
                folder = args.output_dir / split / class_of(trees)
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{scene}_{box[0]}_{box[1]}.png")
                counts[split, class_of(trees)] += 1
    for split in ("train", "val", "test", "second_scene"):
        print(f"{split}: {', '.join(f'{counts[split, name]} of {name} trees' for name in CLASSES)}")
    print(f"Images: {args.output_dir}")


if __name__ == "__main__":
    main()
