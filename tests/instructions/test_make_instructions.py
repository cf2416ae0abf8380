import os
import shutil
import subprocess
import sys

import pytest
from annotated_images import NAMES, make, write_voc

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.recipes import make_instructions


@pytest.mark.slow
def test_another_process_makes_the_same_bytes_and_another_seed_does_not(tmp_path):
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:20])
    for name, seed in (("a", 0), ("c", 5)):
        make("voc", root, tmp_path / name, "--seed", seed)
    command = [sys.executable, make_instructions.__file__, "voc", str(root), "--output_dir", str(tmp_path / "b")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "3"})
    a, b, c = ((tmp_path / name / "train-00000.parquet").read_bytes() for name in "abc")
    assert a == b != c


def test_kinds_that_the_annotation_cannot_answer_are_refused(tmp_path):
    with pytest.raises(WrongArguments, match="folders cannot answer counting"):
        make_instructions.main(["folders", str(tmp_path), "--output_dir", str(tmp_path), "--kinds", "counting"])


@pytest.mark.slow
def test_two_processes_make_the_rows_and_the_card_of_one_run(tmp_path):
    """Windows and collages too, whose questions depend on all images; what an older division has left goes."""
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:24])
    options = ["--window", "200", "--overlap", "40", "--collages", "0.2", "--collage_size", "112", "--license", "mit"]
    whole = make("voc", root, tmp_path / "rows", *options)["train"]
    card = (tmp_path / "rows" / "README.md").read_text()
    shutil.rmtree(tmp_path / "rows")
    words = ["voc", str(root), "--output_dir", str(tmp_path / "rows"), *options]
    assert make_instructions.main([*words, "--shard", "2/3"]) == 0
    command = [sys.executable, make_instructions.__file__, *words]
    running = [subprocess.Popen([*command, "--shard", f"{number}/2"]) for number in (1, 2)]
    assert [process.wait(timeout=400) for process in running] == [0, 0]
    files = [f"train-0000{number}-of-00002-00000.parquet" for number in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == files
    parts = make("voc", root, tmp_path / "rows", *options, "--merge", "2")["train"]
    assert (tmp_path / "rows" / "README.md").read_text() == card
    assert len(parts) == len(whole) > 40 and parts.cast(whole.features).to_list() == whole.to_list()

    (tmp_path / "rows" / files[0]).unlink()
    with pytest.raises(ValueError, match=rf"has 0 of the {len(whole) // 2} rows of shard 1/2: give --shard 1/2 again"):
        make_instructions.main([*words, "--merge", "2"])
    make("voc", root, tmp_path / "rows", *options)
    assert [path.name for path in (tmp_path / "rows").glob("*.parquet")] == ["train-00000.parquet"]


@pytest.mark.parametrize("text", ["3/2", "a/b"])
def test_a_shard_that_cannot_be_is_one_line(text, tmp_path):
    with pytest.raises(WrongArguments, match=f"argument --shard: '{text}' is no shard: of eight they are 1/8"):
        make_instructions.main(["voc", str(tmp_path), "--output_dir", str(tmp_path), "--shard", text])
