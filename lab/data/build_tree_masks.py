"""Build images and masks of tree crowns from `lab/data/aerial_trees`, for `lab/configs/aerial_trees.yaml`.

    python -m lab.data.build_tree_masks [--output_dir data/aerial_trees]

A mask is 1 in the boxes of trees, 0 elsewhere, and 255 where the label is unknown. A row lists the trees whose centers
lie in it, so a border of `REACH` pixels may contain crowns of trees that are not listed. Training rows are labeled by
their own boxes only, which is the annotation that the instructions use too. Test rows do not overlap and are labeled by
the boxes of all rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from modeling_vitp.data.boxes import Box, box_area, clip
from modeling_vitp.data.rows import image_size

GROUND, TREE, UNKNOWN = 0, 1, 255
REACH = 32  # half of the 90th percentile of the box sides
SAMPLE = Path(__file__).parent / "aerial_trees"


def row_boxes(rows: Dataset) -> list[tuple[str, Box]]:
    """Return the scene of each row and the box of the row in the scene."""
    images = rows.cast_column("image", Image(decode=False))["image"]  # only their headers are read
    sizes = [image_size(image)[::-1] for image in images]
    return [
        (scene, (left, top, left + width, top + height))
        for scene, left, top, (width, height) in zip(rows["scene"], rows["left"], rows["top"], sizes)
    ]


def overlaps(one: tuple[str, Box], other: tuple[str, Box]) -> bool:
    """Return whether two boxes of scenes overlap."""
    return one[0] == other[0] and box_area(clip(one[1], other[1])) > 0


def check_apart(train: Dataset, test: Dataset) -> None:
    """Raise a `ValueError` if a training row overlaps a test row."""
    tested = list(zip(test["id"], row_boxes(test)))
    for name, place in zip(train["id"], row_boxes(train)):
        for other_name, other in tested:
            if overlaps(place, other):
                raise ValueError(f"The training row {name} overlaps the test row {other_name}.")


def side_by_side(where: Sequence[tuple[str, Box]]) -> list[int]:
    """Return the indices of rows that do not overlap an earlier row that is kept."""
    kept = []
    for index, place in enumerate(where):
        if not any(overlaps(place, where[other]) for other in kept):
            kept.append(index)
    return kept


def tree_mask(where: Box, boxes: Sequence[Box], known: Box) -> np.ndarray:
    """Return the labels of the pixels in a window, uint8 of shape `(height, width)`.

    Args:
        where: left, top, right and bottom of the window in the scene.
        boxes: boxes of trees in the scene.
        known: part of the scene in which all trees are annotated.
    """
    left, top, right, bottom = where
    rows, columns = np.mgrid[top:bottom, left:right]
    is_inner = (columns >= known[0] + REACH) & (columns < known[2] - REACH)
    is_inner &= (rows >= known[1] + REACH) & (rows < known[3] - REACH)
    mask = np.where(is_inner, GROUND, UNKNOWN).astype(np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] = TREE
    return mask


def scene_boxes(rows: Dataset) -> list[list[Box]]:
    """Return the boxes of each row in pixels of its scene."""
    return [
        [(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes]
        for boxes, left, top in zip(rows["boxes"], rows["left"], rows["top"])
    ]


def write_train(rows: Dataset, folder: str | Path) -> None:
    """Write `images/` and `masks/` of rows, each labeled by its own boxes."""
    masks = [tree_mask(where, boxes, where) for (_, where), boxes in zip(row_boxes(rows), scene_boxes(rows))]
    write(rows, masks, folder)


def write_test(rows: Dataset, folder: str | Path) -> None:
    """Write `images/` and `masks/` of the non-overlapping rows of one scene, labeled by the boxes of all rows.

    Raises:
        ValueError: if the rows belong to several scenes.
    """
    scenes = sorted(set(rows["scene"]))
    if len(scenes) > 1:
        raise ValueError(f"Expected test rows of one scene, got {scenes}.")
    where = row_boxes(rows)
    boxes = [box for boxes in scene_boxes(rows) for box in boxes]
    sides = np.array([box for _, box in where])
    known = (*sides[:, :2].min(0).tolist(), *sides[:, 2:].max(0).tolist())
    kept = side_by_side(where)
    write(rows.select(kept), [tree_mask(where[index][1], boxes, known) for index in kept], folder)


def write(rows: Dataset, masks: Sequence[np.ndarray], folder: str | Path) -> None:
    folder = Path(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row, mask in zip(rows.cast_column("image", Image(decode=False)), masks):
        name = f"{row['scene']}_{row['left']}_{row['top']}"
        (folder / "images" / f"{name}.jpg").write_bytes(row["image"]["bytes"])
        PILImage.fromarray(mask).save(folder / "masks" / f"{name}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/aerial_trees"))
    args = parser.parse_args(argv)
    splits = load_dataset(str(SAMPLE))
    write_train(splits["train"], args.output_dir / "train")
    write_test(splits["test"], args.output_dir / "test")
    print(f"Images and masks: {args.output_dir}")


if __name__ == "__main__":
    main()
