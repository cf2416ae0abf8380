"""The same conversation is the same sample whatever schema it is written in; what fits none, or two, is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from sample_rows import assert_same, encoded_image, text, turn
from tiny_models import TOKENS_PER_TILE

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.schemas import SCHEMAS, RowReader, recognize

PLACE = {"type": "image", "text": None}


@pytest.fixture(scope="module")
def small_processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


def made(row, mapped=None, **options):
    """A row by a reader that is made of its own columns."""
    stored = {name: value if isinstance(value, dict) else None for name, value in row.items()}
    made = RowReader.of(stored, mapped, **options)(row, "1")
    assert made["error"] is None, made["error"]
    return made


def written(exchanges, images):
    """A conversation in each schema; `exchanges` are questions with their answers, the first without its images."""
    named = {"user": "human", "assistant": "gpt"}
    messages = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange)
    ]
    placed = [{**messages[0], "content": "<image>\n" * len(images) + messages[0]["content"]}, *messages[1:]]
    parts = [{"role": one["role"], "content": [text(one["content"])]} for one in messages]
    parts[0]["content"] = [{"type": "image"}] * len(images) + parts[0]["content"]
    turns = [turn(named[one["role"]], one["content"]) for one in placed]
    rows = [
        {"messages": messages, "images": images},
        {"messages": placed, "images": images},
        {"messages": parts, "images": images},
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


@settings(max_examples=12, deadline=None)
@given(
    exchanges=st.lists(
        st.tuples(*[st.text("abc 12,<>\n", min_size=1, max_size=12).filter(str.strip)] * 2), min_size=1, max_size=3
    ),
    num_images=st.integers(0, 2),
)
def test_the_same_conversation_gives_the_same_sample_in_every_schema(small_processor, exchanges, num_images):
    images = [encoded_image(picture(56, 56, seed)) for seed in range(num_images)]
    collator = ViTPDataCollator(small_processor, vrl_drop_ratio=0.5)
    stored = [{"path": None, "bytes": image} for image in images]
    rows = written(exchanges, images)
    expected = collator([{"id": "1", "images": stored, "messages": rows[0]["messages"]}])
    for row in rows:
        assert_same(collator([{**made(row), "id": "1"}]), expected)


def test_conversations_of_llava_and_sharegpt_are_read_as_written_by_hand():
    llava = {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            turn("human", "<image>\nWhat are the colors of the bus?"),
            turn("gpt", "White and red."),
            turn("human", "Which feature can be seen on its back?"),
            turn("gpt", "An advertisement <image>."),
        ],
    }
    row = made(llava)
    assert row["images"] == [{"path": "coco/train2017/000000033471.jpg", "bytes": None}]
    assert row["messages"] == [
        {"role": "user", "content": [PLACE, text("What are the colors of the bus?")]},
        {"role": "assistant", "content": [text("White and red.")]},
        {"role": "user", "content": [text("Which feature can be seen on its back?")]},
        {"role": "assistant", "content": [text("An advertisement <image>.")]},
    ]
    sharegpt = {
        "system": "You compare.",
        "images": ["a.png", "b.png"],
        "conversations": [turn("human", "Before <image> and after <image>: what changed?"), turn("gpt", "A house.")],
    }
    row = made(sharegpt)
    assert [image["path"] for image in row["images"]] == ["a.png", "b.png"]
    assert row["messages"] == [
        {"role": "system", "content": [text("You compare.")]},
        {
            "role": "user",
            "content": [text("Before "), PLACE, text(" and after "), PLACE, text(": what changed?")],
        },
        {"role": "assistant", "content": [text("A house.")]},
    ]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_a_schema_is_told_by_its_columns_with_others_beside(schema):
    found, columns = recognize(["scene", *schema.columns, "image"])
    assert found.turns is schema.turns and columns["images"] == "image"
    assert {found.name, schema.name} in ({schema.name}, {"LLaVA conversations", "ShareGPT conversations"})


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["text", "label"], r"the columns \['text', 'label'\] make no conversation"),
        (["question", "image"], "make no conversation"),
        ([], r"the columns \[\] make no conversation"),
        (["messages", "prompt", "completion"], "are those of messages and prompts and completions at once"),
        (["messages", "conversations", "image"], "are those of messages and LLaVA conversations at once"),
    ],
)
def test_columns_that_fit_no_schema_or_two_are_listed_with_what_each_needs(names, says):
    with pytest.raises(ValueError, match=f"{says}.*Rename or leave out.*LLaVA conversations need conversations, image"):
        recognize(names)


def test_what_a_user_says_of_the_columns_decides():
    names = ["messages", "conversations", "instruction", "output", "picture", "label"]
    assert recognize(names, {"messages": "conversations"})[0].name == "messages"
    schema, columns = recognize(names, {"prompt": "instruction", "completion": "output", "images": "picture"})
    assert schema.name == "prompts and completions"
    assert columns == {"prompt": "instruction", "completion": "output", "images": "picture"}
    assert recognize(names, {"answer": "label"}, prompt="What is it?")[0].name == "questions and answers"
    row = made({"label": "a ship", "messages": []}, {"answer": "label"}, prompt="What is it?")
    assert row["messages"][0]["content"] == [text("What is it?")]
    with pytest.raises(ValueError, match="it has no column 'caption', only"):
        RowReader.of(dict.fromkeys(names), {"answer": "caption"})


def test_a_row_has_the_images_of_whichever_of_two_columns_has_them():
    turns = [turn("human", "What is it?"), turn("gpt", "A ship.")]
    read = RowReader.of(dict.fromkeys(["conversations", "image", "images"]))
    for image, images in (("a.png", None), ("a.png", []), (None, ["a.png"]), ("", ["a.png"]), ("a.png", ["a.png"])):
        row = read({"conversations": turns, "image": image, "images": images}, 7)
        assert row["error"] is None and [image["path"] for image in row["images"]] == ["a.png"]
    row = read({"conversations": turns, "image": "b.png", "images": ["a.png"]}, 7)
    assert row["id"] == "7" and "images under `images` and another under `image`" in row["error"]


ASKED = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ship."}]
SPOKEN = [
    {"messages": ASKED},
    {"conversations": [turn("human", "What is it?"), turn("gpt", "A ship.")]},
    {"prompt": ASKED[:1], "completion": ASKED[1:]},
    {"question": "What is it?", "answer": "A ship."},
]


@pytest.mark.parametrize("row", SPOKEN, ids=lambda row: next(iter(row)))
def test_system_and_video_beside_the_turns_of_every_schema(row):
    plain = made(row)["messages"]
    for system in (None, ""):
        assert made({**row, "system": system, "video": None, "videos": []})["messages"] == plain
    assert made({**row, "system": "Be short."})["messages"] == [
        {"role": "system", "content": [text("Be short.")]},
        *plain,
    ]
    for beside in ({"video": "v.mp4"}, {"videos": ["v.mp4"]}):
        read = RowReader.of(dict.fromkeys({**row, **beside}))
        assert "it is a video" in read({**row, **beside}, 1)["error"]


@pytest.mark.parametrize("first", [turn("system", "Be short."), {"role": "system", "content": [text("Be short.")]}])
def test_a_row_has_one_system_turn(first):
    row = {"system": "Be short.", "messages": [first, *ASKED]}
    assert [message["role"] for message in made(row)["messages"]] == ["system", "user", "assistant"]
    wrong = RowReader.of(dict.fromkeys(row))({**row, "system": "Be long."}, 1)
    assert "its `system` is 'Be long.', but its first turn" in wrong["error"]
