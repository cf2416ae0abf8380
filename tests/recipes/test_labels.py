"""Parts of the training ground, and what is held out of it."""

import numpy as np
import pytest
from datasets import load_dataset
from paths import AERIAL_TREES

from modeling_vitp.recipes.data.build_tree_masks import check_apart
from modeling_vitp.recipes.tasks.trees.downstream import label_subset, labelled_rows, split_held_out, write_splits


@pytest.fixture(scope="module")
def aerial_trees():
    return load_dataset(str(AERIAL_TREES))


def test_a_part_of_the_labels_has_its_share_of_windows_and_trees(aerial_trees):
    trees = [len(boxes) for boxes in aerial_trees["train"]["boxes"]]
    draws = [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert draws == [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 10
    for chosen in draws:
        assert len(set(chosen)) == 2 == len(trees) * 0.1
        assert 0.08 <= sum(trees[index] for index in chosen) / sum(trees) <= 0.12
    assert label_subset(trees, 1.0, 3) == list(range(20))
    assert len(label_subset(trees, 0.05, 0)) == 1
    for share, message in ((0.0, "not above 0"), (0.05, "no 5% of the windows")):
        with pytest.raises(ValueError, match=message):
            label_subset([0, 100] * 10, share, 0)


def test_what_is_held_out_is_in_no_window_that_is_left(aerial_trees):
    rows, held_out = split_held_out(aerial_trees["train"], "yellowstone", 1960)
    assert held_out["id"][:] == ["yellowstone/0_1960", "yellowstone/392_1960", "yellowstone/777_1960"]
    assert len(rows) == 14
    check_apart(rows, held_out)
    with pytest.raises(ValueError, match="leaves 0 windows"):
        split_held_out(aerial_trees["second_scene"], "yellowstone_2", 0)


def test_a_part_is_written_with_its_images_and_once(aerial_trees, tmp_path):
    part = {
        "train": labelled_rows(aerial_trees["train"], 0.1, 2),
        "second_scene": aerial_trees["test"].select(range(2)),
    }
    folder = write_splits(part, tmp_path / "part")
    assert write_splits({}, tmp_path / "part") == folder
    read = load_dataset(folder)
    assert set(read) == set(part)
    for name, rows in part.items():
        assert read[name]["id"][:] == rows["id"][:] and read[name]["boxes"][:] == rows["boxes"][:]
        assert (np.array(read[name][0]["image"]) == np.array(rows[0]["image"])).all()
