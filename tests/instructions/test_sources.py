import json
import logging
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import CONFIGS
from pictures import picture
from tiny_models import TOKENS_PER_TILE
from trl import ScriptArguments

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.mixture import open_mixture
from modeling_vitp.instructions.mixture_file import Source, load_mixture
from modeling_vitp.instructions.rows import normalise
from modeling_vitp.instructions.sources import load_rows, read_source

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
    """A folder of Parquet in the schema of `recipes/pretrain.md`, with columns of other names beside."""
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
    messages = normalise([turn("human", "<image>".join(pieces)), turn("gpt", "x")], len(pieces) - 1)
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


def test_the_mixture_of_the_page_is_one(meta, monkeypatch):
    page = (CONFIGS / "README.md").read_text()
    block = page.split("```yaml\nmixture:")[1].split("```")[0]
    (meta / "data").mkdir()
    (meta / "meta.json").rename(meta / "data" / "released_meta.json")
    (meta / "mixture.yaml").write_text("mixture:" + block)
    monkeypatch.chdir(meta)
    names = [source.name for source in load_mixture("mixture.yaml").sources]
    assert names == ["mine", "ships", "grounding", "general", "first", "second"]


@pytest.fixture
def harbours(hub, tmp_path):
    """Eleven rows in two files on a Hub, the answers of which are their numbers."""
    (tmp_path / "data").mkdir()
    for part, numbers in enumerate([range(8), range(8, 11)]):
        turns = [[{"role": "user", "content": "How many?"}, {"role": "assistant", "content": str(n)}] for n in numbers]
        path = tmp_path / f"data/train-0000{part}-of-00002.parquet"
        Dataset.from_dict({"messages": turns}, features=Features({"messages": MESSAGES})).to_parquet(path)
    hub.create("org/harbours", {f"data/{path.name}": path for path in (tmp_path / "data").iterdir()}, "dataset")
    return hub


def answers(streaming, name="harbours"):
    rows = read_source(Source("h", dataset=f"org/{name}", streaming=streaming, rows=11))
    return [row["messages"][1]["content"][0]["text"] for row in rows]


@pytest.mark.parametrize("failure", [{"status": 503}, {"status": 500}, {"status": 429, "retry_after": 3}, {"cut": 100}])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_is_busy_is_asked_again(harbours, pauses, streaming, failure):
    """Before the first row and, in a stream, between two rows, where the client itself gives up after six times."""
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


def test_a_mixture_of_a_busy_hub_is_that_of_a_calm_one(harbours, pauses):
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
def test_a_hub_that_stays_busy_is_named_in_the_end(harbours, pauses, streaming):
    asked = harbours.fail("GET", "/api/datasets/*", 503, times=None)
    with pytest.raises(ValueError, match="Source 'h'.*: org/harbours cannot be read: .*503"):
        answers(streaming)
    assert [pause for pause in pauses if pause in (1, 2, 4, 8, 16)][:5] == [1, 2, 4, 8, 16]
    assert asked.count >= 6


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo"), (404, "EntryNotFound")])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_hub_refuses_is_named_at_once(harbours, pauses, streaming, status, code):
    harbours.fail("*", "*/train-00001-of-00002.parquet", status, code=code, message="No entry.", times=None)
    place = "Source 'h', row 8: " if streaming else "Source 'h': "
    with pytest.raises(ValueError, match=f"^{place}org/harbours cannot be read: {status} Client Error.*No entry.$"):
        answers(streaming)
    assert pauses == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_is_not_on_the_hub_or_private(harbours, pauses, streaming):
    harbours.create("org/private", repo_type="dataset", private=True)
    for name in ("none", "private"):
        with pytest.raises(ValueError, match=f"Source 'h'.*: org/{name} cannot be read: Dataset 'org/{name}' doesn't"):
            answers(streaming, name)
    assert pauses == []


def test_a_data_set_without_a_mixture_is_asked_for_again_too(harbours, pauses):
    failure = harbours.fail("GET", "/api/datasets/*", 503, times=3)
    splits = load_rows(ScriptArguments(dataset_name="org/harbours"))
    assert splits.num_rows == {"train": 11}
    assert failure.count == 3 and pauses == [1, 2, 4]
