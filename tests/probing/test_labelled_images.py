"""Images with classes."""

import zlib

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pictures import picture
from PIL import Image

from modeling_vitp.probing.classification import open_splits


def hash_of(*parts) -> int:
    return zlib.crc32(str(parts).encode())


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, -1], ClassLabel(names=["a", "b"]), "split 'train', row 1, has no label"),
        (["a", None], Value("string"), "split 'train', row 1, has no label"),
        ([[1], [2]], List(Value("int64")), "split 'train', row 0: label is .*, but one class"),
        ([0.5, 2.0], Value("float32"), "split 'train', row 0: label is 0.5, but one class"),
        (["a", "a"], Value("string"), "split 'train', has images of one class alone, 'a'"),
    ],
)
def test_columns_of_classes_that_are_wrong(tmp_path, values, feature, message):
    features = Features({"image": ImageFeature(), "label": feature})
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": values}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        open_splits(str(tmp_path), None, "train", "test", 0.5)


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        for name in ("bridge", "train_station", "test site"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(number):
                picture(8, 8, hash_of(split, name, index)).save(tmp_path / split / name / f"{index}.png")
    rows, labels, names = open_splits(str(tmp_path), None, "train", "test")
    assert names == ["bridge", "test site", "train_station"]
    assert {role: labels[role].tolist() for role in labels} == {
        "train": [0] * 3 + [1] * 3 + [2] * 3,
        "test": [0] * 2 + [1] * 2 + [2] * 2,
    }
    assert not {row["path"] for row in rows["train"]["image"]} & {row["path"] for row in rows["test"]["image"]}
    assert len(open_splits(str(tmp_path), None, "train", "test", 0.4)[1]["test"]) == 3


def test_images_of_the_training_in_the_test_are_told(tmp_path, caplog):
    for split in ("train", "test"):
        for index, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(8, 8, index if name == "a" else hash_of(split, name, index)).save(tmp_path / split / name / "0.png")
    open_splits(str(tmp_path), None, "train", "test")
    assert (
        "is probed with images of its training: row 0 (image) in split 'test' is the same image as row 0" in caplog.text
    )


@pytest.mark.parametrize("place", ["train/overview.png", "test/a/2019/x.png"])
def test_a_picture_that_is_in_no_folder_of_a_class_is_named(tmp_path, place):
    for index, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        picture(8, 8, index).save(tmp_path / folder / "0.png")
    open_splits(str(tmp_path), None, "train", "test")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    picture(8, 8, 9).save(tmp_path / place)
    with pytest.raises(ValueError, match=f"{place} is not at SPLIT/CLASS/NAME in .*, so its class is not known"):
        open_splits(str(tmp_path), None, "train", "test")
