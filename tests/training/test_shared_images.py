"""An image in two splits is found by its content, under whatever name, and at little cost."""

import shutil

import dense_data
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from dense_data import TWO
from PIL import Image

from modeling_vitp.dense.data import DenseData
from modeling_vitp.images.reading import read_picture
from modeling_vitp.training import fine_tuning_data as shared_images
from modeling_vitp.training.fine_tuning_data import PIECE

SPLITS = {name: {"image": f"{name}/{{n}}.png"} for name in ("train", "val", "test")}


def noise(seed: int, size=(8, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path):
    """Three splits of four different images each."""
    for place, split in enumerate(SPLITS):
        for index in range(4):
            dense_data.save(noise(10 * place + index), tmp_path / split / f"{index}.png")
    return DenseData(classes=TWO, splits=SPLITS, root=str(tmp_path))


def test_a_copy_under_another_name_is_named_with_its_source(data, tmp_path, caplog):
    data.check_disjoint(list(SPLITS))
    shutil.copyfile(tmp_path / "train/2.png", tmp_path / "test/renamed.png")
    said = "test/renamed.png in split 'test' is the same image as .*train/2.png in 'train': take it out of one"
    with pytest.raises(ValueError, match=said) as caught:
        data.check_disjoint(list(SPLITS))
    assert len(str(caught.value).splitlines()) == 1
    data.check_disjoint(["train", "val"])
    data.check_disjoint(["val", "test"])
    data.allow_shared_images = True
    data.check_disjoint(list(SPLITS))
    assert "test/renamed.png in split 'test' is the same image as" in caplog.text


def test_copies_within_a_split_and_images_of_one_color_may_be(data, tmp_path):
    shutil.copyfile(tmp_path / "train/2.png", tmp_path / "train/again.png")
    for split in SPLITS:
        dense_data.save(Image.new("RGB", (8, 6), (10, 20, 30)), tmp_path / split / "blank.png")
        dense_data.save(Image.new("L", (8, 6), 7), tmp_path / split / "grey.png")
    data.check_disjoint(list(SPLITS))
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "train/odd.png", compress_level=0)
    almost = Image.new("RGB", (8, 6), (10, 20, 30))
    almost.putpixel((3, 3), (10, 20, 31))
    for split in ("val", "test"):
        almost.save(tmp_path / split / "almost.png")
    with pytest.raises(ValueError, match="test/almost.png in split 'test' is the same image as .*val/almost.png"):
        data.check_disjoint(list(SPLITS))


def test_one_image_of_a_pair_is_enough(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    data.check_disjoint(["train", "val", "test"])
    shutil.copyfile(tmp_path / "train/A/train_1.png", tmp_path / "test/B/test_2.png")
    with pytest.raises(ValueError, match="test/B/test_2.png in split 'test' is the same image as .*train/A/train_1"):
        data.check_disjoint(["train", "test"])


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, and what of them is read whole."""
    read = {"pieces": [], "whole": []}
    for name, kind in {"digest_of_pieces": "pieces", "digest_of_all": "whole"}.items():
        original = getattr(shared_images, name)

        def digest(image, original=original, kind=kind):
            read[kind].append(image.name)
            return original(image)

        monkeypatch.setattr(shared_images, name, digest)
    return read


def test_files_of_different_size_are_not_opened_and_unequal_ones_not_read_whole(data, tmp_path, opened):
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
def test_rows_are_compared_too_by_the_lengths_of_their_images_first(data, tmp_path, opened, is_embedded):
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


def test_blank_means_one_color_in_every_mode():
    blank = [Image.new("RGBA", (5, 4), (1, 2, 3, 4)), Image.new("I;16", (5, 4), 700), Image.new("1", (5, 4))]
    for image in [*blank, noise(0), Image.linear_gradient("L")]:
        buffer = shared_images.io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        stored = shared_images.StoredImage("train", "a", len(content), lambda c=content: shared_images.io.BytesIO(c))
        assert shared_images.is_of_one_color(stored) == (image in blank), read_picture(content)
    broken = shared_images.StoredImage("train", "a", 3, lambda: shared_images.io.BytesIO(b"abc"))
    assert not shared_images.is_of_one_color(broken)
