"""Tree crowns of `recipes/data/aerial_trees` as images and masks, for `recipes/configs/aerial_trees.yaml`.

    python recipes/data/build_tree_masks.py [--output_dir data/aerial_trees]

A mask has 1 in the boxes of trees, 0 elsewhere, and 255 where nothing is known: a row lists the trees whose centres lie
in it, so between the boxes of a strip of `REACH` pixels along its border there may be crowns of trees that it does not
list. Of a split to train on every row is labelled by its own boxes alone, so what is used of its annotation is what a
row of instructions uses. Rows to test on lie side by side, each pixel in one of them, and are labelled by the boxes of
all rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from modeling_vitp.instructions.boxes import Box, box_area, clip

GROUND, TREE, UNKNOWN = 0, 1, 255
REACH = 32  # half of the side that nine of ten boxes stay under
SAMPLE = Path(__file__).parent / "aerial_trees"


def places(rows: Dataset) -> list[tuple[str, Box]]:
    """The scene of each row, and its left, top, right and bottom there."""
    sizes = [image.size for image in rows["image"]]
    return [
        (scene, (left, top, left + width, top + height))
        for scene, left, top, (width, height) in zip(rows["scene"], rows["left"], rows["top"], sizes)
    ]


def overlaps(one: tuple[str, Box], other: tuple[str, Box]) -> bool:
    """Whether two places have ground in common."""
    return one[0] == other[0] and box_area(clip(one[1], other[1])) > 0


def check_apart(train: Dataset, test: Dataset) -> None:
    """Raises a `ValueError` if a row to train on shows ground of one to test on."""
    tested = list(zip(test["id"], places(test)))
    for name, place in zip(train["id"], places(train)):
        for other_name, other in tested:
            if overlaps(place, other):
                raise ValueError(f"{name} is trained on and shows ground of {other_name}, which is the test's.")


def side_by_side(where: Sequence[tuple[str, Box]]) -> list[int]:
    """Indices of the places that have no ground in common with one before them that is kept."""
    kept = []
    for index, place in enumerate(where):
        if not any(overlaps(place, where[other]) for other in kept):
            kept.append(index)
    return kept


def tree_mask(where: Box, boxes: Sequence[Box], known: Box) -> np.ndarray:
    """Labels of the pixels in `where`, uint8 of shape `(height, width)`.

    Args:
        where: left, top, right and bottom in the scene.
        boxes: of trees, in the scene.
        known: the part of the scene of whose trees all that have their centres in it are among the boxes.
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
    """The boxes of each row in pixels of its scene."""
    return [
        [(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes]
        for boxes, left, top in zip(rows["boxes"], rows["left"], rows["top"])
    ]


def write_train(rows: Dataset, folder: str | Path) -> None:
    """`images/` and `masks/` of rows, each labelled by its own boxes."""
    write(rows, [tree_mask(where, boxes, where) for (_, where), boxes in zip(places(rows), scene_boxes(rows))], folder)


def write_test(rows: Dataset, folder: str | Path) -> None:
    """`images/` and `masks/` of the rows of one scene that lie side by side, labelled by the boxes of all.

    Raises:
        ValueError: if the rows are of several scenes.
    """
    scenes = sorted(set(rows["scene"]))
    if len(scenes) > 1:
        raise ValueError(f"The rows to test on are of several scenes, {scenes}: give one.")
    where = places(rows)
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
