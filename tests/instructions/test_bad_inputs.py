"""Invalid inputs: the error names the invalid item."""

import json

import numpy as np
import pytest
from datasets import Dataset
from pictures import picture
from PIL import Image
from row_formats import FORMATS, save_images, turns
from sample_rows import ANSWER, PLACE, USER, make_rows, text
from trl import ScriptArguments

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.schemas import recognize
from modeling_vitp.instructions.sources import Source, open_splits, read_source

LATER = [USER, ANSWER, USER]


def asked(*parts):
    return {"role": "user", "content": list(parts)}


def answered(content):
    return {"role": "assistant", "content": content}


# Changes of a valid row, and the text that the error must match.
ROWS = {
    "unreadable bytes": ({"images": [picture(56, 56), {"bytes": b"no image", "path": None}]}, "image 1 "),
    "missing file": ({"images": ["missing.png"]}, r"image 0 \(missing.png\).*`image_root`"),
    "zero-size image": ({"images": [Image.new("RGB", (0, 9))]}, "0 x 9 pixels"),
    "no window": ({"images": [np.zeros((9, 9), np.int16)]}, "input_spec=.*window"),
    "too many images": ({"images": [picture(56, 56)] * 2, "messages": [asked(PLACE), ANSWER]}, r"\b2\b.*\b1\b"),
    "too few for <image>": ({"messages": [{"role": "user", "content": "<image> <image>?"}, ANSWER]}, r"\b1\b.*\b2\b"),
    "image token": ({"messages": [{**USER, "content": "<IMG_CONTEXT>\nHow many?"}, ANSWER]}, "<IMG_CONTEXT>"),
    "image token in an answer": ({"messages": [USER, answered("</img>")]}, "message 1 .*</img>"),
    "unknown role": ({"messages": [{"role": "human", "content": "How many?"}, ANSWER]}, "message 0 .*'human'"),
    "empty answer": ({"messages": [*LATER, answered([text(""), text(" \n")])]}, "message 3 "),
    "image in an answer": ({"messages": [USER, answered([PLACE, text("12")])]}, "message 1 "),
    "no assistant turn": ({"messages": [USER]}, "assistant"),
    "answer before a question": ({"messages": [ANSWER, USER]}, "message 0 "),
    "part of unknown type": ({"messages": [asked(PLACE, {"type": "video"}), ANSWER]}, "message 0 .*video"),
    "wrong columns": ({"messages": None, "prompt": [USER]}, "'messages'.*'prompt'"),
    "an error of its own": ({"error": "line 9 of a.jsonl is broken"}, "line 9 of a.jsonl is broken"),
}


@pytest.mark.parametrize("name", ROWS)
def test_invalid_row_is_named(processor, name):
    changes, named = ROWS[name]
    row = {"id": "bad-7", "images": [picture(100, 60)], "messages": [USER, ANSWER], **changes}
    with pytest.raises(ValueError, match=f"(?s)^Sample 'bad-7': .*{named}"):
        ViTPDataCollator(processor, vrl_drop_ratio=0.75)([make_rows()[0], row])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vrl_drop_ratio": 1}, "vrl_drop_ratio"),
        ({"answer_mask_ratio": 1.5}, "answer_mask_ratio"),
        ({"color_jitter": {"hue": 0.1}}, "'hue'"),
        ({"on_error": "skip"}, "replacement_rows"),
        ({"on_error": "ignore"}, "'ignore'"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8"),
    ],
)
def test_invalid_collator_option_is_named(processor, options, named):
    with pytest.raises(ValueError, match=named):
        ViTPDataCollator(processor, **options)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["label", "width"], r"\['label', 'width'\]"),
        (["img", "body"], r"\['img', 'body'\].*{\"image\": \"img\", \"caption\": \"body\"}"),
        (["img", "study", "body"], r'{"image": "img", "caption": "body"}.*{"image": "img", "question": "study"'),
        ([], "found none"),
        (["messages", "prompt", "completion"], "messages and prompts and completions"),
    ],
)
def test_ambiguous_columns_are_listed(names, named):
    with pytest.raises(ValueError, match=named):
        recognize(names)


SOURCE = {"name": "s", "annotation": "a.jsonl"}
MIXTURES = [
    ({"name": "s", "anotation": "a.jsonl"}, "'s': .*'anotation'"),
    ({"name": "s"}, "dataset"),
    (SOURCE | {"folder": "b"}, r"\['folder', 'annotation'\]"),
    (SOURCE | {"columns": {"images": "x"}}, "columns .* annotation"),
    ({"name": "s", "folder": "b", "columns": {"picture": "x"}}, "'s': columns: .*'picture'"),
    ({"name": "s", "folder": "b", "revision": "main"}, "revision .* folder"),
    ({"name": "s", "folder": "b", "streaming": True}, "`rows`"),
    ({"name": "s", "annotation": "a.parquet"}, "'s': .*a.parquet"),
]


