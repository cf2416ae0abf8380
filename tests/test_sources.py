import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sources
from conftest import TOKENS_PER_TILE, picture
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import load_mixture, read_source

from modeling_vitp import ViTPDataCollator

BOXES = "<ref>ship</ref><box>[[0, 12, 1000, 34], [5, 6, 7, 8]]</box> and [0, 1, 2, 1000]"


def turn(role, value):
    return {"from": role, "value": value}


ANNOTATIONS = [
    {"id": 5, "image": "0.png", "conversations": [turn("human", "<image>\nWhere are ships?"), turn("gpt", BOXES)]},
    {
        "image": ["0.png", "sub/1.png"],
        "width": [60, 60],
        "conversations": [
            turn("system", "You compare."),
            turn("human", "Before: <image>\nAfter: <image>\nWhat changed?"),
            turn("gpt", "A <image> of nothing."),
            turn("human", "Sure?"),
            turn("gpt", "Yes"),
        ],
    },
    {"id": 5, "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]},
    {"image": "0.png", "conversations": [turn("human", "What is it?"), turn("gpt", "a tree")]},
    {"image": "0.png", "conversations": [turn("human", "<image><image>"), turn("gpt", "two")]},
    {"image": "0.png", "conversations": [turn("user", "<image>"), turn("bot", "three")]},
    {"image": "", "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]},
    {"video": "a.mp4", "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]},
]
ERRORS = {
    5: "it has 1 image(s), but 2 image place(s)",
    6: "message 1 has the role 'bot'",
    8: "it is a video",
    9: "line 9 of",
    10: "is no JSON",
}
IMAGE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


@pytest.fixture
def folder(tmp_path):
    """InternVL JSON Lines with images, the same rows as a JSON list, and two lines that are broken."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    picture(60, 56, 0).save(tmp_path / "images" / "0.png")
    picture(60, 56, 1).save(tmp_path / "images" / "sub" / "1.png")
    with open(tmp_path / "a.jsonl", "wb") as file:
        for annotation in ANNOTATIONS:
            file.write(json.dumps(annotation).encode() + b"\n")
        file.write(b'{"image": "0.png", "conver\n\xff\xfe\n')
    (tmp_path / "a.json").write_text(json.dumps(ANNOTATIONS))
    return tmp_path


def source(root, /, **fields):
    fields = {"name": "s", **({"rows": 9} if fields.get("streaming") else {}), **fields}
    return load_mixture({"root": str(root), "sources": [fields]}).sources[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_internvl_json_lines_survive_the_trip(folder, processor, streaming):
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
    assert rows[2]["messages"] == [
        {"role": "system", "content": [text("You compare.")]},
        {
            "role": "user",
            "content": [text("Before: "), IMAGE, text("After: "), IMAGE, text("What changed?")],
        },
        {"role": "assistant", "content": [text("A <image> of nothing.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes")]},
    ]
    assert rows[3]["images"] == rows[7]["images"] == []
    assert rows[4]["messages"][0]["content"] == [IMAGE, text("What is it?")]

    collator = ViTPDataCollator(processor)
    batch = collator([rows[number] for number in (1, 2, 3, 4)])
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [
        images * TOKENS_PER_TILE for images in (1, 2, 0, 1)
    ]
    decoded = processor.tokenizer.batch_decode(batch["input_ids"])
    assert BOXES in decoded[0]
    tile = "<img>" + "<IMG_CONTEXT>" * TOKENS_PER_TILE + "</img>"
    assert f"<|im_start|>user\nBefore: {tile}\nAfter: {tile}\nWhat changed?<|im_end|>" in decoded[1]
    with pytest.raises(ValueError, match="Sample '9': line 9 of .*a.jsonl is no JSON"):
        collator([rows[9]])


def test_a_json_list_gives_the_same_rows(folder):
    lines = list(read_source(source(folder, annotation="a.jsonl", image_root="images")))
    listed = list(read_source(source(folder, annotation="a.json", image_root="images")))
    assert [row["messages"] for row in listed] == [row["messages"] for row in lines[:8]]
    assert [row["id"] for row in listed] == [str(number) for number in range(8)]


def test_a_file_that_changes_is_read_again(folder):
    rows = source(folder, annotation="a.jsonl", image_root="images")
    assert len(read_source(rows)) == 10
    with open(folder / "a.jsonl", "a") as file:
        file.write(json.dumps(ANNOTATIONS[0]) + "\n")
    assert len(read_source(rows)) == 11


MESSAGES = List({"role": Value("string"), "content": Value("string")})


@pytest.fixture
def parquet(tmp_path):
    """A folder of Parquet in the schema of the README, with columns of other names beside."""
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]
    rows = [
        {"uid": f"u{n}", "images": [picture(20 + n, 20)] * (n % 3), "messages": turns, "q": "Where?", "a": n % 2}
        for n in range(6)
    ]
    features = Features(
        {
            "uid": Value("string"),
            "images": List(ImageFeature()),
            "messages": MESSAGES,
            "q": Value("string"),
            "a": ClassLabel(names=["ship", "plane"]),
        }
    )
    (tmp_path / "parquet").mkdir()
    dataset = Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    dataset.select(range(2)).to_parquet(tmp_path / "parquet" / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet(parquet, processor, streaming):
    rows = list(read_source(source(parquet, folder="parquet", streaming=streaming)))
    assert [row["id"] for row in rows] == list("012345")
    assert [len(row["images"]) for row in rows] == [0, 1, 2, 0, 1, 2]
    assert all(image["bytes"].startswith(b"\x89PNG") for row in rows for image in row["images"])
    assert rows[2]["messages"][0]["content"] == [IMAGE, IMAGE, text("How many?")]
    assert ViTPDataCollator(processor)(rows)["pixel_values"].shape[0] == 6

    mapped = {"id": "uid", "question": "q", "answer": "a"}
    test = list(read_source(source(parquet, folder="parquet", split="test", columns=mapped, streaming=streaming)))
    assert [row["id"] for row in test] == ["u0", "u1"]
    assert [row["messages"][1]["content"][0]["text"] for row in test] == ["ship", "plane"]
    assert test[1]["messages"][0]["content"] == [IMAGE, text("Where?")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_with_a_folder_for_each_class(tmp_path, streaming):
    for number, name in enumerate(("ship", "plane")):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture(30, 20 + number).save(tmp_path / "data" / name / "1.jpg")
    entry = {"folder": "data", "columns": {"answer": "label"}, "prompt": "What is it?", "streaming": streaming}
    rows = list(read_source(source(tmp_path, **entry)))
    for row in rows:
        assert row["messages"][0]["content"] == [IMAGE, text("What is it?")]
        assert Path(row["images"][0]["path"]).parent.name == row["messages"][1]["content"][0]["text"]
    assert {row["messages"][1]["content"][0]["text"] for row in rows} == {"ship", "plane"}


def test_rows_can_be_taken_by_number_and_split_up(parquet):
    dataset = read_source(source(parquet, folder="parquet"))
    assert dataset[4]["id"] == "4" and dataset[1:3]["id"] == ["1", "2"]
    assert [row["id"] for row in dataset.shard(2, 1, contiguous=False)] == ["1", "3", "5"]
    assert [row["id"] for row in dataset.select([5, 0])] == ["5", "0"]


@settings(max_examples=50, deadline=None)
@given(
    pieces=st.lists(
        st.text("ab<>\n []", max_size=6).filter(lambda piece: "<image>" not in piece), min_size=1, max_size=4
    )
)
def test_image_places_are_found_wherever_they_stand(pieces):
    messages = sources.normalise([turn("human", "<image>".join(pieces)), turn("gpt", "x")], len(pieces) - 1)
    rebuilt = "".join("<image>" if part["type"] == "image" else part["text"] for part in messages[0]["content"])
    assert rebuilt == "<image>".join([pieces[0], *(piece.removeprefix("\n") for piece in pieces[1:])])


@pytest.fixture
def meta(folder):
    entries = {
        "first": {"root": "images", "annotation": "a.jsonl", "repeat_time": 0.25, "length": 10, "data_augment": True},
        "second": {
            "root": "images",
            "annotation": "a.jsonl",
            "repeat_time": 3,
            "length": 10,
            "data_augment": False,
            "max_dynamic_patch": 6,
            "force_image_size": 224,
        },
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder


def test_a_released_meta_json_is_a_mixture(meta, monkeypatch, caplog):
    monkeypatch.chdir(meta)
    with caplog.at_level(logging.WARNING):
        first, second = load_mixture("meta.json").sources
    assert (first.name, first.rate, first.rows, first.max_patches) == ("first", 0.25, 10, None)
    assert (second.rate, second.max_patches, second.image_size) == (3, 6, 224)
    assert not first.jpeg_degradation and not first.first_rows
    assert len(read_source(second)) == 10
    warnings = [record.getMessage() for record in caplog.records]
    assert [message.split(" in ")[-1].split(".")[0] for message in warnings] == ["first", "second", "first"]
    for message, words in zip(
        warnings, ("a rate below 1 takes random rows, there", "image_size is applied", "data_augment")
    ):
        assert "The released code differs" in message and words.split(",")[0] in message

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        first, second = load_mixture({"released_compatible": True, "sources": [{"meta": "meta.json"}]}).sources
    assert first.first_rows and first.jpeg_degradation and not second.jpeg_degradation
    assert second.image_size is None
    assert len(caplog.records) == 3
    assert all("released_compatible: " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "s", "anotation": "a.jsonl"}, "source 's': unknown key 'anotation'"),
        ({"annotation": "a.jsonl"}, "source 0: a source needs a name"),
        ({"name": "s"}, "exactly one of dataset .* it has none"),
        ({"name": "s", "annotation": "a.jsonl", "folder": "b"}, r"exactly one of .* \['folder', 'annotation'\]"),
        ({"name": "s", "annotation": "a.jsonl", "rate": 0}, "rate is 0; it must be above 0"),
        ({"name": "s", "annotation": "a.jsonl", "rate": "2x"}, "rate is '2x', but needs a value of type int or float"),
        ({"name": "s", "annotation": "a.jsonl", "max_patches": True}, "max_patches is True, but needs .* int"),
        ({"name": "s", "annotation": "a.jsonl", "columns": {"images": "x"}}, "columns has no meaning .* annotation"),
        ({"name": "s", "folder": "b", "columns": {"picture": "x"}}, r"not for \['picture'\]"),
        ({"name": "s", "folder": "b", "revision": "main"}, "revision has no meaning for a source with folder"),
        ({"name": "s", "folder": "b", "streaming": True}, "a streaming source needs `rows`"),
        ({"name": "s", "folder": "b", "input_spec": {"band": 1}}, r"input_spec: unknown field\(s\) \['band'\]"),
        ({"meta": "meta.json"}, "meta JSON meta.json cannot be read"),
        ("s", "source 0 is 's', not a mapping"),
    ],
)
def test_mistakes_in_a_mixture_are_named(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_mixture({"sources": [entry]})


def test_mistakes_in_a_mixture_file_are_named(tmp_path):
    entry = "{name: s, folder: b}"
    path = tmp_path / "mixture.yaml"
    for content, message in {
        f"sources: [{entry}, {entry}]": r"the source names \['s'\] are used more than once",
        f"sources: [{entry}]\nresample: never": "resample is 'never'",
        f"sources: [{entry}]\nsource: 1": "mixture.yaml: unknown key 'source'",
        "sources: []": "mixture.yaml: a mixture has a list of `sources`",
        "sources: [": "mixture.yaml is no YAML",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_mixture(path)
    with pytest.raises(ValueError, match="There is no mixture file"):
        load_mixture(tmp_path / "none.yaml")
    path.write_text(f"output_dir: x\nmixture:\n  defaults: {{rate: 2}}\n  sources: [{entry}]")
    assert load_mixture(path).sources[0].rate == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_source_is_named(parquet, streaming):
    def read(**fields):
        return list(read_source(source(parquet, name="harbours", streaming=streaming, **fields)))

    with pytest.raises(ValueError, match="Source 'harbours': .*none.jsonl is not there; obtain it from https://x.org"):
        read(annotation="none.jsonl", obtain="https://x.org")
    with pytest.raises(ValueError, match="Source 'harbours'.* has no column 'caption', only"):
        read(folder="parquet", columns={"answer": "caption"})
    with pytest.raises(ValueError, match="Source 'harbours'.*make no conversation. Say under `columns`"):
        read(folder="parquet", columns={"answer": "a"})
    (parquet / "list.json").write_text('[{"conversations": ')
    with pytest.raises(ValueError, match="Source 'harbours'.*list.json cannot be read: Expecting value"):
        read(annotation="list.json")
    (parquet / "empty").mkdir()
    with pytest.raises(ValueError, match="Source 'harbours'.*neither Parquet files nor images, only nothing"):
        read(folder="empty")
    file = parquet / "parquet" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="Source 'harbours'.*parquet cannot be read: "):
        read(folder="parquet")


def test_the_mixture_of_the_readme_is_one(meta, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme.split("```yaml\nmixture:")[1].split("```")[0]
    (meta / "data").mkdir()
    (meta / "meta.json").rename(meta / "data" / "released_meta.json")
    (meta / "mixture.yaml").write_text("mixture:" + block)
    monkeypatch.chdir(meta)
    names = [source.name for source in load_mixture("mixture.yaml").sources]
    assert names == ["mine", "ships", "grounding", "general", "first", "second"]


# A small Hub: it runs in a process of its own, since the endpoint is read when huggingface_hub is imported.
HUB = r"""
import http.server, json, os, re, sys, threading, time

file, commit, failures, asked = open(sys.argv[1], "rb").read(), "a" * 40, {}, []


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        is_info = re.fullmatch(r"/api/datasets/org/\w+", path)
        kind = "file" if path.endswith(".parquet") else "info" if is_info else "other"
        asked.append(kind)
        if failures.get(kind, 0) > 0:
            failures[kind] -= 1
            return self.answer(503, b"busy")
        entry = {"type": "file", "path": "data/train.parquet", "size": len(file), "oid": "b" * 40}
        if kind == "file":
            headers = {"ETag": '"x"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            part = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if part is None:
                return self.answer(200, file, **headers)
            first, last = int(part[1]), min(int(part[2]), len(file) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(file)}"
            return self.answer(206, file[first : last + 1], **headers)
        if "/tree/" in path:
            folder = {"type": "directory", "path": "data", "oid": "c" * 40}
            return self.answer(200, json.dumps([entry if path.endswith("/data") else folder]).encode())
        found = re.fullmatch(r"/api/datasets/(org/\w+)(/revision/\w+)?", path)
        if found and found[1] != "org/none":
            info = {"id": found[1], "sha": commit, "siblings": [{"rfilename": entry["path"]}]}
            return self.answer(200, json.dumps(info).encode())
        self.answer(404, X_Error_Code="RepoNotFound" if "/none" in path else "EntryNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
os.environ.pop("HF_HUB_OFFLINE", None)

from sources import Source, read_source  # noqa: E402

pauses = []
time.sleep = pauses.append


def read(name, streaming, **busy):
    failures.clear(), pauses.clear(), asked.clear()
    failures.update(busy)
    try:
        rows = read_source(Source("h", dataset=f"org/{name}", streaming=streaming, rows=5))
        found = [row["messages"][1]["content"][0]["text"] for row in rows]
    except ValueError as error:
        found = str(error)
    return {"found": found, "pauses": pauses[:], "asked": asked.count("info")}


results = {}
for streaming in (False, True):
    results[f"{streaming}"] = read(f"harbours{streaming}", streaming, info=2, file=3)
    results[f"{streaming} busy"] = read(f"busy{streaming}", streaming, info=1000)
    results[f"{streaming} none"] = read("none", streaming)
print(json.dumps(results))
"""


def test_a_hub_that_is_busy_is_asked_again_and_one_without_the_data_set_is_not(tmp_path):
    turns = [{"role": "user", "content": "How many?"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": str(n)}]} for n in range(5)]
    Dataset.from_list(rows, features=Features({"messages": MESSAGES})).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "hub.py").write_text(HUB)
    recipes = str(Path(sources.__file__).parent)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([recipes, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "hub.py", "train.parquet"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    for streaming in ("False", "True"):
        assert results[streaming]["found"] == list("01234")
        assert len(results[streaming]["pauses"]) >= 3
        busy = results[f"{streaming} busy"]
        assert busy["found"].startswith("Source 'h'") and f"org/busy{streaming} cannot be read: " in busy["found"]
        assert "503" in busy["found"]
        assert [pause for pause in busy["pauses"] if pause in (1, 2, 4, 8, 16)][:5] == [1, 2, 4, 8, 16]
        assert busy["asked"] >= 6
        none = results[f"{streaming} none"]
        assert none["found"].startswith("Source 'h'") and "org/none" in none["found"]
        assert none["pauses"] == []
