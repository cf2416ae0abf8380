"""Schemas: a conversation gives the same sample in each schema, and the ids and labels of TRL where TRL reads it."""

import json
import pickle

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from row_formats import MESSAGES
from sample_rows import assert_same, encoded_image, text, turn
from tiny_models import TOKENS_PER_TILE
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions import schemas
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.sample_length import SampleLength
from modeling_vitp.instructions.schemas import SCHEMAS, RowReader, recognize, schema_name, to_conversations
from modeling_vitp.instructions.sources import read_source

PLACE = {"type": "image", "text": None}


@pytest.fixture(scope="module")
def small_processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


def made(row, mapped=None, **options):
    """Return a row that is read by its own columns."""
    stored = {name: value if isinstance(value, dict) else None for name, value in row.items()}
    made = RowReader.of(stored, mapped, **options)(row, "1")
    assert made["error"] is None, made["error"]
    return made


def written(exchanges, images):
    """Return a conversation in each schema; the first of `exchanges` has no image placeholders."""
    named = {"user": "human", "assistant": "gpt"}
    messages = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange)
    ]
    placed = [{**messages[0], "content": "<image>\n" * len(images) + messages[0]["content"]}, *messages[1:]]
    parts, placed_parts = (
        [{"role": one["role"], "content": [text(one["content"])]} for one in turns] for turns in (messages, placed)
    )
    parts[0]["content"] = [{"type": "image"}] * len(images) + parts[0]["content"]
    turns = [turn(named[one["role"]], one["content"]) for one in placed]
    rows = [
        {"messages": messages, "images": images},
        {"messages": placed, "images": images},
        {"messages": parts, "images": images},
        {"messages": placed_parts, "images": images},
        {"messages": turns, "images": images},
        {"conversations": turns, "images": images},
        {"conversations": turns, "image": images},
        {"conversations": turns, "image": images, "width": [56] * len(images), "height": [56] * len(images)},
    ]
    if len(exchanges) == 1:
        question, answer = exchanges[0]
        rows += [
            {"prompt": messages[:1], "completion": messages[1:], "images": images},
            {"prompt": placed[0]["content"], "completion": answer, "images": images},
            {"question": question, "answer": answer, "images": images},
            {"__key__": "a", "__url__": "a.tar", "json": {"conversations": turns}}
            | {f"{n}.png": {"path": "a.png", "bytes": image} for n, image in enumerate(images)},
        ]
    return rows


@settings(max_examples=8, deadline=None)
@given(
    exchanges=st.lists(
        st.tuples(*[st.text("abc 12,<>\n", min_size=1, max_size=12).filter(str.strip)] * 2), min_size=1, max_size=3
    ),
    num_images=st.integers(0, 2),
)
def test_conversation_is_equal_in_every_schema(small_processor, exchanges, num_images):
    images = [encoded_image(picture(56, 56, seed)) for seed in range(num_images)]
    collator = ViTPDataCollator(small_processor, vrl_drop_ratio=0.5)
    stored = [{"path": None, "bytes": image} for image in images]
    rows = written(exchanges, images)
    expected = collator([{"id": "1", "images": stored, "messages": rows[0]["messages"]}])
    for row in rows:
        assert_same(collator([{**made(row), "id": "1"}]), expected)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_schema_is_recognized_by_its_columns(schema):
    found, columns = recognize(["scene", *schema.columns, "image"])
    assert found.turns is schema.turns and columns["images"] == "image"
    assert {found.name, schema.name} in ({schema.name}, {"LLaVA conversations", "ShareGPT conversations"})


def test_mapped_columns_take_precedence():
    names = ["messages", "conversations", "instruction", "output", "picture", "label"]
    assert recognize(names, {"messages": "conversations"})[0].name == "messages"
    schema, columns = recognize(names, {"prompt": "instruction", "completion": "output", "images": "picture"})
    assert schema.name == "prompts and completions"
    assert columns == {"prompt": "instruction", "completion": "output", "images": "picture"}
    assert recognize(names, {"answer": "label"}, prompt="What is it?")[0].name == "questions and answers"
    row = made({"label": "a ship", "messages": []}, {"answer": "label"}, prompt="What is it?")
    assert row["messages"][0]["content"] == [text("What is it?")]


