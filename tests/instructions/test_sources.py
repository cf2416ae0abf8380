"""Sources of all file types, local and on a Hub, as sources of a mixture and by `dataset_name`."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from pictures import picture
from row_formats import FORMATS, answer, question, save_images, turns, write_archive
from sample_rows import ANNOTATIONS, BOXES, encoded_image, text, turn, write_annotations
from tiny_models import TOKENS_PER_TILE
from trl import ScriptArguments

from modeling_vitp import ViTPDataCollator
from modeling_vitp.data.rows import folder_cache
from modeling_vitp.instructions.mixture import load_mixture, load_sources, open_mixture
from modeling_vitp.instructions.rows import images_of, load_images
from modeling_vitp.instructions.schemas import schema_name
from modeling_vitp.instructions.sources import (
    Source,
    annotation_files,
    is_in_lines,
    load_rows,
    open_splits,
    read_source,
    split_in_path,
)

ERRORS = {
    5: "it has 1 image(s), but 2 image place(s)",
    6: "message 1 has the unknown role 'bot'",
    8: "videos are not supported",
    9: "line 9 of",
    10: "is not valid JSON",
}


IMAGE = {"type": "image", "text": None}
PICTURES = [picture(30, 20, seed) for seed in range(4)]
MESSAGES = List({"role": Value("string"), "content": Value("string")})
HOW_MANY = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]


def counted(number):
    return {"messages": [HOW_MANY[0], {**HOW_MANY[1], "content": str(number)}]}


def answer_text(row):
    return row["messages"][1]["content"][0]["text"]


@pytest.fixture
def folder(tmp_path):
    return write_annotations(tmp_path)


def source(root, /, **fields):
    fields = {"name": "s", **({"rows": 9} if fields.get("streaming") else {}), **fields}
    return load_mixture({"root": str(root), "sources": [fields]}).sources[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_internvl_json_lines_are_read_exactly(folder, processor, streaming):
    dataset = read_source(source(folder, annotation="a.jsonl", image_root="images", streaming=streaming))
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    rows = {int(row["id"]): row for row in dataset}
    assert list(rows) == list(range(1, 11))
    assert {row["source"] for row in rows.values()} == {"s"}
    for number, row in rows.items():
        assert (row["error"] is None) == (number not in ERRORS)
        assert ERRORS.get(number, "") in (row["error"] or "")
    root = folder / "images"
    assert rows[1]["images"] == [{"path": str(root / "0.png"), "bytes": None}]
    assert rows[1]["messages"] == [
        {"role": "user", "content": [IMAGE, text("Where are ships?")]},
        {"role": "assistant", "content": [text(BOXES)]},
    ]
    assert [image["path"] for image in rows[2]["images"]] == [str(root / "0.png"), str(root / "sub" / "1.png")]
    changed = [text("Before: "), IMAGE, text("After: "), IMAGE, text("What changed?")]
    assert rows[2]["messages"] == [
        {"role": "system", "content": [text("You compare.")]},
        {"role": "user", "content": changed},
        {"role": "assistant", "content": [text("A <image> of nothing.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes")]},
    ]
    assert rows[3]["images"] == rows[7]["images"] == []
    assert rows[4]["messages"][0]["content"] == [IMAGE, text("What is it?")]

    collator = ViTPDataCollator(processor)
    batch = collator([rows[number] for number in (1, 2, 3, 4)])
    num_visual = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert num_visual.tolist() == [images * TOKENS_PER_TILE for images in (1, 2, 0, 1)]
    decoded = processor.tokenizer.batch_decode(batch["input_ids"])
    tile = "<img>" + "<IMG_CONTEXT>" * TOKENS_PER_TILE + "</img>"
    assert BOXES in decoded[0]
    assert f"<|im_start|>user\nBefore: {tile}\nAfter: {tile}\nWhat changed?<|im_end|>" in decoded[1]
    with pytest.raises(ValueError, match="Sample '9': line 9 of .*a.jsonl"):
        collator([rows[9]])


def test_changed_file_is_read_again(folder):
    rows = source(folder, annotation="a.jsonl", image_root="images")
    assert len(read_source(rows)) == 10
    with open(folder / "a.jsonl", "a") as file:
        file.write(json.dumps(ANNOTATIONS[0]) + "\n")
    assert len(read_source(rows)) == 11


def of_parts(value):
    return {"conversations": [turn("human", [text(value)]), turn("gpt", "ok")]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "odd",
    [3, None, ["x"], "\ud800"],
    ids=lambda odd: type(odd).__name__ + str(odd).isascii() * "-",
)
def test_non_text_value_is_row_error(tmp_path, odd, streaming):
    texts = ["007", "1.50", "2020-01-01", "true", "null"]
    rows = [of_parts(value) for value in [*texts, odd]] + [{"image": odd, **of_parts("x")}, {"image": [odd]}]
    rows += [{"conversations": [{"from": odd, "value": "x"}]}, {"conversations": [odd]}, {"conversations": odd}, [odd]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(read_source(source(tmp_path, annotation="a.jsonl", streaming=streaming)))
    assert [row["messages"][0]["content"][0]["text"] for row in found[:5]] == texts
    is_image = odd in (None, ["x"])  # `None` is no image, and the list is a path.
    assert [bool(row["error"]) for row in found] == [False] * 5 + [True, not is_image] + [True] * (len(rows) - 7)
    assert "a text in message 0 " in found[5]["error"]


def test_texts_changed_by_reader_raise_error(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"messages": [{"role": "user", "content": [text(value)]}]} for value in ("007", 3)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="data, split 'train': the column 'messages' has texts in some rows"):
            open_splits(ScriptArguments(dataset_name=str(tmp_path / "data"), dataset_streaming=streaming))
        first, second = read_source(source("", dataset=str(tmp_path / "data"), streaming=streaming))
        assert first["messages"][0]["content"] == [text("007")] and "'3' of type int" in second["error"]


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 4], ["3", "4"]), (["007", "1.5"], ["007", "1.5"]), ([None, 2.5], 0)]
)
def test_answers_keep_their_spelling(tmp_path, values, expected):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"question": ["q", "q"], "answer": values}).to_parquet(tmp_path / "data" / "train.parquet")
    rows = list(read_source(source(tmp_path, folder="data")))
    if expected:
        assert [answer_text(row) for row in rows] == expected
    else:
        assert "'2.5' of type float" in rows[1]["error"]


@pytest.fixture
def parquet(tmp_path):
    """Write a folder of Parquet files in the schema of `recipes/pretrain.md`, with additional columns."""
    rows = [
        {"uid": f"u{n}", "images": [picture(20 + n, 20)] * (n % 3), "messages": HOW_MANY, "q": "Where?", "a": n % 2}
        for n in range(6)
    ]
    features = {"uid": Value("string"), "images": List(ImageFeature()), "messages": MESSAGES, "q": Value("string")}
    features["a"] = ClassLabel(names=["ship", "plane"])
    (tmp_path / "parquet").mkdir()
    dataset = Dataset.from_list(rows, features=Features(features))
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    dataset.select(range(2)).to_parquet(tmp_path / "parquet" / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder_is_read(parquet, processor, streaming):
    rows = list(read_source(source(parquet, folder="parquet", streaming=streaming)))
    assert [row["id"] for row in rows] == list("012345")
    assert [len(row["images"]) for row in rows] == [0, 1, 2, 0, 1, 2]
    assert all(image["bytes"].startswith(b"\x89PNG") for row in rows for image in row["images"])
    assert rows[2]["messages"][0]["content"] == [IMAGE, IMAGE, text("How many?")]
    assert ViTPDataCollator(processor)(rows)["pixel_values"].shape[0] == 6

    mapped = {"id": "uid", "question": "q", "answer": "a"}
    test = list(read_source(source(parquet, folder="parquet", split="test", columns=mapped, streaming=streaming)))
    assert [row["id"] for row in test] == ["u0", "u1"]
    assert [answer_text(row) for row in test] == ["ship", "plane"]
    assert test[1]["messages"][0]["content"] == [IMAGE, text("Where?")]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_are_read(tmp_path, streaming):
    for number, name in enumerate(("ship", "plane")):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture(30, 20 + number).save(tmp_path / "data" / name / "1.jpg")
    entry = {"folder": "data", "columns": {"answer": "label"}, "prompt": "What is it?", "streaming": streaming}
    rows = list(read_source(source(tmp_path, **entry)))
    for row in rows:
        assert row["messages"][0]["content"] == [IMAGE, text("What is it?")]
        assert Path(row["images"][0]["path"]).parent.name == answer_text(row)
    assert {answer_text(row) for row in rows} == {"ship", "plane"}


@pytest.fixture
def harbours(hub, tmp_path):
    """Upload eleven rows in two files to a Hub; the answers are the row numbers."""
    (tmp_path / "data").mkdir()
    for part, numbers in enumerate([range(8), range(8, 11)]):
        rows = Dataset.from_list([counted(number) for number in numbers], features=Features({"messages": MESSAGES}))
        rows.to_parquet(tmp_path / f"data/train-0000{part}-of-00002.parquet")
    hub.create("org/harbours", {f"data/{path.name}": path for path in (tmp_path / "data").iterdir()}, "dataset")
    return hub


def answers(streaming):
    rows = read_source(Source("h", dataset="org/harbours", streaming=streaming, rows=11))
    return [answer_text(row) for row in rows]


@pytest.mark.parametrize("failure", [{"status": 503}, {"status": 429, "retry_after": 3}, {"cut": 100}])
@pytest.mark.parametrize("streaming", [False, True])
def test_busy_hub_is_retried(harbours, pauses, streaming, failure):
    """Fail before the first row and, in a stream, between two rows, more often than the client itself retries."""
    second = harbours.repo("org/harbours", "dataset").files("main")["data/train-00001-of-00002.parquet"]["sha256"]
    failures = [
        harbours.fail("GET", "/api/datasets/*", times=2, **failure),
        harbours.fail("GET", f"/lfs/*/{second}", times=8 if streaming else 3, **failure),
    ]
    assert answers(streaming) == [str(number) for number in range(11)]
    assert [failure.count for failure in failures] == [2, 8 if streaming else 3]
    assert len(pauses) >= 4
    if "retry_after" in failure:
        assert 4 in pauses


@pytest.mark.slow
def test_busy_hub_does_not_change_mixture(harbours, pauses):
    sources = [
        {"name": "twice", "dataset": "org/harbours", "streaming": True, "rows": 11, "rate": 2},
        {"name": "half", "dataset": "org/harbours", "rate": 0.5},
    ]
    mixture = load_mixture({"sources": sources, "shuffle_buffer": 4})
    calm = list(open_mixture(mixture, seed=0))
    failure = harbours.fail("GET", "/lfs/*", 500, times=8, after=1)
    assert list(open_mixture(mixture, seed=0)) == calm
    assert failure.count == 8 and len({row["id"] for row in calm}) == len(calm) == 22 + 6


@pytest.mark.parametrize("streaming", [False, True])
def test_permanently_busy_hub_is_named(harbours, pauses, streaming):
    asked = harbours.fail("GET", "/api/datasets/*", 503, times=None)
    with pytest.raises(ValueError, match="Source 'h'.*: org/harbours cannot be read: .*503"):
        answers(streaming)
    assert [pause for pause in pauses if pause in (1, 2, 4, 8, 16)][:5] == [1, 2, 4, 8, 16]
    assert asked.count >= 6


@pytest.mark.parametrize(("status", "code"), [(403, "GatedRepo"), (404, "EntryNotFound")])
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_refusal_is_not_retried(harbours, pauses, streaming, status, code):
    harbours.fail("*", "*/train-00001-of-00002.parquet", status, code=code, message="No entry.", times=None)
    place = "Source 'h', row 8: " if streaming else "Source 'h': "
    with pytest.raises(ValueError, match=f"^{place}org/harbours cannot be read: {status} Client Error.*No entry.$"):
        answers(streaming)
    assert pauses == []


def test_folders_of_one_name_have_their_own_rows(tmp_path):
    """`datasets` alone would read the cache of the first folder for the second one, because both have a card."""
    for name in ("one", "other"):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        row = {"id": name, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": name}]}
        Dataset.from_list([row]).to_parquet(folder / "train.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
        )
        source = Source("train", dataset=str(folder))
        assert [message["content"][-1]["text"] for message in read_source(source)[0]["messages"]] == ["?", name]


def test_changed_folder_is_read_again(data_folder):
    before = folder_cache(data_folder)
    assert folder_cache(data_folder) == before
    (data_folder / "train.parquet").write_bytes(b"changed")
    assert folder_cache(data_folder) != before


def write_lines(path, good, bad):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), *bad, b"", json.dumps(good[1]).encode()]))


BAD_LINES = [b'{"image": "0.png", "conv', b"\xff\xfe", b"[" * 100_000, b"3", b"[]", b"1" * 5000, b"NaN", b"null"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["annotation", "dataset", "folder"])
def test_bad_line_is_row_error(tmp_path, kind, streaming):
    good = [counted(0.5), counted(1.5)]
    file = tmp_path / {"annotation": "a.jsonl", "dataset": "d/train.jsonl", "folder": "f/metadata.jsonl"}[kind]
    if kind == "folder":
        good = [{"file_name": f"{n}.png", "question": "Where?", "answer": n + 0.5} for n in range(2)]
        save_images(file.parent, PICTURES[:2])
        (file.parent / "000.png").rename(file.parent / "0.png")
        (file.parent / "001.png").rename(file.parent / "1.png")
    write_lines(file, good, BAD_LINES)
    place = {"annotation": str(file), "dataset": str(file.parent), "folder": "f"}[kind]
    rows = list(read_source(source(tmp_path, streaming=streaming, **{kind: place})))
    assert len(rows) == len(BAD_LINES) + 2
    assert rows[0]["error"] is rows[-1]["error"] is None
    assert [answer_text(row) for row in (rows[0], rows[-1])] == ["0.5", "1.5"]
    for number, row in enumerate(rows[1:-1], start=2):
        assert f"line {number} of {file}" in row["error"] or "a mapping with `conv" in row["error"]
    if kind == "folder":
        assert rows[-1]["images"][0]["path"] == str(tmp_path / "f" / "1.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_line_on_hub_is_row_error(hub, tmp_path, streaming):
    write_lines(tmp_path / "train.jsonl", [counted(0), counted(1)], BAD_LINES)
    hub.create("org/lines", {"train.jsonl": tmp_path / "train.jsonl"}, "dataset")
    rows = list(read_source(Source("h", dataset="org/lines", streaming=streaming, rows=len(BAD_LINES) + 2)))
    assert [row["id"] for row in rows] == [str(number) for number in range(len(BAD_LINES) + 2)]
    assert [answer_text(rows[place]) for place in (0, -1)] == ["0", "1"]
    for number, row in enumerate(rows[1:-1], start=2):
        assert f"line {number} of " in row["error"] and "train.jsonl" in row["error"]
    if not streaming:
        with pytest.raises(ValueError, match="org/lines cannot be read: line 2 of .*train.jsonl"):
            load_rows(ScriptArguments(dataset_name="org/lines"))


def test_hub_stream_continues_after_bad_line(hub, tmp_path):
    """Damage a line of the second file, which is read after the rows of the first."""
    lines = [json.dumps(counted(number)).encode() for number in range(5)]
    parts = {"train-0.jsonl": lines[:3], "train-1.jsonl": [lines[3], BAD_LINES[0], lines[4]]}
    for name, part in parts.items():
        (tmp_path / name).write_bytes(b"\n".join(part))
    hub.create("org/lines", {name: tmp_path / name for name in parts}, "dataset")
    rows = list(read_source(Source("h", dataset="org/lines", streaming=True, rows=6)))
    texts = [None if row["error"] else answer_text(row) for row in rows]
    assert texts == ["0", "1", "2", "3", None, "4"] and [row["id"] for row in rows] == list("012345")


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_folder_with_metadata(tmp_path, streaming):
    answers = {split: ["2020-01-01", f"{split} 1"] for split in ("train", "test")}
    for split, texts in answers.items():
        names = save_images(tmp_path / "f" / split, PICTURES[:2])
        lines = [{"file_name": name, "question": "Where?", "answer": said} for name, said in zip(names, texts)]
        (tmp_path / "f" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for split, texts in answers.items():
        rows = list(read_source(source(tmp_path, folder="f", split=split, streaming=streaming)))
        assert [answer_text(row) for row in rows] == texts
        assert [row["images"][0]["path"] for row in rows] == [str(tmp_path / "f" / split / name) for name in names]
        assert [row["id"] for row in rows] == ["0", "1"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["annotation", "dataset", "folder"])
def test_image_outside_root_is_row_error(tmp_path, kind, streaming):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "sub", outside):
        folder.mkdir(parents=True)
        picture(20, 20).save(folder / "a.png")
    picture(20, 20).save(root / "a.png")
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "linked").symlink_to(outside)
    inside = ["a.png", "sub/a.png", "sub/../a.png", str(root / "sub" / "a.png"), "inner.png", "missing.png"]
    out = ["../outside/a.png", "sub/../../outside/a.png", str(outside / "a.png"), "link.png", "linked/a.png", ".."]
    key = {"annotation": "image", "dataset": "image", "folder": "file_name"}[kind]
    lines = "\n".join(json.dumps({key: name, "messages": HOW_MANY}) for name in inside + out)
    (root / "metadata.jsonl").write_text(lines)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(lines)
    place = {
        "annotation": {"annotation": str(root / "metadata.jsonl"), "image_root": str(root)},
        "dataset": {"dataset": str(tmp_path / "d"), "image_root": str(root)},
        "folder": {"folder": "root"},
    }[kind]
    rows = list(read_source(source(tmp_path, streaming=streaming, **place)))
    assert [row["error"] is None for row in rows] == [True] * len(inside) + [False] * len(out)
    assert all(str(root) in row["error"] for row in rows[len(inside) :])
    if kind != "folder":
        rows = list(read_source(source(tmp_path, streaming=streaming, **place | {"image_root": str(tmp_path)})))
        assert rows[len(inside) + 2]["error"] is None  # Its absolute path is below the larger root.


def test_absolute_image_path_outside_folder_is_row_error(tmp_path):
    """An absolute path in the first row does not permit other files."""
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "data"):
        picture(20, 20).save(folder / "a.png")
    names = [str(tmp_path / "data" / "a.png"), str(tmp_path / "a.png"), "../a.png"]
    lines = "\n".join(json.dumps({"image": name, "messages": HOW_MANY}) for name in names)
    (tmp_path / "data" / "rows.jsonl").write_text(lines)
    for place in (tmp_path / "data", tmp_path / "data" / "rows.jsonl"):
        assert [row["error"] is None for row in train_rows(place)] == [True, False, False]
        rows = train_rows(place, str(tmp_path))
        assert [row["error"] is None for row in rows][:2] == [True, True]


def test_caption_behind_a_link_is_row_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.txt").write_text("a secret text")
    for name in "ab":
        picture(20, 20).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "a.txt").write_text("two trees")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "secret.txt")
    rows = list(train_rows(tmp_path / "data"))
    assert [row["error"] is None for row in rows] == [True, False]
    assert "b.txt" in rows[1]["error"] and "secret text" not in str(rows)


def train_rows(place, root=None, **options):
    args = ScriptArguments(dataset_name=str(place), **options)
    return open_splits(args, root)[0][args.dataset_train_split]


def spoken(rows):
    """Return questions and answers, and the number of images, of a conversation in any schema."""
    texts = []
    for row in rows:
        assert not row.get("error"), row["error"]
        contents = [message["content"] for message in row["messages"]]
        parts = [one if isinstance(one, str) else "".join(part["text"] or "" for part in one) for one in contents]
        texts.append((*parts, len(images_of(row))))
    return texts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_same_rows_by_name_and_source(tmp_path, name, streaming):
    write, told = FORMATS[name]
    write(tmp_path / "data", PICTURES)
    rows = train_rows(tmp_path / "data", dataset_streaming=streaming)
    expected = [(question(number), answer(number), 1) for number in range(4)]
    assert spoken(rows) == expected and schema_name(rows) == told
    assert spoken(read_source(Source("s", folder=str(tmp_path / "data"), streaming=streaming, rows=4))) == expected


@pytest.mark.parametrize("name", ["LLaVA", "messages"])
def test_part_of_split_is_selected(tmp_path, name):
    FORMATS[name][0](tmp_path / "data", PICTURES)

    def numbers(part, streaming=False):
        rows = train_rows(tmp_path / "data", dataset_train_split=part, dataset_streaming=streaming)
        return [int(said.split()[2]) for _, said, _ in spoken(rows)]

    for streaming in (False, True):
        assert numbers("train[:2]", streaming) == [0, 1]
        assert numbers("train[1:3]", streaming) == [1, 2]
        assert numbers("train[3:]", streaming) == [3]
    assert numbers("train[50%:]") == [2, 3]
    assert numbers("train[3:]+train[:1]") == [3, 0]
    assert numbers("train[2:100]") == [2, 3]


def test_split_is_read_from_path(tmp_path):
    names = save_images(tmp_path / "images" / "train", PICTURES)
    for file, number in (("llava_train.json", 3), ("llava_val.json", 1)):
        rows = [{"image": f"train/{name}", "conversations": turns(0)} for name in names[:number]]
        (tmp_path / file).write_text(json.dumps(rows))
    assert {split: len(files) for split, files in annotation_files(tmp_path).items()} == {"train": 1, "validation": 1}
    opened, splits = open_splits(ScriptArguments(dataset_name=str(tmp_path), dataset_test_split="validation"))
    assert splits == ["train", "validation"]
    assert [len(opened[name]) for name in splits] == [3, 1] and len(spoken(opened["train"])) == 3
    paths = "Training/a.json", "dev.json", "a/test/b.json", "restraint.json"
    assert [split_in_path(Path(path)) for path in paths] == ["train", "validation", "test", "train"]


def test_json_without_conversations_is_not_read(tmp_path):
    for name, content in {"classes.json": {"a": 1}, "lines.json": {"question": "q", "answer": "a"}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert [path.name for path in annotation_files(tmp_path)["train"]] == ["lines.json"]


def test_bad_line_of_json_file_is_row_error(tmp_path):
    file = tmp_path / "rows.json"
    rows = [json.dumps({"question": question(number), "answer": answer(number)}) for number in range(3)]
    file.write_text("\n".join([rows[0], rows[1][:-9], rows[2]]))
    errors = [row["error"] for row in read_source(Source("s", annotation=str(file)))]
    assert errors[0] is errors[2] is None and "line 2 of" in errors[1]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_lines_in_json_file_are_recognized(tmp_path, indent):
    file = tmp_path / "rows.json"
    rows = [{"q": question(number), "a": answer(number)} for number in range(2)]
    file.write_text("\n".join(json.dumps(row, indent=indent) for row in rows))
    assert is_in_lines(file) is (indent is None)
    if indent is None:
        source = Source("s", folder=str(tmp_path), columns={"question": "q", "answer": "a"})
        assert spoken(read_source(source)) == [(row["q"], row["a"], 0) for row in rows]


@pytest.mark.parametrize("place", ["", "a.json"])
def test_image_root_follows_the_first_image(tmp_path, place):
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    rows = [{"question": question(0), "answer": answer(0)}] * 30
    (tmp_path / "a.json").write_text(json.dumps([*rows, {**rows[0], "image": name}]))
    assert list(train_rows(tmp_path / place))[30]["images"][0]["path"] == str(tmp_path / "images" / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("file", ["train.csv", "rows.jsonl"])
def test_image_root_follows_the_image_column(tmp_path, file, streaming):
    """Use a column `image` that has no paths."""
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    row = {"question": question(0), "answer": answer(0), "image": "/3", "img": name}
    if file == "train.csv":
        lines = [",".join(values) for values in (row, row.values(), row.values())]
    else:
        lines = [json.dumps(row)] * 2
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    source = Source("s", folder=str(tmp_path), columns={"images": "img"}, streaming=streaming, rows=2)
    rows = list(read_source(source))
    assert [row["images"][0]["path"] for row in rows] == [str(tmp_path / "images" / name)] * 2
    assert spoken(rows) == [(question(0), answer(0), 1)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_may_mix_image_and_images(tmp_path, streaming):
    FORMATS["LLaVA"][0](tmp_path, PICTURES)
    FORMATS["ShareGPT"][0](tmp_path, PICTURES)
    assert [row[2] for row in spoken(train_rows(tmp_path, dataset_streaming=streaming))] == [1] * 8


@pytest.mark.parametrize("streaming", [False, True])
def test_csv_beside_images_is_read(tmp_path, streaming):
    names = save_images(tmp_path / "images", PICTURES)
    file = tmp_path / "train.csv"
    with open(file, "w", newline="") as opened:
        rows = [(name, question(number), answer(number)) for number, name in enumerate(names)]
        csv.writer(opened).writerows([("image", "question", "answer"), *rows])
    for place in (tmp_path, file):
        found = train_rows(place, dataset_streaming=streaming)
        assert spoken(found) == [(question(number), answer(number), 1) for number in range(4)]
        assert next(iter(found))["images"][0]["path"] == str(tmp_path / "images" / names[0])
    (source,) = load_sources(str(file)).sources
    assert len(spoken(read_source(source))) == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("q,a,image", {"columns": {"question": "q", "answer": "a"}}),
        ("label,a,image", {"columns": {"answer": "a"}, "prompt": question(0)}),
        ("question,answer,image,messages", {"columns": {"question": "question", "answer": "answer"}}),
    ],
)
def test_csv_columns_can_be_mapped(tmp_path, header, options, streaming):
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    (tmp_path / "train.csv").write_text(f"{header}\n{question(0)},{answer(0)},{name}{',' * (header.count(',') - 2)}\n")
    (tmp_path / "classes.csv").write_text("id,name\n0,tree\n")
    rows = read_source(Source("s", folder=str(tmp_path), streaming=streaming, rows=1, **options))
    assert spoken(rows) == [(question(0), answer(0), 1)]


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_unpaired_quotation_mark_is_row_error(tmp_path, suffix, mark):
    """Otherwise the first caption would be all text up to the next such mark, and its rows would be lost."""
    names = save_images(tmp_path, PICTURES)
    captions = ['"A road', "A ship", '"Big" tree', '"A ""red"" car"']
    lines = [f"{name}{mark}{caption}\n" for name, caption in zip(names, captions)]
    (tmp_path / f"train{suffix}").write_text(f"image{mark}caption\n" + "".join(lines))
    damaged, whole = train_rows(tmp_path)
    assert f"line 4 of {tmp_path}/train{suffix}: " in damaged["error"]
    assert whole["messages"][1]["content"] == [text('A "red" car')]


@pytest.mark.parametrize("place", [{"folder": ""}, {"annotation": "rows.jsonl"}], ids=["folder", "annotation"])
def test_missing_column_of_json_is_named(tmp_path, place):
    names = save_images(tmp_path, PICTURES)
    rows = [{"name": name, "image": name, "conversations": turns(0)} for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = {key: str(tmp_path / value) for key, value in place.items()}
    assert [row["id"] for row in read_source(Source("s", **place, columns={"id": "name"}))] == names
    with pytest.raises(ValueError, match="'s'.*column 'nmae' not found.*conversations"):
        read_source(Source("s", **place, columns={"id": "nmae"}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", [{"folder": ""}, {"dataset": "rows.jsonl"}], ids=["folder", "file"])
def test_empty_column_is_not_replaced_by_another(tmp_path, place, streaming):
    first, second = save_images(tmp_path, PICTURES[:2])
    rows = [
        {"photo": first, "alt": "a field", "text": "noise", "image": second},
        {"photo": first, "alt": None, "text": "noise"},
        {"photo": None, "alt": "a field", "image": second},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = {key: str(tmp_path / value) for key, value in place.items()}
    columns = source("", **place, columns={"image": "photo", "caption": "alt"}).columns
    if "folder" in place:
        found = list(read_source(Source("s", **place, columns=columns, streaming=streaming)))
    else:
        args = ScriptArguments(dataset_name=place["dataset"], dataset_streaming=streaming)
        found = list(open_splits(args, columns=columns)[0]["train"])
    assert [Path(image["path"]).name for row in found for image in row["images"]] == [first]
    assert found[0]["messages"][1]["content"] == [text("a field")]
    assert ["caption" in (row["error"] or "") for row in found] == [False, True, True]


def test_load_sources_accepts_mixtures_recipes_and_names(tmp_path):
    FORMATS["LLaVA"][0](tmp_path / "data", PICTURES)
    FORMATS["messages"][0](tmp_path / "tables", PICTURES)
    recipe, mixture = tmp_path / "recipe.yaml", tmp_path / "mixture.yaml"
    recipe.write_text(f"dataset_name: {tmp_path / 'data'}\nmax_steps: 3\n")
    mixture.write_text(f"mixture: {{sources: [{{name: s, folder: {tmp_path / 'data'}}}]}}\n")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"m": {"root": str(tmp_path), "annotation": str(tmp_path / "none.jsonl")}}))
    file = tmp_path / "data" / "llava_instruct.json"
    for name in (tmp_path / "data", tmp_path / "tables", recipe, mixture, file):
        (source,) = load_sources(str(name)).sources
        assert len(read_source(source)) == 4
    assert load_sources(str(meta)).sources[0].name == "m"
    assert load_sources("my-org/my-data").sources == (Source("my-data", dataset="my-org/my-data"),)
    for name in ("mixtures.yaml", "none/mixture.yaml"):
        with pytest.raises(ValueError, match=f"Mixture file {name} not found"):
            load_sources(name)
    for name in (f"{tmp_path}/dat", f"{tmp_path}/data,tables"):
        with pytest.raises(ValueError, match=f"{name}'.*'{tmp_path}/"):
            load_sources(name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["prompts and completions", "WebDataset"])
def test_hub_data_set_equals_folder(tmp_path, hub, name, streaming):
    FORMATS[name][0](tmp_path / "data", PICTURES)
    hub.create("org/data", {path.name: path for path in (tmp_path / "data").iterdir()}, "dataset")
    rows = train_rows("org/data", dataset_streaming=streaming)
    assert spoken(rows) == [(question(number), answer(number), 1) for number in range(4)]
    assert schema_name(rows) == FORMATS[name][1]


SAID = {"question": question(0), "answer": answer(0)}


def late(*samples):
    """Write seven samples with an image, more than `datasets` inspects, and then those of `samples`."""
    files = {}
    for number, sample in enumerate([{"png": encoded_image(PICTURES[0])}] * 7 + list(samples)):
        sample = {"json": json.dumps(SAID).encode(), **sample}
        files |= {f"{number:03d}.{name}": content for name, content in sample.items()}
    return files


@pytest.mark.parametrize("streaming", [False, True])
def test_web_dataset_images_keep_their_order(tmp_path, streaming):
    before, after = map(encoded_image, PICTURES[:2])
    numbered = {f"{number}.png": [before, after][number % 2] for number in (0, 1, 10, 2)}
    listed = {"json": json.dumps(SAID | {"image": ["001.before.png", "001.after.png"]}).encode()}
    plain = {"json": json.dumps(SAID).encode()}
    samples = [{**plain, **numbered}, {**listed, "after.png": after, "before.png": before}]
    samples.append({**plain, "s2.png": before, "s1_radar.png": after})
    files = [(f"{key:03d}.{name}", content) for key, sample in enumerate(samples) for name, content in sample.items()]
    write_archive(tmp_path / "train.tar", dict(files))
    rows = [[image["bytes"] for image in row["images"]] for row in train_rows(tmp_path, dataset_streaming=streaming)]
    assert rows == [[before, after, before, before], [before, after], [before, after]]


@pytest.mark.parametrize("streaming", [False, True])
def test_late_web_dataset_sample_keeps_all_files(tmp_path, streaming):
    image = encoded_image(PICTURES[1])
    told = json.dumps({**SAID, "system": "Count."}).encode()
    files = late(
        {"jpg": image}, {"0.png": image, "1.png": image}, {}, {"json": told}, {"mp4": b"video"}, {"json": b"{"}
    )
    write_archive(tmp_path / "train.tar", files)
    source = Source("s", folder=str(tmp_path), streaming=streaming, rows=13)
    for rows in (train_rows(tmp_path, dataset_streaming=streaming), read_source(source)):
        rows = list(rows)
        assert [len(row["images"]) for row in rows] == [1] * 8 + [2] + [0] * 4
        assert rows[7]["images"][0] == {"path": "007.jpg", "bytes": image}
        assert [message["role"] for message in rows[10]["messages"]] == ["system", "user", "assistant"]
        assert [number for number, row in enumerate(rows) if row["error"]] == [11, 12]
        assert "videos are not supported" in rows[11]["error"]
        assert rows[12]["error"].startswith(f"sample 012 of {tmp_path / 'train.tar'}: 012.json is not valid JSON")


@pytest.mark.parametrize("streaming", [False, True])
def test_web_dataset_samples_may_differ(tmp_path, streaming):
    write_archive(tmp_path / "train.tar", dict(reversed(late({"jpg": encoded_image(PICTURES[1])}, {}).items())))
    assert [row[2] for row in spoken(train_rows(tmp_path, dataset_streaming=streaming))] == [0] + [1] * 8


def cut_tar(folder):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(folder / "0.png", "0.png")
    (folder / "0.png").unlink()
    (folder / "a.tar").write_bytes(b"no archive" + content.getvalue())


DAMAGED = {
    "metadata.jsonl": lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a tr'),
    "metadata.csv": lambda folder: (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n0.png,a,b,c\n"),
    "a.tar": cut_tar,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_named(name, tmp_path):
    picture(20, 20, 0).save(tmp_path / "0.png")
    DAMAGED[name](tmp_path)
    with pytest.raises(ValueError, match=f"^[^\n]*{tmp_path}/{name}"):
        list(read_source(Source(name="a", dataset=str(tmp_path))))


def test_missing_image_is_named_in_the_folder_of_the_others(tmp_path):
    """Check a table none of whose first rows has an image."""
    (tmp_path / "photos").mkdir()
    picture(20, 20, 0).save(tmp_path / "photos" / "other.png")
    (tmp_path / "rows.csv").write_text("image,text\na.png,a tree\nb.png,a house\n")
    rows = read_source(Source(name="a", folder=str(tmp_path)))
    with pytest.raises(ValueError, match=f"{tmp_path}/photos/a.png"):
        load_images(rows[0])
