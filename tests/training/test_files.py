"""Samples are found by patterns of paths."""

import dense_data
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from dense_data import TWO, labelled_folder, small_mask
from PIL import Image

from modeling_vitp.dense.data import DenseData
from modeling_vitp.training.fine_tuning_data import fill, find_samples


def test_patterns_with_forms_and_folders_of_any_depth(tmp_path):
    for name in ("a/x/P0001.png", "P0002.png", "a/P12.png", "a/P0001_mask.png", "b/P0002_mask.png"):
        dense_data.save(Image.new("L", (2, 2)), tmp_path / name)
    samples = find_samples(tmp_path, {"image": "**/{name:P\\d+}.png"}, "train")
    assert [sample.id for sample in samples] == ["P0001", "P0002", "P12"]
    settings = {"image": "**/{name:P\\d{4}}.png", "mask": "**/{name}_mask.png"}
    with pytest.raises(ValueError, match="fields"):
        find_samples(tmp_path, settings, "train")
    assert fill("{a:x.*}/{b}.png", {"a": "1", "b": "2"}) == "1/2.png"


def test_parts_are_by_patient_and_do_not_overlap(tmp_path):
    for patient in range(30):
        for image in range(2):
            dense_data.save(Image.new("L", (2, 2)), tmp_path / f"p{patient}_{image}.png")
    parts = {"train": [0.0, 0.6], "val": [0.6, 0.8], "test": [0.8, 1.0]}
    splits = {name: {"image": "{patient}_{image}.png", "part": part} for name, part in parts.items()}
    found = {name: find_samples(tmp_path, settings, name) for name, settings in splits.items()}
    assert sum(map(len, found.values())) == 60
    patients = {name: {sample.case for sample in samples} for name, samples in found.items()}
    assert all(len(samples) == 2 * len(patients[name]) for name, samples in found.items())
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(list(parts))
    splits["val"]["part"] = [0.5, 0.8]
    with pytest.raises(ValueError, match="patient p.* is in both splits 'train' and 'val'"):
        data.check_disjoint(list(parts))


def test_a_list_chooses_samples(tmp_path):
    data = labelled_folder(tmp_path, {name: small_mask(0, 1) for name in "abcd"})
    (tmp_path / "train.txt").write_bytes("\ufeffb\nd.png\n".encode())
    data.splits["train"]["list"] = "train.txt"
    samples = data.open(["train"])
    assert [samples[index]["id"] for index in range(2)] == ["b", "d"]
    (tmp_path / "train.txt").write_text("x\n")
    with pytest.raises(ValueError, match="train.txt: 'x' is the name of 0 samples"):
        data.open(["train"])


def test_an_empty_mask_folder(tmp_path):
    data = labelled_folder(tmp_path, {"a": None})
    with pytest.raises(ValueError, match="Split 'train' has no mask: no file is like .*masks/{name}.png"):
        data.open(["train"])


@pytest.mark.parametrize("place", ["A", "B", "label"])
def test_a_pair_with_one_image_missing(tmp_path, place):
    dense_data.make_levir_cd(tmp_path, size=16)
    (tmp_path / f"train/{place}/train_2.png").unlink()
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    role = {"A": "before", "B": "after", "label": "mask"}[place]
    with pytest.raises(ValueError, match=rf"train_2.png has no {role}: there is no .*train/{place}/train_2.png"):
        data.open(["train"])


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_test_image_that_is_a_link_to_a_training_image_is_the_same(tmp_path, link):
    for split in ("train", "test"):
        for number in range(3):
            dense_data.save(Image.new("RGB", (2, 2), (number, 0, 9)), tmp_path / split / f"{number}.png")
    splits = {split: {"image": f"{split}/{{name}}.png"} for split in ("train", "test")}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(["train", "test"])  # of the same names, but not the same
    (tmp_path / "test/1.png").unlink()
    getattr(tmp_path / "test/1.png", link)(tmp_path / "train/2.png")
    said = "test/1.png is in both splits 'train' and 'test', as .*train/2.png in 'train'"
    with pytest.raises(ValueError, match=said):
        data.check_disjoint(["train", "test"])


@pytest.mark.parametrize("field", ["patient", "case"])
def test_a_case_is_in_one_split_only(tmp_path, field):
    for name in ("train/7_1", "train/8_1", "test/9_1"):
        dense_data.save(Image.new("RGB", (2, 2)), tmp_path / f"{name}.png")
    splits = {split: {"image": f"{split}/{{{field}}}_{{n}}.png"} for split in ("train", "test")}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(["train", "test"])
    dense_data.save(Image.new("RGB", (2, 2)), tmp_path / "test/7_2.png")
    with pytest.raises(ValueError, match=f"{field} 7 is in both splits 'train' and 'test'"):
        data.check_disjoint(["train", "test"])


@pytest.mark.parametrize("field", ["patient", "case"])
def test_a_case_of_rows_is_in_one_split_only(tmp_path, field):
    def save(split, cases):
        columns = {"image": [Image.new("RGB", (2, 2))] * len(cases), field: cases}
        features = Features({"image": ImageFeature(), field: Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")

    save("train", ["a", "a", "b"])
    save("test", ["c"])
    splits = {"train": "train", "test": "test"}
    DenseData(classes=TWO, splits=splits, dataset_name=str(tmp_path)).check_disjoint(["train", "test"])
    save("test", ["c", "a"])
    with pytest.raises(ValueError, match="The case 'a' is in both splits 'train' and 'test'"):
        DenseData(classes=TWO, splits=splits, dataset_name=str(tmp_path)).check_disjoint(["train", "test"])
