"""Items of a data set: files of images, rows of the Hub."""

import dense_data
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from dense_data import TWO, labelled_folder, small_mask
from PIL import Image

from modeling_vitp.dense.data import DenseData, count_pixels


def test_a_data_set_of_the_hub(tmp_path):
    """With the columns that segmentation data sets of the Hub have, and pairs."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(3)]
    masks = [Image.fromarray(rng.integers(0, 2, (5, 7), dtype=np.uint8)) for _ in range(3)]
    columns = {"image": pictures, "label": masks, "imageB": pictures[::-1], "id": ["a", "b", "c"]}
    features = Features({**{name: ImageFeature() for name in ("image", "label", "imageB")}, "id": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    data = DenseData(classes=TWO, splits={"train": "train"}, dataset_name=str(tmp_path))
    samples = data.open(["train"])
    assert len(samples) == 3
    assert samples[1]["id"] == "b"
    assert np.array_equal(samples[1]["images"][0].permute(1, 2, 0), np.array(pictures[1]))
    assert np.array_equal(samples[1]["mask"], np.array(masks[1]))
    assert count_pixels(samples, data.encoding.names) == {
        name: sum((np.array(mask) == index).sum() for mask in masks) for index, name in enumerate(("ground", "tree"))
    }
    pairs = DenseData(
        classes=TWO,
        splits={"train": "train"},
        dataset_name=str(tmp_path),
        columns={"before": "image", "after": "imageB"},
    )
    before, after = pairs.open(["train"])[0]["images"]
    assert np.array_equal(before.permute(1, 2, 0), np.array(pictures[0]))
    assert np.array_equal(after.permute(1, 2, 0), np.array(pictures[2]))


def test_windows_of_a_scene_are_cut_from_image_and_mask_alike(tmp_path):
    rng = np.random.default_rng(0)
    scene, labels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.integers(0, 2, (20, 30), dtype=np.uint8)
    dense_data.save(Image.fromarray(scene), tmp_path / "images" / "P1.png")
    dense_data.save(Image.fromarray(labels), tmp_path / "masks" / "P1.png")
    split = {"image": "images/{name}.png", "mask": "masks/{name}.png", "tile": {"size": 16, "overlap": 4}}
    samples = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path)).open(["train"])
    ids = ["P1/0_0", "P1/12_0", "P1/14_0", "P1/0_4", "P1/12_4", "P1/14_4"]
    assert [samples[index]["id"] for index in range(len(samples))] == ids
    assert np.array_equal(samples[5]["images"][0].permute(1, 2, 0), scene[4:, 14:])
    assert np.array_equal(samples[5]["mask"], labels[4:, 14:])
    assert samples[5]["case"] == "P1"


def test_image_and_mask_of_different_size(tmp_path):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1, shape=(6, 7))})
    with pytest.raises(ValueError, match=r"masks/a.png is 7 x 6 pixels, but its image .*images/a.png 8 x 6"):
        data.open(["train"])


@pytest.mark.parametrize("name", ["images/a.png", "masks/a.png"])
def test_a_file_that_is_cut_off_is_named_before_anything_is_trained(tmp_path, name):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1)})
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        data.open(["train"])


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_an_image_that_is_stored_turned_is_named_before_anything_is_trained(tmp_path, kind):
    """Its mask may be that of the pixels as they are stored: a square one has the same size."""
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1, shape=(8, 8))})
    data.splits["train"]["image"] = f"images/{{name}}.{kind}"
    exif = Image.Exif()
    exif[274] = 3
    turned = {"tiffinfo": {274: 3}} if kind == "tif" else {"exif": exif}
    path = tmp_path / "images" / f"a.{kind}"
    Image.new("RGB", (8, 8)).save(path, **turned)
    with pytest.raises(ValueError, match=f"images/a.{kind} is stored with orientation 3, so not as it is to be seen"):
        data.open(["train"])
    Image.new("RGB", (8, 8)).save(path)
    assert len(data.open(["train"])) == 1


def test_images_of_a_pair_of_different_size(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    dense_data.save(Image.new("RGB", (16, 15)), tmp_path / "train/B/train_1.png")
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    with pytest.raises(ValueError, match="B/train_1.png is 16 x 15 pixels, but .*A/train_1.png 16 x 16"):
        data.open(["train"])
