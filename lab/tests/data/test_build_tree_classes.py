"""Tests of the crops with tree density classes: counts, class ranges and disjoint splits."""

import numpy as np
import pytest
from datasets import load_dataset
from paths import AERIAL_TREES

from lab.data.build_tree_classes import CLASSES, CROP, MOST, class_of, crops, split_of


@pytest.fixture(scope="module")
def sample():
    return load_dataset(str(AERIAL_TREES))


def test_class_is_range_of_tree_count():
    named = {
        0: "0 to 1",
        1: "0 to 1",
        2: "2 to 4",
        4: "2 to 4",
        5: "5 to 7",
        7: "5 to 7",
        8: "8 and more",
        30: "8 and more",
    }
    assert {trees: class_of(trees) for trees in named} == named


def test_ranges_are_quarters_of_training_trees(sample):
    found = list(crops(sample["train"]))
    trees = np.array([number for *_, number in found])
    shares = [np.mean([class_of(number) == name for number in trees]) for name in CLASSES]
    assert all(0.18 < share < 0.34 for share in shares), shares
    assert [np.quantile(trees, part) for part in (0.25, 0.5, 0.75)] == [*MOST]
    row, index = sample["train"][0], 0
    for y in (0, 96, 192, 288):
        for x in (0, 96, 192, 288):
            scene, place, image, number = found[index]
            assert place == (row["left"] + x, row["top"] + y, row["left"] + x + 224, row["top"] + y + 224)
            assert image.size == (CROP, CROP) and scene == row["scene"]
            inside = 0
            for x0, y0, x1, y1 in row["boxes"]:
                inside += x <= (x0 + x1) / 2 < x + 224 and y <= (y0 + y1) / 2 < y + 224
            assert number == inside
            index += 1


def test_crops_of_splits_do_not_overlap(sample):
    parts = {"train": [], "val": [], "test": []}
    for name in ("train", "test"):
        for scene, place, _, _ in crops(sample[name]):
            split = split_of(scene, place) if name == "train" else name
            if split is not None:
                parts[split].append((scene, place))
    assert {name: len(places) for name, places in parts.items()} == {"train": 234, "val": 48, "test": 132}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        for scene, (left, top, right, bottom) in parts[one]:
            for scene_2, (left_2, top_2, right_2, bottom_2) in parts[other]:
                apart = scene != scene_2 or right <= left_2 or right_2 <= left or bottom <= top_2 or bottom_2 <= top
                assert apart, (scene, left, top, left_2, top_2)
