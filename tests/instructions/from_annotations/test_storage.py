"""Rows in files of Parquet."""

import io

import pytest
from annotated_images import NAMES, make, write_voc
from datasets import load_dataset
from PIL import Image

from modeling_vitp.instructions.from_annotations import storage


def test_files_end_by_size_and_replace_older_ones(tmp_path):
    def row(index):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format="PNG")
        return {"id": str(index), "images": [{"bytes": buffer.getvalue(), "path": None}], "messages": []}

    size = len(row(0)["images"][0]["bytes"])
    assert len(storage.save_rows(map(row, range(7)), tmp_path, "train", file_bytes=3 * size)) == 3
    assert len(storage.save_rows(map(row, range(4)), tmp_path, "train", file_bytes=3 * size)) == 2
    rows = load_dataset("parquet", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_push_to_hub_uploads_the_folder_as_a_private_data_set(hub, tmp_path, monkeypatch):
    for name, value in hub.environment(tmp_path / "home", hub.token()).items():
        monkeypatch.setenv(name, value)
    write_voc(tmp_path / "data", "train", NAMES["train"][:20])
    make("voc", tmp_path / "data", tmp_path / "out", "--push_to_hub", "tester/ships")
    files = hub.files("tester/ships", repo_type="dataset")
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert hub.repo("tester/ships", "dataset").state["private"]
