"""Invalid inputs: the error names the invalid item."""

import json

import numpy as np
import pytest
from datasets import Dataset
from pictures import picture
from PIL import Image
from row_formats import FORMATS, save_images, turns
from sample_rows import ANSWER, PLACE, USER, encoded_image, make_rows, text
from trl import ScriptArguments

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.mixture import load_mixture, load_sources
from modeling_vitp.instructions.rows import check_answers, load_images
from modeling_vitp.instructions.schemas import RowReader, recognize, to_conversations
from modeling_vitp.instructions.sources import Source, open_splits, read_source

PNG = encoded_image(picture(100, 60))
LATER = [USER, ANSWER, USER]


def asked(*parts):
    return {"role": "user", "content": list(parts)}


def answered(content):
    return {"role": "assistant", "content": content}


# Changes of a valid row, and the text that the error must match.
ROWS = {
    "unreadable bytes": ({"images": [picture(56, 56), {"bytes": b"no image", "path": None}]}, "image 1 "),
    "truncated png": ({"images": [{"bytes": PNG[:-50], "path": "scene.png"}]}, r"image 0 \(scene.png\).*truncated"),
    "missing file": ({"images": ["missing.png"]}, r"image 0 \(missing.png\).*missing.png .*`image_root`"),
    "missing file in a dict": ({"images": [{"bytes": None, "path": "missing.png"}]}, r"image 0 \(missing.png\)"),
    "neither bytes nor path": ({"images": [picture(56, 56), {"bytes": None, "path": None}]}, "image 1 "),
    "zero-size image": ({"images": [Image.new("RGB", (0, 9))]}, "0 x 9 pixels"),
    "no window": ({"images": [np.zeros((9, 9), np.int16)]}, "int16.*input_spec=.*window"),
    "too many images": ({"images": [picture(56, 56)] * 2, "messages": [asked(PLACE), ANSWER]}, r"\b2\b.*\b1\b"),
    "too few images": ({"images": [], "messages": [asked(PLACE, text("How many?")), ANSWER]}, r"\b0\b.*\b1\b"),
    "too few for <image>": ({"messages": [{"role": "user", "content": "<image> <image>?"}, ANSWER]}, r"\b1\b.*\b2\b"),
    "image token": ({"messages": [{**USER, "content": "<IMG_CONTEXT>\nHow many?"}, ANSWER]}, "0 .*<IMG_CONTEXT>"),
    "image token in a part": ({"messages": [asked(PLACE, text("see <img>")), ANSWER]}, "message 0 .*<img>"),
    "image token in an answer": ({"messages": [USER, answered("</img>")]}, "message 1 .*</img>"),
    "unknown role": ({"messages": [{"role": "human", "content": "How many?"}, ANSWER]}, "message 0 .*'human'.*user"),
    "no role": ({"messages": [{"from": "human", "value": "How many?"}, ANSWER]}, "message 0 .*role"),
    "empty answer": ({"messages": [*LATER, answered(" \n")]}, "message 3 "),
    "empty answer in parts": ({"messages": [*LATER, answered([text(""), text(" ")])]}, "message 3 "),
    "answer without parts": ({"messages": [*LATER, answered([])]}, "message 3 "),
    "answer without content": ({"messages": [*LATER, answered(None)]}, "message 3 "),
    "answer part without text": ({"messages": [USER, answered([text("12"), text(None)])]}, "message 1 .*text"),
    "image in an answer": ({"messages": [USER, answered([PLACE, text("12")])]}, "message 1 has an image"),
    "no assistant turn": ({"messages": [USER]}, "assistant"),
    "answer before a question": ({"messages": [ANSWER, USER]}, "message 0 "),
    "no messages": ({"messages": []}, "messages"),
    "message a string": ({"messages": ["How many?", ANSWER]}, "message 0 "),
    "part a string": ({"messages": [asked("How many?"), ANSWER]}, "message 0 "),
    "part without type": ({"messages": [asked(PLACE, {"text": "How many?"}), ANSWER]}, "message 0 .*type"),
    "part of unknown type": ({"messages": [asked(PLACE, {"type": "video"}), ANSWER]}, "message 0 .*video"),
    "question without content": ({"messages": [{"role": "user"}, ANSWER]}, "message 0 .*content"),
    "answer a number": ({"messages": [USER, answered(12)]}, "message 1 "),
    "wrong columns": ({"messages": None, "prompt": [USER]}, r"'messages'.*\['id', 'images', 'messages', 'prompt'\]"),
    "an error of its own": ({"error": "line 9 of a.jsonl is broken"}, "line 9 of a.jsonl is broken"),
}


@pytest.mark.parametrize("name", ROWS)
def test_invalid_row_is_named(processor, name):
    changes, named = ROWS[name]
    row = {"id": "bad-7", "images": [picture(100, 60)], "messages": [USER, ANSWER], **changes}
    with pytest.raises(ValueError, match=f"(?s)^Sample 'bad-7': .*{named}"):
        ViTPDataCollator(processor, vrl_drop_ratio=0.75)([make_rows()[0], row])


