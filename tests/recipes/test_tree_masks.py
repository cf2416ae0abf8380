"""Crowns as masks: which pixel is what, and that no ground is scored twice."""

import numpy as np
import pytest
from datasets import load_dataset
from paths import AERIAL_TREES
from PIL import Image

from modeling_vitp.recipes.data.build_tree_masks import (
    REACH,
    TREE,
    UNKNOWN,
    check_apart,
    places,
    side_by_side,
    tree_mask,
    write_test,
)


@pytest.fixture(scope="module")
def aerial_trees():
    return load_dataset(str(AERIAL_TREES))


def ground(rows) -> dict[str, set[tuple[int, int]]]:
    """Pixels that rows show, thinned to every fourth, by scene."""
    shown = {}
    for row in rows:
        width, height = row["image"].size
        pixels = shown.setdefault(row["scene"], set())
        for x in range(row["left"], row["left"] + width):
            if x % 4 == 0:
                pixels.update((x, y) for y in range(row["top"], row["top"] + height) if y % 4 == 0)
    return shown


def test_masks_equal_a_loop_over_pixels():
    where, known = (100, 40, 220, 130), (90, 0, 400, 120)
    boxes = [(80, 30, 110, 60), (150, 90, 161, 99), (210, 100, 260, 140), (0, 0, 20, 20)]
    mask = tree_mask(where, boxes, known)
    assert mask.shape == (90, 120) and mask.dtype == np.uint8
    for y in range(90):
        for x in range(120):
            column, row = x + 100, y + 40
            is_tree = any(x0 <= column < x1 and y0 <= row < y1 for x0, y0, x1, y1 in boxes)
            distance = min(column - 90, row - 0, 399 - column, 119 - row)
            assert mask[y, x] == (TREE if is_tree else UNKNOWN if distance < REACH else 0)


def test_each_pixel_of_the_test_ground_is_scored_once(aerial_trees, tmp_path):
    kept = aerial_trees["test"].select(side_by_side(places(aerial_trees["test"])))
    assert sum(len(pixels) for pixels in ground(kept).values()) == pytest.approx(
        sum(len(ground([row])["yellowstone"]) for row in kept)
    )
    assert len(kept) == 33
    write_test(aerial_trees["test"], tmp_path)
    assert len(list((tmp_path / "masks").iterdir())) == 33
    # A crown whose centre lies in the neighbour is a tree here too.
    row = next(row for row in kept if row["left"] == 1833 and row["top"] == 448)
    mask = np.array(Image.open(tmp_path / "masks/yellowstone_1833_448.png"))
    inside = {(x0 + 1833, y0 + 448, x1 + 1833, y1 + 448) for x0, y0, x1, y1 in row["boxes"]}
    reaching_in = {
        (x0 + other["left"] - 1833, y0 + other["top"] - 448, x1 + other["left"] - 1833, y1 + other["top"] - 448)
        for other in aerial_trees["test"]
        for x0, y0, x1, y1 in other["boxes"]
        if (x0 + other["left"], y0 + other["top"], x1 + other["left"], y1 + other["top"]) not in inside
    }
    expected = np.zeros((224, 224), dtype=bool)
    for left, top, right, bottom in {*map(tuple, row["boxes"]), *reaching_in}:
        expected[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    assert ((mask == TREE) == expected).all() and not (mask == UNKNOWN).any()
    with pytest.raises(ValueError, match="several scenes"):
        write_test(aerial_trees["train"], tmp_path)


def test_training_on_tested_ground_is_refused(aerial_trees):
    check_apart(aerial_trees["train"], aerial_trees["test"])
    with pytest.raises(ValueError, match=r"yellowstone/1609_0 is trained on and shows ground of yellowstone/1609_0"):
        check_apart(aerial_trees["test"], aerial_trees["test"])
