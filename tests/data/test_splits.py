"""Samples found by path patterns, and images shared by splits."""

import hashlib
import shutil
from pathlib import Path

import dense_data
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from dense_data import TWO, labelled_folder, small_mask
from PIL import Image

from modeling_vitp.data import leaks
from modeling_vitp.data.files import SplitFiles, fill, find_samples
from modeling_vitp.data.leaks import PIECE
from modeling_vitp.tasks.classification.data import ClassificationData
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.tasks.segmentation.data import DenseData


def test_patterns_match_regular_expressions_and_folders(tmp_path):
    for name in ("a/x/P0001.png", "P0002.png", "a/P12.png", "a/P0001_mask.png", "b/P0002_mask.png"):
        dense_data.save(Image.new("L", (2, 2)), tmp_path / name)
    samples = find_samples(tmp_path, {"image": "**/{name:P\\d+}.png"}, "train")
    assert [sample.id for sample in samples] == ["P0001", "P0002", "P12"]
    settings = {"image": "**/{name:P\\d{4}}.png", "mask": "**/{name}_mask.png"}
    with pytest.raises(ValueError, match="fields"):
        find_samples(tmp_path, settings, "train")
    assert fill("{a:x.*}/{b}.png", {"a": "1", "b": "2"}) == "1/2.png"


def test_parts_split_patients_without_overlap(tmp_path):
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


def test_part_seed_draws_other_samples():
    names = [f"image_{number}" for number in range(1000)]
    drawn = {
        (seed, share): {name for name in names if SplitFiles(part=(0.0, share), **seeds).has_case(name)}
        for seed, seeds in (("none", {}), (1, {"part_seed": 1}), (2, {"part_seed": 2}))
        for share in (0.02, 0.2)
    }
    assert all(drawn[seed, 0.02] < drawn[seed, 0.2] for seed in ("none", 1, 2))
    assert all(150 < len(part) < 250 for (_, share), part in drawn.items() if share == 0.2)
    for first, second in (("none", 1), ("none", 2), (1, 2)):
        assert 20 < len(drawn[first, 0.2] & drawn[second, 0.2]) < 60  # 40 of 1000 by chance
    digest = hashlib.sha256(b"1/image_7").digest()[:6]
    assert (int.from_bytes(digest, "big") / 2**48 < 0.2) == ("image_7" in drawn[1, 0.2])


def test_list_selects_samples(tmp_path):
    data = labelled_folder(tmp_path, {name: small_mask(0, 1) for name in "abcd"})
    (tmp_path / "train.txt").write_bytes("\ufeffb\nd.png\n".encode())
    data.splits["train"]["list"] = "train.txt"
    samples = data.open(["train"])
    assert [samples[index]["id"] for index in range(2)] == ["b", "d"]
    (tmp_path / "train.txt").write_text("x\n")
    with pytest.raises(ValueError, match="train.txt: 'x' .*0"):
        data.open(["train"])


