"""What a configuration describes, in the layouts of benchmarks."""

import dense_data
import numpy as np
import pytest
from dense_data import TWO, labelled_folder, small_mask
from PIL import Image

from modeling_vitp.dense.data import DenseData, LabelEncoding, balanced_weights, count_pixels


def test_loveda(tmp_path):
    dense_data.make_loveda(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(tmp_path)})
    samples = data.open(["train", "val"])
    ids = [samples[index]["id"] for index in range(len(samples))]
    assert ids == [
        "Rural/0",
        "Rural/1",
        "Rural/2",
        "Urban/10",
        "Urban/11",
        "Urban/12",
        "Rural/0",
        "Urban/10",
        "Urban/11",
    ]
    stored = np.array(Image.open(tmp_path / "Train/Urban/masks_png/11.png"))
    expected = np.where(stored == 0, 255, stored - 1)
    assert np.array_equal(samples[4]["mask"], expected)
    image = np.array(Image.open(tmp_path / "Train/Urban/images_png/11.png"))
    assert np.array_equal(samples[4]["images"][0].permute(1, 2, 0), image)
    assert "mask" not in data.open(["test"])[0]


def test_uavid_by_colour(tmp_path):
    dense_data.make_uavid(tmp_path)
    data = DenseData.from_dict(dense_data.read_config("uavid")["data"] | {"root": str(tmp_path)})
    samples = data.open(["train"])
    colours = np.array(Image.open(tmp_path / "uavid_train/seq2/Labels/000100.png"))
    sample = samples[3]
    assert sample["id"] == "seq2/000100"
    assert sample["mask"].shape == (54, 96)
    for (row, column), label in np.ndenumerate(sample["mask"].numpy()):
        assert data.classes[label]["color"] == colours[row, column].tolist()
    assert np.array_equal(data.encoding.decode(sample["mask"].numpy()), colours)


def test_levir_cd(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    sample = data.open(["train"])[1]
    for image, place in zip(sample["images"], "AB", strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(tmp_path / f"train/{place}/train_2.png")))
    label = np.array(Image.open(tmp_path / "train/label/train_2.png"))
    assert np.array_equal(sample["mask"], label == 255)


def test_values_outside_the_classes(tmp_path):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1), "b": small_mask(0, 7, 7)})
    with pytest.raises(ValueError, match=r"masks/b.png has 2 pixel\(s\) of 1 value\(s\) outside the classes: 7"):
        count_pixels(data.open(["train"]), data.encoding.names)


def test_a_class_that_never_occurs(tmp_path, caplog):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 0)})
    pixels = count_pixels(data.open(["train"]), data.encoding.names)
    assert pixels == {"ground": 48, "tree": 0}
    assert "['tree'] never occur" in caplog.text
    with pytest.raises(ValueError, match="'tree'"):
        balanced_weights(pixels)


def test_masks_that_are_all_ignored(tmp_path):
    data = labelled_folder(tmp_path, {"a": small_mask(*[9] * 48)})
    data.encoding = LabelEncoding(TWO, ignore=[9])
    with pytest.raises(ValueError, match="all are to be ignored"):
        count_pixels(data.open(["train"]), data.encoding.names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": {"image": "a/{name}.png", "maks": "b"}}}, "unknown settings .*maks"),
        ({"splits": {"train": {"image": "a.png"}}}, "needs the fields"),
        ({"splits": {"train": {"before": "a/{name}.png"}}}, "needs either `image`, or `before` and `after`"),
        ({"classes": [{"name": "a"}]}, "1 classes are given"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "Two classes are called 'a'"),
        ({"classes": [{"name": "a", "value": 1}, {"name": "b", "value": [0, 2]}]}, "stands for two things"),
        ({"mask_encoding": "color"}, "needs a name, a color"),
        ({"root": None}, "either `root`"),
        ({"tile": 3}, "unknown"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, changes, message):
    settings = {"classes": TWO, "splits": {"train": {"image": "a/{name}.png"}}, "root": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        DenseData.from_dict(settings | changes).open(["train"])


@pytest.mark.parametrize(
    "name",
    "isaid loveda uavid levir_cd whu_cd svcd s2looking amos2022 brats2021 covid_qu_ex brain_mri".split(),
)
def test_configurations_describe_their_data(name):
    config = dense_data.read_config(name)
    data = DenseData.from_dict(config["data"])
    named = {*config["train_splits"], config.get("eval_split"), config.get("test_split")} - {None}
    assert named <= set(data.splits)
    assert config.get("test_split", "") not in {*config["train_splits"], config.get("eval_split")}
    is_published = name in "isaid loveda uavid levir_cd whu_cd svcd s2looking".split()
    as_in_release = [config.get(option) for option in ("level_embeddings_at_input", "position_weight_decay")]
    assert as_in_release == ([True, True] if is_published else [None, None])
    if "submission" in config:
        assert set(config["submission"]) <= {"split", "file", "encoding"}
        assert "mask" not in data.splits[config["submission"]["split"]]
