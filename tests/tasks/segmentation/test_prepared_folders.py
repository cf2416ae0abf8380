"""Tests that the benchmark configurations read the prepared versions of their data."""

import logging

import numpy as np
import prepared_folders
import pytest
from dense_data import read_config
from PIL import Image

from modeling_vitp.tasks.segmentation.arguments import DenseArguments
from modeling_vitp.tasks.segmentation.data import DenseData

CHANGES = {0: "unchanged", 255: "change"}
LUNGS = {0: "background", 255: "infection"}
COVID_MASK = "Train/COVID-19/infection masks/covid-19_train_0.png"


def open_with_config(name: str, root, output_dir) -> tuple[DenseData, DenseArguments]:
    config = read_config(name)
    keys = ("data", "train_splits", "eval_split", "test_split", "submission")
    args = DenseArguments(data_root=str(root), **{key: config[key] for key in keys if key in config})
    return DenseData.from_arguments(args, str(output_dir)), args


def names_of(number_of_classes: int) -> dict[int, str]:
    return {value: f"class {value}" for value in range(number_of_classes)}


@pytest.mark.parametrize(
    ("config", "folder", "sizes", "expected", "mask", "names"),
    [
        ("whu_cd", "whu_cd", (3, 0, 2), 11_456, "train/OUT/1.png", CHANGES),
        ("levir_cd", "levir_cd_256", (3, 1, 2), 10_192, "label/train_1_1.png", CHANGES),
        ("amos2022", "amos2022", (2, 1, 1), 19_310, "ann_dir/train/amos_0001_000.png", names_of(14)),
        ("brats2021", "brats2021", (2, 1, 1), 76_467, "masks/train/BraTS2021_00000_077.png", names_of(3)),
        ("covid_qu_ex", "covid_qu_ex", (6, 3, 3), 5_826, COVID_MASK, LUNGS),
    ],
)
def test_prepared_folder_is_read_and_counted(config, folder, sizes, expected, mask, names, tmp_path, caplog):
    root = getattr(prepared_folders, f"write_{folder}")(tmp_path)
    with caplog.at_level(logging.WARNING):
        data, args = open_with_config(config, root, tmp_path / "out")
    sizes = {split: size for split, size in zip(("train", "val", "test"), sizes) if size}
    assert {split: len(data.open([split])) for split in data.splits} == sizes
    assert {*args.train_splits} <= data.splits.keys() and args.eval_split in {*data.splits, None}
    counts = [message for message in caplog.messages if "expected" in message]
    assert len(counts) == 1 and f"{sum(sizes.values())} images" in counts[0] and f"{expected:,}" in counts[0]
    sample = data.open(["train"])[0]
    stored = np.array(Image.open(root / mask))
    assert [data.encoding.names[index] for index in sample["mask"].flatten()] == [names[n] for n in stored.flatten()]


def test_prepared_uavid_has_names_of_configuration(tmp_path):
    data, args = open_with_config("uavid", prepared_folders.write_uavid(tmp_path), tmp_path / "out")
    assert data.encoding.names == [item["name"] for item in read_config("uavid")["data"]["classes"]]
    assert [item.value for item in data.encoding.classes] == list(range(8))
    assert args.train_splits == ["trainval"] and args.submission is None
    assert {split: len(data.open([split])) for split in data.splits} == {"trainval": 3, "val": 1, "test": 1}
    assert "mask" not in data.open(["test"])[0]


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        ("covid_qu_ex", [0, 1, 254, 255], [0, 0, 1, 1]),  # saved as JPEG
        ("covid_qu_ex", [0, 1], [0, 1]),
        ("isaid", [(0, 0, 0), (0, 0, 63)], [0, 1]),
        ("loveda", [0, 1, 2, 3, 4, 5, 6, 7], [255, 0, 1, 2, 3, 4, 5, 6]),  # 0 is ignored
    ],
)
def test_other_masks_keep_classes_of_configuration(config, values, expected, tmp_path):
    mask = np.array([values, values], np.uint8)
    for folder, array in (("images", np.zeros((2, len(values), 3), np.uint8)), ("annotations", mask)):
        (tmp_path / folder / "training").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / folder / "training/1.png")
        (tmp_path / folder / "validation").mkdir()
        Image.fromarray(array + 1 if folder == "images" else array).save(tmp_path / folder / "validation/2.png")
    data, _ = open_with_config(config, tmp_path, tmp_path / "out")
    assert list(data.splits) == ["train", "val"]
    assert data.encoding.names == [item["name"] for item in read_config(config)["data"]["classes"]]
    assert data.open(["val"])[0]["mask"].tolist() == [expected] * 2
