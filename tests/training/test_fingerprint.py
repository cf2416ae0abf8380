"""Changed data are detected on resume."""

import io
import json
import os
import shutil

import dense_data
import numpy as np
import PIL.Image
import pytest
import yaml
from datasets import Dataset, Features, Image, List, load_dataset
from pictures import picture
from row_formats import FORMATS
from training_run import FEATURES, make_rows, make_trainer
from trl import ScriptArguments

from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.sources import open_splits
from modeling_vitp.recipes import finetune_segmentation
from modeling_vitp.training.resuming import fingerprint_data


def changed(rows: Dataset, index: int, answer: str) -> Dataset:
    rows = rows.to_list()
    rows[index]["messages"][1]["content"] = answer
    return Dataset.from_list(rows, features=FEATURES)


def test_changed_answer_changes_fingerprint(tmp_path):
    rows = make_rows(30)
    known = fingerprint_data(rows)
    assert fingerprint_data(make_rows(30)) == known
    rows.save_to_disk(tmp_path / "rows")
    assert fingerprint_data(Dataset.load_from_disk(tmp_path / "rows")) == known
    assert fingerprint_data(prepare_rows(rows)) == known
    for index in (0, 4, 17, 29):
        other = changed(rows, index, "something else")
        assert fingerprint_data(other) != known
        assert fingerprint_data(other.to_iterable_dataset()) != fingerprint_data(rows.to_iterable_dataset())
    assert fingerprint_data(rows.select(range(29))) != known and fingerprint_data(rows.shuffle(seed=1)) != known


def test_changed_pixels_of_equal_size_change_fingerprint():
    """Uncompressed PNG files have equal sizes."""
    features = Features({"images": List(Image())})
    sizes, fingerprints = set(), set()
    for seed in range(40):
        pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        pixels[seed % 24, seed // 24] = 255 - pixels[seed % 24, seed // 24]
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
        sizes.add(len(buffer.getvalue()))
        rows = {"images": [[{"bytes": buffer.getvalue(), "path": None}]]}
        fingerprints.add(json.dumps(fingerprint_data(Dataset.from_dict(rows, features=features))))
    assert len(sizes) == 1 and len(fingerprints) == 40


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_changed_rows_are_refused(tmp_path, stream, caplog):
    make_trainer(tmp_path, stream=stream, max_steps=2, eval_strategy="no").train()
    checkpoint = tmp_path / "kept" / "checkpoint-2"
    shutil.copytree(tmp_path / "checkpoint-2", checkpoint)

    def resume(**options):
        trainer = make_trainer(tmp_path, stream=stream, max_steps=3, eval_strategy="no", save_steps=100, **options)
        # This row is not one of the eight rows in the settings of the run.
        rows = prepare_rows(changed(make_rows(), 4, "other"))
        trainer.train_dataset = rows.to_iterable_dataset(num_shards=2).shuffle(3, buffer_size=3) if stream else rows
        trainer.train(resume_from_checkpoint=str(checkpoint))

    with pytest.raises(ValueError, match="checkpoint-2 was written.*--allow_changed_data"):
        resume()
    resume(allow_changed_data=True)
    assert "Resuming with changed data" in caplog.text


@pytest.fixture
def mixture(tmp_path, data_folder):
    """Return a function that writes a mixture of a folder and an annotation file, and returns its fingerprint."""
    picture(30, 40, 0).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines * 3) + "\n")

    def write(streaming: bool, rate: float = 1, rows: int = 3):
        annotated = {"name": "annotated", "annotation": "rows.jsonl", "image_root": ".", "rate": rate, "rows": rows}
        sources = [{"name": "trees", "folder": "data", "rows": 4}, annotated]
        sources = [{**source, "streaming": streaming} for source in sources]
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sources": sources}))
        return fingerprint_data(open_mixture(load_mixture(str(tmp_path / "mixture.yaml")), 0))

    return write


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_source_is_named(mixture, tmp_path, streaming):
    known = mixture(streaming)
    assert mixture(streaming) == known and set(known) == {"how sources are mixed", "trees", "annotated"}

    def differ():
        now = mixture(streaming)
        return [name for name in known if now[name] != known[name]]

    assert [name for name, value in mixture(streaming, rate=2).items() if value != known[name]] == ["annotated"]
    changed = mixture(streaming, rows=7)
    assert [name for name in known if changed[name] != known[name]] == (["annotated"] if streaming else [])
    file = tmp_path / "rows.jsonl"
    text = file.read_text()
    file.write_text(text.replace("It", "Is"))
    assert differ() == ["annotated"]
    file.write_text(text)
    if not streaming:
        assert differ() == []
        os.utime(tmp_path / "a.png", ns=(1, 1))
        assert differ() == ["annotated"]
    known = mixture(streaming)
    rows = load_dataset("parquet", data_files=str(tmp_path / "data" / "train.parquet"), split="train")
    features, rows = rows.features, rows.to_list()
    rows[2]["messages"][1]["content"] = "4 trees"
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    assert differ() == ["trees"]


def test_stream_fingerprint_changes_with_files(data_folder):
    def stream():
        return fingerprint_data(load_dataset(str(data_folder), streaming=True, split="train"))

    known = stream()
    assert known["stream"] and stream() == known
    os.utime(data_folder / "train.parquet", ns=(1, 1))
    assert stream() != known


def test_stream_fingerprint_changes_with_reader(tmp_path):
    picture(20, 20).save(tmp_path / "0.png")
    row = {"photo": "0.png", "short": "a tree", "long": "a green tree"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    args = ScriptArguments(dataset_name=str(tmp_path), dataset_streaming=True)

    def known(caption="short", prompt=None):
        stream = open_splits(args, columns={"image": "photo", "caption": caption}, prompt=prompt)[0]["train"]
        return fingerprint_data(prepare_rows(stream))["stream"]

    assert known() == known()
    assert len({known(), known("long"), known(prompt="What is it?")}) == 3


@pytest.mark.slow
def test_changed_masks_are_refused(tmp_path):
    dense_data.make_loveda(tmp_path / "data")
    settings = {"submission": None, "num_pictures": 0, "save_steps": 1, "eval_split": None, "train_splits": ["train"]}
    arguments = [dense_data.smoke_arguments("loveda", tmp_path / "data", tmp_path / "out", **settings)]
    assert finetune_segmentation.main(*arguments) == 0
    assert finetune_segmentation.main(*arguments) == 0
    os.utime(next((tmp_path / "data/Train").glob("*/masks_png/*.png")), ns=(1, 1))
    with pytest.raises(ValueError, match="'split 1, files' changed since"):
        finetune_segmentation.main(*arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_json_fingerprint_changes_with_its_file(tmp_path, streaming):
    FORMATS["LLaVA"][0](tmp_path, [picture(20, 20, seed) for seed in range(3)])
    args = ScriptArguments(dataset_name=str(tmp_path), dataset_streaming=streaming)
    known = fingerprint_data(open_splits(args)[0]["train"])
    assert None not in known.values() and fingerprint_data(open_splits(args)[0]["train"]) == known
    file = tmp_path / "llava_instruct.json"
    file.write_text(file.read_text().replace("There are 2 trees", "There are 9 trees"))
    assert fingerprint_data(open_splits(args)[0]["train"]) != known