def test_registered_schema_is_recognized_and_read(monkeypatch, tmp_path):
    monkeypatch.setattr(schemas, "SCHEMAS", list(SCHEMAS))

    @schemas.schema("captions", "caption", "image")
    def caption_turns(row):
        return [{"role": "user", "content": "Describe it."}, {"role": "assistant", "content": row["caption"]}]

    rows = Dataset.from_dict({"caption": ["a ship"], "image": ["a.png"]})
    (row,) = read = to_conversations(rows)
    assert schema_name(read) == "captions" and [image["path"] for image in row["images"]] == ["a.png"]
    assert [one["content"] for one in row["messages"]] == [[PLACE, text("Describe it.")], [text("a ship")]]
    rows.rename_column("caption", "label").to_parquet(tmp_path / "train.parquet")
    (source,) = load_mixture(
        {"sources": [{"name": "s", "folder": str(tmp_path), "columns": {"caption": "label"}}]}
    ).sources
    assert read_source(source)[0]["messages"] == row["messages"]


def test_images_come_from_nonempty_column():
    turns = [turn("human", "What is it?"), turn("gpt", "A ship.")]
    read = RowReader.of(dict.fromkeys(["conversations", "image", "images"]))
    for image, images in (("a.png", None), ("a.png", []), (None, ["a.png"]), ("", ["a.png"]), ("a.png", ["a.png"])):
        row = read({"conversations": turns, "image": image, "images": images}, 7)
        assert row["error"] is None and [image["path"] for image in row["images"]] == ["a.png"]
    row = read({"conversations": turns, "image": "b.png", "images": ["a.png"]}, 7)
    assert row["id"] == "7" and "`images` and `image`" in row["error"]


ASKED = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ship."}]


SPOKEN = [
    {"messages": ASKED},
    {"conversations": [turn("human", "What is it?"), turn("gpt", "A ship.")]},
    {"prompt": ASKED[:1], "completion": ASKED[1:]},
    {"question": "What is it?", "answer": "A ship."},
]


@pytest.mark.parametrize("row", SPOKEN, ids=lambda row: next(iter(row)))
def test_system_and_video_columns(row):
    plain = made(row)["messages"]
    for system in (None, ""):
        assert made({**row, "system": system, "video": None, "videos": []})["messages"] == plain
    assert made({**row, "system": "Be short."})["messages"] == [
        {"role": "system", "content": [text("Be short.")]},
        *plain,
    ]
    for beside in ({"video": "v.mp4"}, {"videos": ["v.mp4"]}):
        read = RowReader.of(dict.fromkeys({**row, **beside}))
        assert "videos are not supported" in read({**row, **beside}, 1)["error"]


@pytest.mark.parametrize("first", [turn("system", "Be short."), {"role": "system", "content": [text("Be short.")]}])
def test_conflicting_system_turns_raise_error(first):
    row = {"system": "Be short.", "messages": [first, *ASKED]}
    assert [message["role"] for message in made(row)["messages"]] == ["system", "user", "assistant"]
    wrong = RowReader.of(dict.fromkeys(row))({**row, "system": "Be long."}, 1)
    assert "its `system` is 'Be long.'" in wrong["error"]


def test_turns_of_merged_schemas_are_read():
    """A table of rows with `from` and rows with `role` has both in every turn, empty in the turns without them."""
    shown = [{"conversations": SPOKEN[1]["conversations"]}, {"conversations": ASKED}]
    merged = Dataset.from_list([{"system": "Be short.", **row} for row in shown])
    assert merged[0]["conversations"][0].keys() == {"from", "value", "role", "content"}
    rows = list(to_conversations(merged))
    assert [row["error"] for row in rows] == [None, None]
    assert rows[0]["messages"] == rows[1]["messages"] == made({"system": "Be short.", "messages": ASKED})["messages"]


def test_empty_fields_of_messages_are_ignored(processor):
    """A table has the fields of tool calls and of images in every message and part if any row has them."""
    images, asked = [picture(56, 56)], [{"type": "image"}, text("How many?")]
    plain = [{"role": "user", "content": asked}, {"role": "assistant", "content": [text("3")]}]
    filled = [
        {**turn, "tool_calls": None, "content": [{"text": None, "image": None, **part} for part in turn["content"]]}
        for turn in plain
    ]
    template = processor.chat_template.replace("{{ part['text'] }}", "{{ 'image' in part }}{{ part['text'] }}")
    strict = ViTPProcessor(processor.image_processor, processor.tokenizer, processor.image_seq_length, template)
    for one in (processor, strict):
        expected, found = (
            ViTPDataCollator(one)([{"id": "a", "images": images, "messages": messages}]) for messages in (plain, filled)
        )
        assert_same(found, expected)
        assert SampleLength(one)({"images": images, "messages": filled}) == found["input_ids"].shape[1]


QUESTION, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "12 trees."}


SURE, YES = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}


IMAGES = List(ImageFeature())


