import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import finish, start_program
from pictures import picture

from modeling_vitp import ViTPDataCollator
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.command.paths import Shard
from modeling_vitp.instructions.from_annotations.storage import FEATURES
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.rows import SourceSettings
from modeling_vitp.instructions.sources import Source
from modeling_vitp.instructions.validation import ERRORS, RowChecker, SourceReport, histogram, validate
from modeling_vitp.recipes import validate_data

NUM_GOOD = 16


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def good_row(index, size=(60, 60)):
    box = f"<ref>tree</ref><box>[[0, {index}, 1000, 1000]]</box>"
    return {"id": str(index), "images": [picture(*size, index)], "messages": talk("Where is the tree?", box)}


def line(answer, image="0.png", question="<image>\nWhat is there?"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"image": image, "conversations": turns})


DONE = {"type": "text", "text": "Done."}
BROKEN = {  # Line of JSON Lines -> problem.
    line("a tree"): None,
    line("a bush", image="nowhere.png"): "image missing",
    line("a bush", image="broken.png"): "image unreadable",
    line("a bush", image="cut.png"): "image unreadable",
    line("a bush", image="bands.tif"): "image not taken",
    line("a bush", question="<image>\n<image>\nWhat is there?"): "image places",
    line("  "): "empty answer",
    '{"image": "0.png", "conv': "malformed",
    json.dumps({"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}): "malformed",
    line("tree[[5, 5, 1001, 50]]"): "loose box",
    line("<ref>tree</ref><box>[[5, 5, 1001, 50]]</box>"): "box",
    line("<ref>tree</ref><box>[[5, 5, 50, 50], [50, 5, 50, 50]]</box>"): "box",
    line("<ref>tree</ref><box>[[0.5, 5, 50, 50]]</box>"): "box",
    line("<ref>tree</ref><box>[[5, 5, 50]]</box>"): "box",
    line("a tree "): None,
    line("a tree  "): None,
    line("many words " * 40): "too long",
    json.dumps({"image": "0.png", "messages": talk("Draw it.", [{"type": "image"}, DONE])}): "empty answer",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "good").mkdir()
    rows = [good_row(index) for index in range(NUM_GOOD)]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "good" / "train.parquet")
    (tmp_path / "images").mkdir()
    picture(80, 50).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "broken.png").write_text("no image")
    bands = np.random.default_rng(0).integers(0, 3000, (4, 50, 80), dtype=np.uint16)
    with rasterio.open(tmp_path / "images" / "bands.tif", "w", "GTiff", 80, 50, 4, dtype="uint16") as file:
        file.write(bands)
    contents = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(contents[: len(contents) // 2])
    (tmp_path / "broken.jsonl").write_text("\n".join([*BROKEN, line("a tree")]) + "\n")
    return tmp_path


@pytest.fixture
def checkpoint(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


GOOD = {"name": "good", "folder": "good", "tasks": ["grounding"]}
BAD = {"name": "bad", "annotation": "broken.jsonl", "image_root": "images"}


def run(files, sources, *options, workers=0):
    (files / "mixture.yaml").write_text(yaml.safe_dump({"root": str(files), "sources": sources}))
    output = files / "output"
    status = validate_data.main(
        [str(files / "mixture.yaml"), "--output_dir", str(output), "--num_workers", str(workers), *map(str, options)]
    )
    return status, json.loads((output / "report.json").read_text())


def test_problems_are_found_in_their_rows(files, checkpoint, capsys):
    status, report = run(files, [GOOD, BAD], "--processor", checkpoint, "--max_length", 120, "--max_patches", 1)
    assert status == 1 and report["passed"] is False
    good, bad = report["sources"]["good"], report["sources"]["bad"]
    assert good["passed"] and good["rows"] == NUM_GOOD and not any(good["problems"].values())
    assert not bad["passed"] and bad["rows"] == len(BROKEN) + 1
    expected = dict.fromkeys([*bad["problems"]], 0) | {"duplicate": 1}
    for kind in filter(None, BROKEN.values()):
        expected[kind] += 1
    assert bad["problems"] == expected and set(expected) == {*ERRORS, "duplicate", "loose box"}
    numbers = {kind: [i for i, found in enumerate(BROKEN.values(), 1) if found == kind] for kind in ERRORS}
    numbers |= {"loose box": [10], "duplicate": [len(BROKEN) + 1]}
    for kind, examples in bad["examples"].items():
        assert [int(example["id"]) for example in examples] == numbers[kind]
    assert "nowhere.png" in bad["examples"]["image missing"][0]["problem"]
    assert "4 bands" in bad["examples"]["image not taken"][0]["problem"]
    assert sum(bad["tokens"]["counts"].values()) < bad["rows"]
    assert (files / "output" / "histograms.png").stat().st_size > 5000
    table = capsys.readouterr().out
    assert f"| good | {NUM_GOOD} |" in table and "bad, row 2: image missing" in table


def test_named_bands_are_accepted(files):
    (files / "bands.jsonl").write_text(line("a tree", image="bands.tif") + "\n")
    source = {"name": "bands", "annotation": "bands.jsonl", "image_root": "images"}
    for spec, status in (({"bands": [2, 1, 0]}, 0), ({"bands": [4, 1, 0]}, 1), (None, 1)):
        found, report = run(files, [source | ({"input_spec": spec} if spec else {})])
        assert (found, report["sources"]["bands"]["problems"]["image not taken"]) == (status, status)
    found, report = run(files, [source], "--input_spec", '{"bands": [2, 1, 0]}')
    assert (found, report["sources"]["bands"]["problems"]["image not taken"]) == (0, 0)


def test_clean_data_pass_and_fill_card(files):
    card = files / "good" / "README.md"
    card.write_text("# Mine\n")
    for _ in range(2):
        status, report = run(files, [GOOD], "--card", card, workers=2)
        assert status == 0 and report["passed"] and report["sources"]["good"]["rows"] == NUM_GOOD
        assert report["sources"]["good"]["tokens"] is None
    text = card.read_text()
    assert text.startswith("# Mine\n\n## Validation\n\n| source | rows |") and text.count("## Validation") == 1


def test_broken_sources_are_reported_and_others_read(files):
    (files / "cut").mkdir()
    contents = (files / "good" / "train.parquet").read_bytes()
    (files / "cut" / "train.parquet").write_bytes(contents[: len(contents) // 2])
    sources = [
        {"name": "absent", "folder": "nowhere", "obtain": "https://example.org/data"},
        {"name": "cut", "folder": "cut"},
        GOOD | {"streaming": True, "rows": NUM_GOOD},
    ]
    status, report = run(files, sources, workers=2)
    assert status == 1
    absent, cut, good = (report["sources"][name] for name in ("absent", "cut", "good"))
    assert "nowhere not found" in absent["error"] and "https://example.org/data" in absent["error"]
    assert "'cut'" in cut["error"] and not cut["passed"]
    assert good["passed"] and good["rows"] == NUM_GOOD


def test_tokens_and_tiles_match_training(processor):
    settings = SourceSettings(max_patches=4, system_prompt="There are trees.")
    settings_of = {"plain": SourceSettings(), "own": settings, "square": SourceSettings(image_size=112)}
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, source_settings=settings_of)
    sizes = [[], [(56, 56)], [(200, 90)], [(300, 60), (56, 120)], [(40, 300)] * 3]
    for name, own in settings_of.items():
        checker = RowChecker(Source(name, folder="x", **dataclasses.asdict(own)), processor, vrl_drop_ratio=0.75)
        for number, row_sizes in enumerate(sizes):
            images = [picture(*size, number) for size in row_sizes]
            content = [{"type": "image", "text": None} for _ in images] + [{"type": "text", "text": "How many trees?"}]
            answer = [{"type": "text", "text": "12 trees in the top left"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            row = {"id": str(number), "images": images, "messages": messages, "source": name, "error": None}
            report, encoded = checker.check(row), collator.encode(row)
            assert report.problems == []
            assert report.tokens == len(encoded["input_ids"])
            assert report.tiles == len(encoded.get("pixel_values", []))


def test_duplicates_are_found_across_sources(files):
    sources = [GOOD, GOOD | {"name": "again"}]
    reports = validate(load_mixture({"root": str(files), "sources": sources}), num_workers=0)
    assert [report.counts["duplicate"] for report in reports] == [0, NUM_GOOD]
    assert all(report.passed for report in reports)


def test_grounding_source_checks_loose_boxes(files):
    reports = validate(load_mixture({"root": str(files), "sources": [BAD | {"tasks": ["grounding"]}]}), num_workers=0)
    assert reports[0].counts["box"] == 5 and reports[0].counts["loose box"] == 0


def test_test_images_in_the_data_are_named(files, tmp_path):
    (tmp_path / "test").mkdir()
    good_row(7)["images"][0].save(tmp_path / "test" / "seven.png")
    picture(60, 60, 1234).save(tmp_path / "test" / "other.png")
    card = tmp_path / "README.md"
    status, report = run(files, [GOOD], "--against", tmp_path / "test", "--card", card)
    assert status == 1 and report["sources"]["good"]["problems"]["overlap"] == 1
    (found,) = report["sources"]["good"]["overlap"]
    assert found == {"id": "7", "image": 0, "test_image": "seven.png", "kind": "same", "score": 1.0}
    assert f"with the test images `{tmp_path / 'test'}`: 1." in card.read_text()


def test_test_images_are_read_with_the_input_spec(files):
    bands = np.random.default_rng(0).integers(0, 256, (5, 50, 80), dtype=np.uint8)
    with rasterio.open(files / "images" / "five.tif", "w", "GTiff", 80, 50, 5, dtype="uint8") as file:
        file.write(bands)
    (files / "test").mkdir()
    shutil.copy(files / "images" / "five.tif", files / "test" / "copy.tif")
    (files / "five.jsonl").write_text(line("a tree", image="five.tif") + "\n")
    source = {"name": "five", "annotation": "five.jsonl", "image_root": "images"}
    options = "--against", files / "test", "--input_spec", '{"bands": [4, 1, 0]}'
    _, report = run(files, [source], *options)
    assert [found["test_image"] for found in report["sources"]["five"]["overlap"]] == ["copy.tif"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1))
def test_histogram_summarizes_all_values(values):
    report = SourceReport("x")
    for value in values:
        report.tokens[value] += 1
    summary, ordered = histogram(report.tokens), sorted(values)
    assert summary["max"] == ordered[-1] and summary["mean"] == pytest.approx(sum(values) / len(values), abs=0.006)
    assert summary["median"] == ordered[(len(values) - 1) // 2]
    assert sum(value <= summary["p95"] for value in values) >= 0.95 * len(values)
    assert torch.tensor(list(summary["counts"].values())).sum() == len(values)


def sharded_row(index: int) -> dict:
    """Return rows: 7, 17, … are equal, and every third has an empty box, more than a report names."""
    index = 7 if index % 10 == 7 else index
    box = f"[[0, {index}, {0 if index % 3 == 0 else 9}, 1000]]"
    messages = [{"role": "user", "content": "Where is the tree?"}]
    messages += [{"role": "assistant", "content": f"<ref>tree</ref><box>{box}</box>"}]
    return {"id": str(index), "images": [picture(40 + index % 5, 30, index)], "messages": messages}


@pytest.fixture
def sharded_mixture(tmp_path):
    for name in ("stored", "stream"):
        (tmp_path / name).mkdir()
    rows = [sharded_row(index) for index in range(97)]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "stored" / "train.parquet")
    Dataset.from_list(rows[40:71], features=FEATURES).to_parquet(tmp_path / "stream" / "train.parquet")
    sources = [{"name": "stored", "folder": "stored", "tasks": ["grounding"]}]
    sources += [{"name": "stream", "folder": "stream", "streaming": True, "rows": 31}]
    sources += [{"name": "absent", "folder": "nowhere"}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sources": sources}))
    return tmp_path / "mixture.yaml"


@pytest.mark.slow
def test_merged_shards_equal_one_run(sharded_mixture, checkpoint, tmp_path):
    out, report, picture_file = tmp_path / "out", tmp_path / "out" / "report.json", tmp_path / "out" / "histograms.png"
    (out / "test").mkdir(parents=True)
    for index in (50, 90):
        sharded_row(index)["images"][0].save(out / "test" / f"{index}.png")
    words = [str(sharded_mixture), "--processor", checkpoint, "--against", str(out / "test"), "--num_workers", "0"]
    words += ["--output_dir", str(out)]
    assert validate_data.main(words) == 1
    whole, drawn = json.loads(report.read_text()), picture_file.read_bytes()
    found = whole["sources"]["stored"]
    assert found["rows"] == 97 and found["problems"]["duplicate"] == 8 and found["problems"]["overlap"] == 2
    assert found["problems"]["box"] > len(found["examples"]["box"]) == 20
    assert whole["sources"]["stream"]["rows"] == whole["sources"]["stream"]["problems"]["duplicate"] == 31
    assert whole["sources"]["absent"]["error"]
    report.unlink(), picture_file.unlink()

    start = ["-m", "modeling_vitp.recipes.validate_data", *words, "--shard"]
    running = [start_program([*start, f"{number}/2"], tmp_path / "log") for number in (1, 2)]
    assert finish(running) == [0, 0] and not report.exists()
    parts = [json.loads((out / "shards" / f"{number}-of-2.json").read_text()) for number in (1, 2)]
    rows = [[part["sources"][name]["rows"] for part in parts] for name in ("stored", "stream")]
    assert rows == [[48, 49], [16, 15]]
    lines = [json.loads(line) for part in (1, 2) for line in (out / "shards" / f"{part}-of-2.jsonl").open()]
    assert sorted(line[:2] for line in lines) == [[0, n] for n in range(97)] + [[1, n] for n in range(31)]
    assert validate_data.main([*words, "--merge", "2"]) == 1
    assert json.loads(report.read_text()) == whole and picture_file.read_bytes() == drawn

    with pytest.raises(ValueError, match="--shard 1/3"):
        validate_data.main([*words, "--merge", "3"])
    with pytest.raises(ValueError, match="--max_length"):
        validate_data.main([*words, "--merge", "2", "--max_length", "99"])


@pytest.mark.parametrize("text", ["3/2", "0/2", "a/b", "-1/2", "1/2/3", "½/2"])
def test_invalid_shard_is_named(text, tmp_path):
    with pytest.raises(WrongArguments, match=f"--shard.*{re.escape(repr(text))}"):
        validate_data.main([str(tmp_path), f"--shard={text}"])


def test_shards_cover_all_rows_in_order():
    for count in range(1, 9):
        for length in (0, 1, 5, 97):
            parts = [shard.part(length) for shard in Shard.all_of(count)]
            assert [place for part in parts for place in part] == list(range(length))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


AFTER_THREADS = """
import sys
import cv2, numpy as np
from modeling_vitp.recipes import validate_data
if __name__ == "__main__":
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 0)
    sys.exit(validate_data.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_forked_workers_do_not_deadlock_with_opencv(files):
    """Run workers after OpenCV has started threads, which would deadlock a forked process."""
    source = {"name": "lines", "annotation": "broken.jsonl", "image_root": "images"}
    (files / "mixture.yaml").write_text(yaml.safe_dump({"root": str(files), "sources": [source]}))
    words = [str(files / "mixture.yaml"), "--num_workers", "1", "--output_dir", str(files / "out")]
    words += ["--against", str(files / "good"), "--against_split", "train"]
    done = subprocess.run([sys.executable, "-c", AFTER_THREADS, *words], timeout=120, capture_output=True, text=True)
    assert done.returncode == 1 and (files / "out" / "report.json").is_file(), done.stderr


def class_folders(root):
    for name in ("bush", "tree"):
        (root / name).mkdir(parents=True)
        picture(40, 40, 0).save(root / name / "a.png")


def yolo(root):
    for name in ("images", "labels"):
        (root / name / "train").mkdir(parents=True)
    picture(40, 40, 0).save(root / "images" / "train" / "a.png")
    (root / "labels" / "train" / "a.txt").write_text("0 .5 .5 .2 .2\n")
    (root / "data.yaml").write_text("names: [ship]\ntrain: images/train\n")


@pytest.mark.parametrize(("write", "layout"), [(class_folders, "folders"), (yolo, "yolo")])
def test_labeled_images_need_instructions(write, layout, tmp_path, capsys):
    write(tmp_path / "labels")
    arguments = [str(tmp_path / "labels"), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    assert validate_data.main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"vitp make_instructions {layout} {tmp_path}/labels" in printed
    assert "reads labels" not in printed and "match no schema" not in printed


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (line("a tree", image="nowhere.png"), "nowhere.png not found"),
        (line("a tree", question="<image>\n<image>\nWhat is there?"), "2 image place(s)"),
    ],
)
def test_faulty_images_are_not_a_missing_column(row, problem, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    arguments = [str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    assert validate_data.main(arguments) == 1
    printed = capsys.readouterr().out
    assert problem in printed and "No row has an image" not in printed
