"""Malformed rows and mixtures give the valid rows, or an error that names the file and the row."""

import json
import random

import datasets
import pytest
import yaml
from fuzzing import check_outcomes, damage, limits, mutate, outcome
from pictures import picture
from sample_rows import ANNOTATIONS, encoded_image, make_rows, write_annotations

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.mixture import Mixture, load_mixture
from modeling_vitp.instructions.rows import FEATURES
from modeling_vitp.instructions.sample_length import SampleLength
from modeling_vitp.instructions.sources import Source, read_source

pytestmark = pytest.mark.slow
GOOD = [row for row in ANNOTATIONS if "video" not in row][:4]


@pytest.fixture
def folder(tmp_path):
    datasets.disable_progress_bars()
    yield write_annotations(tmp_path)
    datasets.enable_progress_bars()


def written(rng, rows, folder, number):
    """Write JSON Lines in which every second row is mutated and some lines are damaged; return the valid rows."""
    lines, sound = [], []
    for row in rows:
        is_sound = rng.random() < 0.5
        line = json.dumps(row if is_sound else mutate(rng, row, rng.choice([1, 1, 2]))).encode()
        if not is_sound and rng.random() < 0.3:
            line = damage(rng, line).replace(b"\n", b" ").replace(b"\r", b" ")
        if line.strip():
            lines.append(line)
            sound.append(is_sound)
    path = folder / f"{number}.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path, sound


def expected_of(row, folder):
    """Return the first question of a row and its images, by an independent reader."""
    images = row.get("image") or []
    images = images if isinstance(images, list) else [images]
    return [str(folder / "images" / name) for name in images], row["conversations"][-1]["value"]


@pytest.mark.parametrize("streaming", [False, True])
def test_valid_rows_of_malformed_annotations_are_kept(folder, processor, streaming):
    rng, collator = random.Random(1), ViTPDataCollator(processor)
    length = SampleLength.of(collator)
    with limits():
        for number in range(10):
            rows = [rng.choice(GOOD) for _ in range(25)]
            path, sound = written(rng, rows, folder, number)
            source = Source("s", annotation=str(path), image_root=str(folder / "images"), streaming=streaming, rows=25)
            found = outcome(lambda: list(read_source(source)), str(path))  # noqa: B023 called at once
            assert isinstance(found, list), found
            assert len(found) == len(sound)
            for row, is_sound in zip(found, sound):
                assert set(row) == set(FEATURES)
                assert row["error"] is None or not is_sound
                outcome(lambda: collator.encode(row), f"Sample '{row['id']}'")  # noqa: B023
                outcome(lambda: length(row), "")  # noqa: B023
            texts = {json.dumps(expected_of(row, folder)) for row in GOOD}
            for row in (row for row, is_sound in zip(found, sound) if is_sound):
                images = [image["path"] for image in row["images"]]
                assert json.dumps([images, row["messages"][-1]["content"][0]["text"]]) in texts


def test_malformed_python_row_is_named(processor):
    rng, collator = random.Random(2), ViTPDataCollator(processor)
    png = encoded_image(picture(60, 56))
    rows = [{**row, "images": [{"bytes": png, "path": None} for _ in row["images"]]} for row in make_rows()]
    results = []
    with limits():
        for _ in range(300):
            row = rng.choice(rows)
            if rng.random() < 0.2 and row["images"]:
                row = {**row, "images": [{"bytes": damage(rng, png), "path": None}, *row["images"][1:]]}
            else:
                row = mutate(rng, row, rng.choice([1, 2, 3]))
            if isinstance(row, dict):
                results.append(outcome(lambda: collator([row]), "Sample "))  # noqa: B023
    check_outcomes(results, 12)
    assert sum(isinstance(result, ValueError) for result in results) > 75


MIXTURE = {
    "root": "data",
    "modalities": ["optical", "sar"],
    "resample": "epoch",
    "shuffle_buffer": 10,
    "defaults": {"max_patches": 4},
    "sources": [
        {"name": "a", "annotation": "a.jsonl", "image_root": "images", "rate": 2, "modality": "optical"},
        {"name": "b", "folder": "b", "columns": {"answer": "label"}, "prompt": "What?", "tasks": ["vqa"]},
        {"name": "c", "dataset": "org/c", "split": "train", "streaming": True, "rows": 100, "rate": 0.5},
        {"name": "d", "dataset": "org/d", "input_spec": {"bands": [2, 1, 0], "window": [0, 3000]}, "general": True},
    ],
}


META = {}  # in the format of InternVL
for name, rate in (("first", 0.25), ("second", 3)):
    META[name] = {"root": "images", "annotation": "a.jsonl", "repeat_time": rate, "length": 10, "data_augment": False}


@pytest.mark.parametrize(("name", "contents"), [("mixture.yaml", MIXTURE), ("meta.json", META)])
def test_malformed_mixture_is_named(tmp_path, name, contents):
    rng, path = random.Random(3), tmp_path / name
    results = []
    with limits():
        for number in range(300):
            changed = mutate(rng, contents, rng.choice([1, 1, 2]))
            is_json = name.endswith("json")
            text = json.dumps(changed) if is_json else yaml.safe_dump(changed, allow_unicode=True)
            content = text.encode(errors="surrogatepass")
            path.write_bytes(damage(rng, content) if number % 4 == 0 else content)
            results.append(outcome(lambda: load_mixture(path), str(path)))
            assert isinstance(results[-1], (Mixture, ValueError))
    check_outcomes(results, 20)