def completions(prompt, completion):
    rows = [{"images": [picture(56, 56, n)], "prompt": prompt, "completion": completion} for n in range(2)]
    return Dataset.from_list(rows, features=Features({"images": IMAGES, "prompt": MESSAGES, "completion": MESSAGES}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([QUESTION], [ANSWER]),
        ([{"role": "system", "content": "Count."}, QUESTION, ANSWER, SURE, YES, SURE], [YES, SURE, YES]),
    ],
    ids=["one turn", "turns before and after"],
)
def test_completions_match_trl_ids_and_labels(processor, prompt, completion, streaming):
    """Compare with TRL, except for questions within a completion, which TRL trains on, and the last newline."""
    stored = completions(prompt, completion)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([{**row} for row in stored])
    rows = to_conversations(stored.to_iterable_dataset() if streaming else stored)
    ours = ViTPDataCollator(processor)(list(rows))
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    whole = [{**row, "messages": prompt + completion, "id": "0"} for row in stored]
    is_answer = ViTPDataCollator(processor)(whole)["labels"] != -100
    expected = theirs["labels"].masked_fill(~is_answer, -100)
    assert ours["labels"].tolist() == expected.tolist() and (ours["labels"] != -100).any()


def test_messages_match_trl_ids_and_labels(processor):
    rows = Dataset.from_list(
        [{"images": [picture(56, 56, n)], "messages": [QUESTION, ANSWER, SURE, YES]} for n in range(2)],
        features=Features({"images": IMAGES, "messages": MESSAGES}),
    )
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([{**row} for row in rows])
    assert to_conversations(rows) is rows and schema_name(rows) == "messages"
    ours = ViTPDataCollator(processor)(list(prepare_rows(rows)))
    for name in ("input_ids", "labels", "pixel_values"):
        assert ours[name].tolist() == theirs[name].tolist()


def test_prompt_answers_have_no_labels(processor):
    rows = to_conversations(completions([QUESTION, ANSWER], [SURE]))
    with pytest.raises(ValueError, match="no assistant message to train on"):
        ViTPDataCollator(processor)(list(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_keep_ids_and_encoded_images(processor, streaming):
    rows = [{"id": f"q{n}", "image": picture(56, 56, n), "question": "How many?", "answer": n} for n in range(3)]
    features = {"id": Value("string"), "image": ImageFeature(), "question": Value("string"), "answer": Value("int64")}
    stored = Dataset.from_list(rows, features=Features(features))
    made = to_conversations(stored.to_iterable_dataset(2) if streaming else stored)
    assert schema_name(made) == "questions and answers"
    assert [row["id"] for row in made] == ["q0", "q1", "q2"]
    assert all(image["bytes"].startswith(b"\x89PNG") for row in made for image in row["images"])
    expected = [
        {"id": f"q{n}", "images": [picture(56, 56, n)], "messages": [QUESTION, {**ANSWER, "content": str(n)}]}
        for n in range(3)
    ]
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.5)
    assert_same(collator(list(prepare_rows(made))), collator(expected))
    if not streaming:
        assert made.select([2])[0]["id"] == "q2" and made.shuffle(seed=0)[0]["messages"]
        assert pickle.loads(pickle.dumps(made))[1]["id"] == "q1"
        assert to_conversations(made) is made


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_with_two_image_columns_keep_both(streaming):
    rows = [{"messages": [QUESTION, ANSWER], "image": picture(56, 56, 0), "images": None}]
    rows += [{"messages": [QUESTION, ANSWER], "image": None, "images": [picture(56, 56, n) for n in range(2)]}]
    features = {"messages": MESSAGES, "image": ImageFeature(), "images": IMAGES}
    stored = Dataset.from_list(rows * 2, features=Features(features))
    made = to_conversations(stored.to_iterable_dataset() if streaming else stored)
    assert [(row["error"], len(row["images"])) for row in made] == [(None, 1), (None, 2)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_with_system_and_video_in_columns(streaming):
    rows = [{"messages": [QUESTION, ANSWER], "system": "Count.", "video": None}]
    rows += [{"messages": [QUESTION, ANSWER], "system": None, "video": "a.mp4"}]
    for video in (Value("string"), VideoFeature()):
        features = Features({"messages": MESSAGES, "system": Value("string"), "video": video})
        stored = Dataset.from_list(rows, features=features)
        told, wrong = to_conversations(stored.to_iterable_dataset() if streaming else stored)
        assert [message["role"] for message in told["messages"]] == ["system", "user", "assistant"]
        assert "videos are not supported" in wrong["error"]


def test_user_transform_is_kept():
    stored = Dataset.from_dict({"scene": ["a", "b"]})
    stored.set_transform(lambda batch: {"messages": [json.loads("[]") for _ in batch["scene"]]})
    assert to_conversations(stored) is stored