def test_row_without_id_is_named_by_hash(processor):
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^Sample 'content:[0-9a-f]{16}': ") as error:
            ViTPDataCollator(processor)([{"messages": [USER], "images": []}])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    check_answers([{"role": "system", "content": "Be brief."}, USER, ANSWER])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vrl_drop_ratio": 1}, "vrl_drop_ratio"),
        ({"vrl_apply_prob": 2}, "vrl_apply_prob"),
        ({"vrl_warmup_steps": -1}, "vrl_warmup_steps"),
        ({"answer_mask_ratio": 1.5}, "answer_mask_ratio .*1.5"),
        ({"color_jitter": {"gain": 1.5}}, "color_jitter: gain .*1.5"),
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
        (["label", "width"], r"\['label', 'width'\].*LLaVA conversations need conversations, image"),
        (["body", "photo.png"], r"\['body', 'photo.png'\].*\"question\": \"body\""),
        (["img", "body"], r"\['img', 'body'\].*{\"image\": \"img\", \"caption\": \"body\"}"),
        ([], "expected rows, found none"),
        (["messages", "prompt", "completion"], "messages and prompts and completions"),
        (["messages", "conversations", "image"], "messages and LLaVA conversations"),
    ],
)
def test_ambiguous_columns_are_listed(names, named):
    with pytest.raises(ValueError, match=named):
        recognize(names)


def test_unreadable_columns_and_types_are_named():
    with pytest.raises(ValueError, match="'caption'"):
        RowReader.of({"messages": None}, {"answer": "caption"})
    with pytest.raises(ValueError, match="list"):
        to_conversations([{"messages": [USER]}])


SOURCE = {"name": "s", "annotation": "a.jsonl"}
MIXTURES = [
    ({"name": "s", "anotation": "a.jsonl"}, "source 's': unknown key 'anotation'"),
    ({"annotation": "a.jsonl"}, "source 0: .*name"),
    ({"name": "s"}, "exactly one of dataset .* none"),
    (SOURCE | {"folder": "b"}, r"exactly one of .* \['folder', 'annotation'\]"),
    (SOURCE | {"rate": 0}, "rate .* 0"),
    (SOURCE | {"rate": "2x"}, "source 's': rate .* '2x'"),
    (SOURCE | {"rate": 2.5, "released_compatible": True}, "rate .* 2.5"),
    (SOURCE | {"max_patches": True}, "source 's': max_patches .* True"),
    (SOURCE | {"data_augment": "yes"}, "source 's': data_augment .* 'yes'"),
    (SOURCE | {"columns": {"images": "x"}}, "columns .* annotation"),
    ({"name": "s", "folder": "b", "columns": {"picture": "x"}}, "source 's': columns: .*'picture'"),
    ({"name": "s", "folder": "b", "revision": "main"}, "revision .* folder"),
    ({"name": "s", "folder": "b", "streaming": True}, "`rows`"),
    ({"name": "s", "folder": "b", "input_spec": {"band": 1}}, r"input_spec: .*\['band'\]"),
    ({"name": "s", "annotation": "a.parquet"}, "source 's': .*a.parquet"),
    ({"meta": "meta.json"}, "meta.json"),
    ("s", r"sources\[0\] .*'s'"),
]


@pytest.mark.parametrize(("entry", "named"), MIXTURES)
def test_invalid_mixture_source_is_named(entry, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = dict(entry) if isinstance(entry, dict) else entry
    options = {"released_compatible": True} if "released_compatible" in entry else {}
    if options:
        del entry["released_compatible"]
    with pytest.raises(ValueError, match=named):
        load_mixture({"sources": [entry], **options})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("sources: [{name: s, folder: b}, {name: s, folder: b}]", r"mixture.yaml: .*\['s'\]"),
        ("sources: [{name: s, folder: b}]\nresample: never", "resample .*'never'"),
        ("sources: [{name: s, folder: b}]\nshuffle_buffer: 0", "shuffle_buffer .* 0"),
        ("sources: [{name: s, folder: b}]\nsource: 1", "mixture.yaml: unknown key 'source'.*'sources'"),
        ("sources: [{name: s, folder: b}]\ndefaults: {rte: 2}", "defaults: unknown key 'rte'.*'rate'"),
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


def test_invalid_nested_mixture_file_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"mixture: {tmp_path / 'none.yaml'}")
    with pytest.raises(ValueError, match="recipe.yaml: .*none.yaml"):
        load_mixture(path)
    for files in ([path], [path, tmp_path / "b.yaml"], [path, tmp_path / "b.yaml", tmp_path / "c.yaml"]):
        for file, following in zip(files, [*files[1:], path]):
            file.write_text(f"mixture: {following}")
        with pytest.raises(ValueError, match=f"`mixture` of {files[-1]} .* {path}") as error:
            load_mixture(path)
        assert str(error.value).count("recipe.yaml") <= 2


@pytest.mark.parametrize("name", ["none.yaml", "none/at/all", "no name"])
def test_missing_mixture_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name):
        load_sources(name)


