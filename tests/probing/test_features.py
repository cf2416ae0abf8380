"""Features that are extracted in shards are those of one run, to the bit."""

import json
import subprocess
import sys

import numpy as np
import pytest
from dense_data import picture_of, save
from other_backbones import save_backbone

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.recipes.probe import main

SPLITS = {"train": 11, "test": 6}  # images of each of two classes


@pytest.fixture
def words(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in SPLITS.items():
        for label in (0, 1):
            for index in range(number):
                picture = picture_of(np.full((36, 40), label, dtype=np.uint8), rng)
                save(picture, tmp_path / "data" / split / f"class{label}" / f"{index:02d}.png")
    words = ["--backbones", str(save_backbone(tmp_path / "backbone", "vitp")), "--random_control", "true"]
    return [*words, "--dataset_name", str(tmp_path / "data"), "--batch_size", "4", "--device", "cpu"]


def features(folder) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in (folder / "features").glob("*.npy")}


@pytest.mark.slow
def test_two_processes_extract_what_one_does(words, tmp_path):
    assert main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    whole = features(tmp_path / "one")
    assert sorted(map(len, whole.values())) == [12, 12, 22, 22]

    two = [*words, "--output_dir", str(tmp_path / "two")]
    start = [sys.executable, "-m", "modeling_vitp.recipes.probe", *two]
    running = [subprocess.Popen([*start, "--shard", f"{number}/2"]) for number in (1, 2)]
    assert [process.wait(timeout=400) for process in running] == [0, 0]
    parts = features(tmp_path / "two")
    assert sorted(name.split(".")[1] for name in parts) == [
        "0-12",
        "0-12",
        "0-4",
        "0-4",
        "12-22",
        "12-22",
        *["4-12"] * 2,
    ]
    assert main(two) == 0
    joined = features(tmp_path / "two")
    assert joined.keys() == whole.keys() and all(np.array_equal(joined[name], whole[name]) for name in whole)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())["results"] for name in ("one", "two"))
    assert one == other


def test_a_part_that_is_missing_is_named_and_more_shards_than_batches_are_none_too_many(words, tmp_path):
    words += ["--output_dir", str(tmp_path / "out")]
    for number in range(1, 10):
        assert main([*words, "--shard", f"{number}/9"]) == 0
    assert len(features(tmp_path / "out")) == 2 * (6 + 3)  # whole batches of four
    for path in (tmp_path / "out" / "features").glob("*.8-12.npy"):
        path.unlink()
    with pytest.raises(ValueError, match="none of image 8 and following, of 22: extract the shards that are missing"):
        main(words)
    assert [main([*words, "--shard", f"{number}/9"]) for number in range(1, 10)] == [0] * 9
    assert main(words) == 0 and len(features(tmp_path / "out")) == 4


def test_a_shard_that_cannot_be_is_one_line(words):
    with pytest.raises(WrongArguments, match="'3/2' is no shard: of eight they are 1/8, 2/8 … 8/8"):
        main([*words, "--shard", "3/2"])
