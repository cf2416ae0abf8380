"""A validation in shards, by processes beside each other, is that of one run."""

import json
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from pictures import picture

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.command.paths import Shard
from modeling_vitp.recipes import validate_data

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


def row(index: int) -> dict:
    """Numbers 7, 17, … are the same; every third has a box without area, more than a report names."""
    index = 7 if index % 10 == 7 else index
    box = f"[[0, {index}, {0 if index % 3 == 0 else 9}, 1000]]"
    messages = [{"role": "user", "content": "Where is the tree?"}]
    messages += [{"role": "assistant", "content": f"<ref>tree</ref><box>{box}</box>"}]
    return {"id": str(index), "images": [picture(40 + index % 5, 30, index)], "messages": messages}


@pytest.fixture
def mixture(tmp_path):
    for name in ("stored", "stream"):
        (tmp_path / name).mkdir()
    rows = [row(index) for index in range(97)]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "stored" / "train.parquet")
    Dataset.from_list(rows[40:71], features=FEATURES).to_parquet(tmp_path / "stream" / "train.parquet")
    sources = [{"name": "stored", "folder": "stored", "tasks": ["grounding"]}]
    sources += [{"name": "stream", "folder": "stream", "streaming": True, "rows": 31}]
    sources += [{"name": "absent", "folder": "nowhere"}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sources": sources}))
    return tmp_path / "mixture.yaml"


def command(mixture, checkpoint, folder, *options) -> list[str]:
    words = ["--processor", str(checkpoint), "--against", str(folder / "test"), "--num_workers", "0"]
    return [str(mixture), *words, "--output_dir", str(folder), *options]


@pytest.mark.slow
def test_two_processes_give_the_report_of_one_run(mixture, model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    out, report, picture_file = tmp_path / "out", tmp_path / "out" / "report.json", tmp_path / "out" / "histograms.png"
    (out / "test").mkdir(parents=True)
    for index in (50, 90):
        row(index)["images"][0].save(out / "test" / f"{index}.png")
    words = command(mixture, tmp_path / "checkpoint", out)
    assert validate_data.main(words) == 1
    whole, drawn = json.loads(report.read_text()), picture_file.read_bytes()
    found = whole["sources"]["stored"]
    assert found["rows"] == 97 and found["problems"]["duplicate"] == 8 and found["problems"]["overlap"] == 2
    assert found["problems"]["box"] > len(found["examples"]["box"]) == 20
    assert whole["sources"]["stream"]["rows"] == whole["sources"]["stream"]["problems"]["duplicate"] == 31
    assert whole["sources"]["absent"]["error"]
    report.unlink(), picture_file.unlink()

    starts = [sys.executable, "-m", "modeling_vitp.recipes.validate_data", *words]
    running = [subprocess.Popen([*starts, "--shard", f"{number}/2"]) for number in (1, 2)]
    assert [process.wait(timeout=400) for process in running] == [0, 0] and not report.exists()
    parts = [json.loads((out / "shards" / f"{number}-of-2.json").read_text()) for number in (1, 2)]
    rows = [[part["sources"][name]["rows"] for part in parts] for name in ("stored", "stream")]
    assert rows == [[48, 49], [16, 15]]
    lines = [json.loads(line) for part in (1, 2) for line in (out / "shards" / f"{part}-of-2.jsonl").open()]
    assert sorted(line[:2] for line in lines) == [[0, n] for n in range(97)] + [[1, n] for n in range(31)]
    assert validate_data.main([*words, "--merge", "2"]) == 1
    assert json.loads(report.read_text()) == whole and picture_file.read_bytes() == drawn

    with pytest.raises(ValueError, match="3 of 3 shards are not in .*: give --shard 1/3 first"):
        validate_data.main([*words, "--merge", "3"])
    with pytest.raises(ValueError, match="Shard 1/2 in .* was made with another --max_length: give --shard 1/2 again"):
        validate_data.main([*words, "--merge", "2", "--max_length", "99"])


@pytest.mark.parametrize("text", ["3/2", "0/2", "a/b", "1", "1/0", "-1/2", "1/2/3", "½/2"])
def test_a_shard_that_cannot_be_is_one_line_before_anything_is_read(text, tmp_path):
    with pytest.raises(WrongArguments) as caught:
        validate_data.main([str(tmp_path), f"--shard={text}"])
    assert str(caught.value) == f"argument --shard: {text!r} is no shard: of eight they are 1/8, 2/8 … 8/8."


def test_parts_of_all_shards_one_after_another_are_everything_in_order():
    for count in range(1, 9):
        for length in (0, 1, 5, 97):
            parts = [shard.part(length) for shard in Shard.all_of(count)]
            assert [place for part in parts for place in part] == list(range(length))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