@pytest.fixture
def broken(tmp_path):
    """Write unreadable files and folders, which are named after their defects."""
    FORMATS["messages"][0](tmp_path / "parquet", [picture(20, 20)] * 3)
    FORMATS["messages"][0](tmp_path / "cut", [picture(20, 20)] * 3)
    file = tmp_path / "cut" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text('[{"conversations": ')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.json").write_text("[]")
    save_images(tmp_path / "wide", [picture(8, 8)])
    (tmp_path / "wide" / "rows.jsonl").write_text('{"image": "0.png", "caption": "A road"}\n', "utf-16")
    for name, content in {"comma": b'[{"image": "a.png"},]', "latin": '[{"image": "ä.png"}]'.encode("latin-1")}.items():
        save_images(tmp_path / name, [picture(8, 8)])
        (tmp_path / name / "rows.json").write_bytes(content)
    save_images(tmp_path / "latin table", [picture(8, 8)])
    (tmp_path / "latin table/rows.csv").write_bytes("image,caption\n0.png,forêt\n".encode("latin-1"))
    for suffix in ("json", "jsonl", "csv", "tsv"):
        (tmp_path / f"rows.{suffix}").write_text("question,answer\nq,a\n")
    return tmp_path


SOURCES = [
    ({"annotation": "none.jsonl", "obtain": "https://x.org"}, "none.jsonl .*https://x.org"),
    ({"annotation": "list.json"}, "list.json .*Expecting value"),
    ({"folder": "parquet", "columns": {"answer": "caption"}}, "'caption'"),
    ({"folder": "parquet", "columns": {"answer": "images"}}, "`columns`"),
    ({"folder": "empty"}, "empty, found nothing"),
    ({"annotation": "empty.json"}, "empty.json .*expected rows, found none"),
    ({"annotation": "empty.jsonl"}, "empty.jsonl .*expected rows, found none"),
    ({"folder": "wide"}, "line 1 of .*rows.jsonl .*UTF-8"),
    ({"folder": "cut"}, "cut .*"),
    ({"folder": "comma"}, "rows.json .*Expecting value"),
    ({"folder": "latin"}, "rows.json .*UTF-8"),
    ({"folder": "latin table"}, "rows.csv: .*UTF-8"),
    *(({"dataset": f"rows.{suffix}"}, f"rows.{suffix} .*`annotation`") for suffix in ("json", "jsonl", "csv", "tsv")),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("fields", "named"), SOURCES, ids=lambda value: str(value)[:40])
def test_unreadable_source_is_named(broken, fields, named, streaming):
    places = {key: str(broken / fields[key]) for key in ("annotation", "folder", "dataset") if key in fields}
    with pytest.raises(ValueError, match=f"Source 'harbours'.*{named}"):
        list(read_source(Source("harbours", **{**fields, **places}, streaming=streaming, rows=3)))


def open_train(place, split="train", **options):
    return open_splits(ScriptArguments(dataset_name=str(place), dataset_train_split=split, **options))[0][split]


@pytest.mark.parametrize(
    ("write", "named"),
    [
        ({"llava.json": json.dumps([{"conversations": turns(0)}] * 3)[:-30]}, "llava.json"),
        ({"train.jsonl": '{"messages": []}\n{"mess'}, r"line 2 of .*train.jsonl"),
        ({"rows.json": json.dumps([{"note": "a"}]), "a.png": PNG}, "split 'train': the columns"),
        ({"rows.csv": "image,caption\na.png,forêt\n".encode("latin-1"), "a.png": PNG}, "rows.csv: .*UTF-8"),
        ([{"note": "a"}], r"split 'train': the columns \['note'\]"),
        ([{"messages": [], "question": "q", "answer": "a"}], "split 'train': the columns .*messages and questions"),
    ],
    ids=["cut list", "cut line", "columns of json", "latin CSV", "columns", "columns of two"],
)
def test_unreadable_data_set_is_named(tmp_path, write, named):
    if isinstance(write, list):
        Dataset.from_list(write).to_parquet(tmp_path / "train.parquet")
    else:
        for name, content in write.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
        open_train(tmp_path)


@pytest.mark.parametrize(
    ("split", "streaming", "named"),
    [
        ("train[4:]", False, r"train\[4:\]"),
        ("train[:1]+train[3:]", True, "of a stream"),
        ("train[50%:]", True, "of a stream"),
        ("all", False, r"'all' not found .*\['train'\]"),
    ],
)
@pytest.mark.parametrize("name", ["LLaVA", "messages"])
def test_invalid_part_of_split_is_named(tmp_path, name, split, streaming, named):
    FORMATS[name][0](tmp_path / "data", [picture(20, 20)] * 4)
    with pytest.raises(ValueError, match=named):
        open_train(tmp_path / "data", split, dataset_streaming=streaming)


def test_unsupported_file_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt"):
        open_train(tmp_path / "notes.txt")


def test_missing_image_is_named_with_full_path(tmp_path, monkeypatch):
    (tmp_path / "llava.json").write_text(json.dumps([{"image": "0.png", "conversations": turns(0)}]))
    monkeypatch.chdir(tmp_path)
    (row,) = open_train(tmp_path / "llava.json")
    with pytest.raises(ValueError, match=f"{tmp_path}/0.png not found; set `image_root`"):
        load_images(row)