def test_file_of_cases_groups_samples(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").touch()
    settings = {"image": "{name}.png", "cases": "scenes.json"}
    with pytest.raises(ValueError, match="scenes.json"):
        find_samples(tmp_path, settings, "test")
    (tmp_path / "scenes.json").write_text('{"a.png": "x", "b.png": "y", "c.png": "x"}')
    assert [sample.case for sample in find_samples(tmp_path, settings, "test")] == ["x", "y", "x"]
    for content, name in (('{"a.png": "x", "c.png": "x"}', "b.png"), ("[1]", "scenes.json")):
        (tmp_path / "scenes.json").write_text(content)
        with pytest.raises(ValueError, match=name):
            find_samples(tmp_path, settings, "test")


def test_empty_mask_folder_is_refused(tmp_path):
    data = labelled_folder(tmp_path, {"a": None})
    with pytest.raises(ValueError, match="'train' has no mask: .*masks/{name}.png"):
        data.open(["train"])


@pytest.mark.parametrize("place", ["A", "B", "label"])
def test_pair_with_missing_image_is_refused(tmp_path, place):
    dense_data.make_levir_cd(tmp_path, size=16)
    (tmp_path / f"train/{place}/train_2.png").unlink()
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    role = {"A": "before", "B": "after", "label": "mask"}[place]
    with pytest.raises(ValueError, match=rf"train_2.png has no {role}: .*train/{place}/train_2.png"):
        data.open(["train"])


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_linked_test_image_is_refused(tmp_path, link):
    for split in ("train", "test"):
        for number in range(3):
            dense_data.save(Image.new("RGB", (2, 2), (number, 0, 9)), tmp_path / split / f"{number}.png")
    splits = {split: {"image": f"{split}/{{name}}.png"} for split in ("train", "test")}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(["train", "test"])  # equal names, but different files
    (tmp_path / "test/1.png").unlink()
    getattr(tmp_path / "test/1.png", link)(tmp_path / "train/2.png")
    with pytest.raises(ValueError, match="test/1.png .*'train' and 'test'.*train/2.png"):
        data.check_disjoint(["train", "test"])


@pytest.mark.parametrize("field", ["patient", "case"])
def test_shared_case_of_files_is_refused(tmp_path, field):
    for name in ("train/7_1", "train/8_1", "test/9_1"):
        dense_data.save(Image.new("RGB", (2, 2)), tmp_path / f"{name}.png")
    splits = {split: {"image": f"{split}/{{{field}}}_{{n}}.png"} for split in ("train", "test")}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(["train", "test"])
    dense_data.save(Image.new("RGB", (2, 2)), tmp_path / "test/7_2.png")
    with pytest.raises(ValueError, match=f"{field} 7 is in both splits 'train' and 'test'"):
        data.check_disjoint(["train", "test"])


@pytest.mark.parametrize("field", ["patient", "case"])
def test_shared_case_of_rows_is_refused(tmp_path, field):
    def save(split, cases):
        columns = {"image": [Image.new("RGB", (2, 2))] * len(cases), field: cases}
        features = Features({"image": ImageFeature(), field: Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")

    save("train", ["a", "a", "b", None, None])
    save("test", [None, "c"])
    splits = {"train": "train", "test": "test"}
    data = DenseData(classes=TWO, splits=splits, dataset_name=str(tmp_path))
    data.check_disjoint(["train", "test"])
    assert len({*data.open(["train"]).cases}) == 4  # A row without a patient is a case of its own.
    save("test", ["c", "a"])
    with pytest.raises(ValueError, match="The case 'a' is in both splits 'train' and 'test'"):
        DenseData(classes=TWO, splits=splits, dataset_name=str(tmp_path)).check_disjoint(["train", "test"])


def rows_of(data_class: type, folder, images: list, image: str = "image") -> dict:
    """Write rows of a task to a folder, and return their setting `data`."""
    objects = [{"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": [0]}] * len(images)
    is_dense = data_class is DenseData
    labels = [Image.new("L", (8, 6)) if is_dense else index % 2 for index in range(len(images))]
    numbers = {"bbox": List(List(Value("float64"))), "category": List(Value("int64"))}
    label = ImageFeature() if is_dense else Value("int64")
    features = Features({image: ImageFeature(), "label": label, "objects": numbers, "patient": Value("int64")})
    patients = [*range(7, 7 + len(images))]
    columns = {image: images, "label": labels, "objects": objects, "patient": patients}
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return {"dataset_name": str(folder), "classes": TWO if is_dense else ["a", "b"], "splits": {"train": "train"}}


TASKS = {ClassificationData: (), DenseData: (), DetectionData: ("horizontal",)}


@pytest.mark.parametrize("data_class", TASKS)
def test_rows_of_splits_are_compared_and_not_copied(tmp_path, data_class):
    described, task = rows_of(data_class, tmp_path, [noise(index) for index in range(4)]), TASKS[data_class]
    described["splits"] = {"train": "train[:3]", "test": "train[3:]", "more": "train[2:]"}
    data = data_class(**described, allow_shared_images=True)
    data.check_disjoint(["train", "test"], *task)
    with pytest.raises(ValueError, match="'train' and 'more' share rows of 'train'"):
        data.check_disjoint(["train", "more"], *task)
    samples = data.open(["train"], *task)
    assert [sample["case"] for sample in samples] == ["7", "8", "9"]  # the patients
    files = [Path(file["filename"]).name for file in samples.rows.cache_files]
    assert files and not [name for name in files if name.startswith("cache-")]  # results of `Dataset.map`


@pytest.mark.parametrize("data_class", TASKS)
def test_row_without_image_is_named(tmp_path, data_class):
    data = data_class(**rows_of(data_class, tmp_path, [noise(0), None]))
    with pytest.raises(ValueError, match="[Rr]ow 1 of split 'train'"):
        data.open(["train"], *TASKS[data_class])[1]


@pytest.mark.parametrize("data_class", TASKS)
def test_changed_rows_of_folder_with_card_are_read(tmp_path, data_class):
    """Check a folder whose card names its files, of which `datasets` alone reads an outdated cache."""
    files = "{config_name: default, data_files: [{split: train, path: train.parquet}]}"
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{files}]\n---\n")
    for number in (2, 3):
        data = data_class(**rows_of(data_class, tmp_path, [noise(index) for index in range(number)]))
        assert len(data.open(["train"], *TASKS[data_class])) == number


@pytest.mark.parametrize("data_class", TASKS)
def test_dot_in_name_of_image_column_is_no_field(tmp_path, data_class):
    """Check a column as those of WebDataset, whose names are suffixes of files such as `seg.png`."""
    described, task = rows_of(data_class, tmp_path, [noise(0), noise(1)], "rgb.png"), TASKS[data_class]
    item = data_class(**described, columns={"image": "rgb.png"}).open(["train"], *task)[1]
    (image,) = item["images"] if "images" in item else [item["image"]]
    assert np.array_equal(image.permute(1, 2, 0), noise(1))
    with pytest.raises(ValueError, match="'train'.*'objects.bbox'"):
        data_class(**described, columns={"image": "objects.bbox"}).open(["train"], *task)


SPLITS = {name: {"image": f"{name}/{{n}}.png"} for name in ("train", "val", "test")}


def noise(seed: int, size=(8, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path):
    """Return three splits of four different images each."""
    for place, split in enumerate(SPLITS):
        for index in range(4):
            dense_data.save(noise(10 * place + index), tmp_path / split / f"{index}.png")
    return DenseData(classes=TWO, splits=SPLITS, root=str(tmp_path))


def test_copied_image_is_named_with_its_source(data, tmp_path, caplog):
    data.check_disjoint(list(SPLITS))
    shutil.copyfile(tmp_path / "train/2.png", tmp_path / "test/renamed.png")
    with pytest.raises(ValueError, match="test/renamed.png .*train/2.png "):
        data.check_disjoint(list(SPLITS))
    data.check_disjoint(["train", "val"])
    data.check_disjoint(["val", "test"])
    data.allow_shared_images = True
    data.check_disjoint(list(SPLITS))
    assert "test/renamed.png in split 'test' is the same image as" in caplog.text


def test_copies_within_a_split_are_allowed(data, tmp_path):
    shutil.copyfile(tmp_path / "train/2.png", tmp_path / "train/again.png")
    for split in SPLITS:
        dense_data.save(Image.new("RGB", (8, 6), (10, 20, 30)), tmp_path / split / "blank.png")
        for index, (mode, color) in enumerate((("L", 7), ("1", 0), ("I;16", 700), ("RGBA", (1, 2, 3, 4)))):
            dense_data.save(Image.new(mode, (8, 6), color), tmp_path / split / f"blank{index}.png")
    data.check_disjoint(list(SPLITS))
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "train/odd.png", compress_level=0)
    almost = Image.new("RGB", (8, 6), (10, 20, 30))
    almost.putpixel((3, 3), (10, 20, 31))
    for split in ("val", "test"):
        almost.save(tmp_path / split / "almost.png")
    with pytest.raises(ValueError, match="test/almost.png in split 'test' is the same image as .*val/almost.png"):
        data.check_disjoint(list(SPLITS))


def test_shared_image_of_pair_is_refused(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    data.check_disjoint(["train", "val", "test"])
    shutil.copyfile(tmp_path / "train/A/train_1.png", tmp_path / "test/B/test_2.png")
    with pytest.raises(ValueError, match="test/B/test_2.png in split 'test' is the same image as .*train/A/train_1"):
        data.check_disjoint(["train", "test"])


@pytest.fixture
def opened(monkeypatch):
    """Return the names of the images that are read in pieces and in full."""
    read = {"pieces": [], "whole": []}
    for name, kind in {"digest_of_pieces": "pieces", "digest_of_all": "whole"}.items():
        original = getattr(leaks, name)

        def digest(image, original=original, kind=kind):
            read[kind].append(image.name)
            return original(image)

        monkeypatch.setattr(leaks, name, digest)
    return read


def test_only_equal_sizes_are_read(data, tmp_path, opened):
    for split in ("train", "val"):
        for path in (tmp_path / split).iterdir():
            path.unlink()
    for index in range(4):
        noise(index, (8, 6 + 2 * index)).save(tmp_path / f"train/{index}.png")
        noise(index, (10, 6 + 2 * index)).save(tmp_path / f"val/{index}.png")
    data.check_disjoint(["train", "val"])
    assert opened == {"pieces": [], "whole": []}

    content = bytearray(np.random.default_rng(0).bytes(6 * PIECE))
    (tmp_path / "train/large.png").write_bytes(content)
    content[PIECE // 2] ^= 1  # in the first piece
    (tmp_path / "val/large.png").write_bytes(content)
    data.check_disjoint(["train", "val"])
    assert len(opened["pieces"]) == 2 and opened["whole"] == []
    content[PIECE // 2] ^= 1
    content[2 * PIECE - 100] ^= 1  # between the pieces
    (tmp_path / "val/large.png").write_bytes(content)
    data.check_disjoint(["train", "val"])
    assert len(opened["whole"]) == 2
    content[2 * PIECE - 100] ^= 1
    (tmp_path / "val/large.png").write_bytes(content)
    with pytest.raises(ValueError, match="val/large.png in split 'val' is the same image as .*train/large.png"):
        data.check_disjoint(["train", "val"])


@pytest.mark.parametrize("is_embedded", [True, False])
def test_rows_are_compared_by_size_first(data, tmp_path, opened, is_embedded):
    shutil.copyfile(tmp_path / "train/2.png", tmp_path / "test/renamed.png")
    features = Features({"image": ImageFeature(), "id": Value("string")})
    for split in ("train", "test"):
        paths = sorted((tmp_path / split).iterdir())
        images = [{"bytes": path.read_bytes() if is_embedded else None, "path": str(path)} for path in paths]
        columns = {"image": images, "id": [path.stem for path in paths]}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"rows/{split}.parquet")
    rows = DenseData(classes=TWO, splits={"train": "train", "test": "test"}, dataset_name=str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"row 4 \(image\) in split 'test' is the same image as row 2 \(image\)"):
        rows.check_disjoint(["train", "test"])
    assert set(opened["whole"]) == {"row 2 (image)", "row 4 (image)"}
    columns = {key: value[:4] for key, value in columns.items()}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows/test.parquet")
    rows.check_disjoint(["train", "test"])
