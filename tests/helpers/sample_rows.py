"""Sample rows of instruction data, and annotations in InternVL's JSON Lines."""

import io
import json
from pathlib import Path

import torch
from pictures import picture

BUDGET = 6
USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "There are 12 trees."}
PLACE = {"type": "image"}
BOXES = "<ref>ship</ref><box>[[0, 12, 1000, 34], [5, 6, 7, 8]]</box> and [0, 1, 2, 1000]"


def text(string):
    return {"type": "text", "text": string}


def encoded_image(image, image_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def sized_row(index, sizes, answer="There are 12 trees."):
    """Return a row with images of these sizes."""
    images = [picture(*size, index) for size in sizes]
    messages = [{"role": "user", "content": "How many trees?"}, {"role": "assistant", "content": answer}]
    return {"id": str(index), "images": images, "messages": messages}


def make_rows():
    """Return rows with one turn, several turns, several images, and text only."""
    long = {"role": "assistant", "content": [text("Trees: "), text("12 top left, "), text("3 right.")]}
    return [
        {"id": "one", "images": [picture(100, 60, 1)], "messages": [USER, ANSWER]},
        {
            "id": 2,
            "images": [picture(56, 56, 2)],
            "messages": [{"role": "system", "content": "Count."}, USER, ANSWER, USER, {**ANSWER, "content": "12?"}],
        },
        {
            "id": "three",
            "images": [picture(170, 50, 3), picture(40, 120, 4), picture(56, 56, 5)],
            "messages": [
                {"role": "user", "content": [PLACE, text("before"), PLACE, text("after?")]},
                ANSWER,
                {"role": "user", "content": [text("And here:"), PLACE]},
                long,
            ],
        },
        {"id": "text", "images": [], "messages": [USER, {**ANSWER, "content": "none"}]},
    ]


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert torch.equal(actual[name], values), name
        assert actual[name].dtype == values.dtype


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


def write_annotations(folder: Path) -> Path:
    """Write InternVL JSON Lines with images, the same rows as a JSON list, and two broken lines."""
    (folder / "images" / "sub").mkdir(parents=True)
    picture(60, 56, 0).save(folder / "images" / "0.png")
    picture(60, 56, 1).save(folder / "images" / "sub" / "1.png")
    with open(folder / "a.jsonl", "wb") as file:
        for annotation in ANNOTATIONS:
            file.write(json.dumps(annotation).encode() + b"\n")
        file.write(b'{"image": "0.png", "conver\n\xff\xfe\n')
    (folder / "a.json").write_text(json.dumps(ANNOTATIONS))
    return folder
