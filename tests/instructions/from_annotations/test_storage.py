"""Parquet files with rows, their card, and the command that creates them."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from annotated_images import NAMES, make, write_voc
from datasets import load_dataset
from launching import finish, start_program
from PIL import Image

from modeling_vitp.instructions.from_annotations import storage
from modeling_vitp.recipes import make_instructions


def test_files_are_split_by_size_and_replaced(tmp_path):
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
def test_push_uploads_private_data_set(hub, tmp_path, monkeypatch):
    for name, value in hub.environment(tmp_path / "home", hub.token()).items():
        monkeypatch.setenv(name, value)
    write_voc(tmp_path / "data", "train", NAMES["train"][:20])
    make("voc", tmp_path / "data", tmp_path / "out", "--push_to_hub", "tester/ships")
    files = hub.files("tester/ships", repo_type="dataset")
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert hub.repo("tester/ships", "dataset").state["private"]


def test_second_split_is_added_to_folder(tmp_path):
    root = tmp_path / "data"
    for split, names in NAMES.items():
        write_voc(root, split, names[:10])
    make("voc", root, tmp_path / "out")
    both = make("voc", root, tmp_path / "out", "--split", "test", "--license", "mit")
    assert set(both) == {"train", "test"} and set(both["test"]["id"]) <= set(NAMES["test"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("license: mit") < card.index("# Instructions from data") < card.index("## Split `train`")
    assert card.count("## Split `test`") == card.count("# Instructions from") == 1


@pytest.mark.slow
def test_files_depend_on_seed_only(tmp_path):
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:20])
    for name, seed in (("a", 0), ("c", 5)):
        make("voc", root, tmp_path / name, "--seed", seed)
    command = [sys.executable, make_instructions.__file__, "voc", str(root), "--output_dir", str(tmp_path / "b")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "3"})
    a, b, c = ((tmp_path / name / "train-00000.parquet").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_merged_shards_equal_one_run(tmp_path):
    """Merge shards with windows and collages; files of an older division are deleted."""
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:24])
    options = ["--window", "200", "--overlap", "40", "--collages", "0.2", "--collage_size", "112", "--license", "mit"]
    whole = make("voc", root, tmp_path / "rows", *options)["train"]
    card = (tmp_path / "rows" / "README.md").read_text()
    shutil.rmtree(tmp_path / "rows")
    words = ["voc", str(root), "--output_dir", str(tmp_path / "rows"), *options]
    assert make_instructions.main([*words, "--shard", "2/3"]) == 0
    start = [make_instructions.__file__, *words, "--shard"]
    assert finish([start_program([*start, f"{number}/2"], tmp_path / "log") for number in (1, 2)]) == [0, 0]
    files = [f"train-0000{number}-of-00002-00000.parquet" for number in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == files
    parts = make("voc", root, tmp_path / "rows", *options, "--merge", "2")["train"]
    assert (tmp_path / "rows" / "README.md").read_text() == card
    assert len(parts) == len(whole) > 40 and parts.cast(whole.features).to_list() == whole.to_list()

    (tmp_path / "rows" / files[0]).unlink()
    with pytest.raises(ValueError, match=f"{len(whole) // 2} rows of shard 1/2 .*found 0"):
        make_instructions.main([*words, "--merge", "2"])
    make("voc", root, tmp_path / "rows", *options)
    assert [path.name for path in (tmp_path / "rows").glob("*.parquet")] == ["train-00000.parquet"]