@pytest.mark.parametrize(("entry", "named"), MIXTURES)
def test_invalid_mixture_source_is_named(entry, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        load_mixture({"sources": [entry]})


def test_fractional_rate_of_released_mixture_is_refused():
    with pytest.raises(ValueError, match="rate .* 2.5"):
        load_mixture({"sources": [SOURCE | {"rate": 2.5}], "released_compatible": True})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("sources: [{name: s, folder: b}, {name: s, folder: b}]", r"mixture.yaml: .*\['s'\]"),
        ("sources: [{name: s, folder: b}]\nresample: never", "resample .*'never'"),
        ("sources: [{name: s, folder: b}]\ndefaults: {rte: 2}", "defaults: .*'rte'"),
        ("sources: []", "mixture.yaml: .*`sources`"),
        ("sources: [", "mixture.yaml"),
        (None, "mixture.yaml"),
    ],
)
def test_invalid_mixture_file_is_named(tmp_path, content, named):
    path = tmp_path / "mixture.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=named):
        load_mixture(path)


def test_nested_mixture_file_is_missing_or_a_cycle(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"mixture: {tmp_path / 'none.yaml'}")
    with pytest.raises(ValueError, match="recipe.yaml: .*none.yaml"):
        load_mixture(path)
    path.write_text(f"mixture: {tmp_path / 'b.yaml'}")
    (tmp_path / "b.yaml").write_text(f"mixture: {path}")
    with pytest.raises(ValueError, match=f"b.yaml .* {path}"):
        load_mixture(path)


@pytest.fixture
def broken(tmp_path):
    """Write unreadable files and folders, which are named after their defects."""
    for name in ("parquet", "cut"):
        FORMATS["messages"][0](tmp_path / name, [picture(20, 20)] * 3)
    file = tmp_path / "cut" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text('[{"conversations": ')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.json").write_text("[]")
    tables = {
        "wide/rows.jsonl": '{"image": "000.png", "caption": "A road"}\n'.encode("utf-16"),
        "latin/rows.json": '[{"image": "ä.png"}]'.encode("latin-1"),
        "latin table/rows.csv": "image,caption\n000.png,forêt\n".encode("latin-1"),
    }
    for name, content in tables.items():
        save_images((tmp_path / name).parent, [picture(8, 8)])
        (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.csv").write_text("question,answer\nq,a\n")
    return tmp_path


SOURCES = [
    ({"annotation": "none.jsonl", "obtain": "https://x.org"}, "none.jsonl .*https://x.org"),
    ({"annotation": "list.json"}, "list.json"),
    ({"folder": "parquet", "columns": {"answer": "caption"}}, "'caption'"),
    ({"folder": "parquet", "columns": {"answer": "images"}}, "`columns`"),
    ({"folder": "empty"}, "empty, found nothing"),
    ({"annotation": "empty.json"}, "empty.json"),
    ({"annotation": "empty.jsonl"}, "empty.jsonl"),
    ({"folder": "wide"}, "line 1 of .*rows.jsonl"),
    ({"folder": "cut"}, "cut .*"),
    ({"folder": "latin"}, "rows.json .*UTF-8"),
    ({"folder": "latin table"}, "rows.csv: .*UTF-8"),
    ({"dataset": "rows.csv"}, "rows.csv .*`annotation`"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("fields", "named"), SOURCES, ids=lambda value: str(value)[:40])
def test_unreadable_source_is_named(broken, fields, named, streaming):
    places = {key: str(broken / fields[key]) for key in ("annotation", "folder", "dataset") if key in fields}
    with pytest.raises(ValueError, match=f"Source 'harbours'.*{named}"):
        list(read_source(Source("harbours", **{**fields, **places}, streaming=streaming, rows=3)))


def open_train(place, split="train", **options):
    return open_splits(ScriptArguments(dataset_name=str(place), dataset_train_split=split, **options))[0][split]


def test_unreadable_data_set_is_named(tmp_path):
    files = {
        "llava.json": (json.dumps([{"conversations": turns(0)}] * 3)[:-30], "llava.json"),
        "train.jsonl": ('{"messages": []}\n{"mess', "line 2 of .*train.jsonl"),
        "rows.json": (json.dumps([{"note": "a"}]), "'train': .*'note'"),
    }
    for name, (content, named) in files.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
            open_train(tmp_path)
        (tmp_path / name).unlink()
    rows = Dataset.from_list([{"messages": [], "question": "q", "answer": "a"}])
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="'train': .*messages and questions"):
        open_train(tmp_path)


@pytest.mark.parametrize(
    ("split", "streaming", "named"),
    [
        ("train[4:]", False, r"train\[4:\]"),
        ("train[:1]+train[3:]", True, "of a stream"),
        ("all", False, r"'all' not found .*\['train'\]"),
    ],
)
@pytest.mark.parametrize("name", ["LLaVA", "messages"])
def test_invalid_part_of_split_is_named(tmp_path, name, split, streaming, named):
    FORMATS[name][0](tmp_path / "data", [picture(20, 20)] * 4)
    with pytest.raises(ValueError, match=named):
        open_train(tmp_path / "data", split, dataset_streaming=streaming)
