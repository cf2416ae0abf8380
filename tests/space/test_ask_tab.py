"""The tab Ask: answers of the page and of its API, compared with the plain model; questions that it has learned."""

import html
import re
import shutil
from types import SimpleNamespace

import ask_tab
import numpy as np
import pytest
from answers import COLORS, QUESTION, decode, encode, greedy
from api import ask
from datasets import load_dataset
from handlers import run, start_of
from loading import PACKED, TINY, Models
from paths import AERIAL_TREES
from pictures import picture
from PIL import Image, ImageColor
from uploading import CROWNS, EXAMPLES

from modeling_vitp.pretraining.generation import generate_answers

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> **how many**?"


@pytest.fixture
def page(models):
    """Return a function that asks in the page and returns what it shows."""
    ((handler, _),) = start_of(ask_tab.build_tab, models)
    return lambda question, first, second=None: run(handler, [first, None, TINY, second, question, [], 8])


def texts_of(said) -> list[tuple[str, str]]:
    return [(one["role"], html.unescape(one["content"])) for one in said]


def answer_to(full, question, *images) -> str:
    inputs = encode(full.processor, images, question)
    ids = full.model.generate(**inputs, **greedy(full.model, 128))[0, inputs["input_ids"].shape[1] :]
    return decode(full.processor, ids)


def test_later_questions_are_answered_as_if_asked_alone(packed):
    """Answers do not depend on the questions and answers before them."""
    ((handler, values),) = start_of(ask_tab.build_tab, packed)
    questions, said = [QUESTION, ask_tab.NOT_LEARNED[0], QUESTION], []
    for question in questions:
        said, *_ = run(handler, [*values[:4], question, said, values[6]])
    image = Image.open(EXAMPLES[CROWNS]).convert("RGB")
    alone = {question: answer_to(packed.full(), question, image) for question in set(questions)}
    expected = [turn for one in questions for turn in (("user", one), ("assistant", alone[one]))]
    assert texts_of(said) == expected and len(set(alone.values())) > 1


def test_unlearned_questions_of_packed_model_are_marked(models, packed):
    choices, note = ask_tab.examples_for(packed, packed.default)
    assert choices[0] == QUESTION and "3.2" in note
    assert all(label == f"not learned: {question}" for label, question in choices[1:]) and len(choices) > 5
    assert ask_tab.examples_for(models, TINY) == (ask_tab.PROMPTS, ask_tab.OTHER_NOTE)


def test_figures_of_packed_model_are_not_shown_for_users_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PACKED, tmp_path / "outputs" / "quickstart")
    own = Models()
    assert own.source(own.default) == "outputs/quickstart"
    assert ask_tab.examples_for(own, own.default) == (ask_tab.PROMPTS, ask_tab.OTHER_NOTE)


@pytest.mark.slow
def test_learned_questions_beat_constants_and_swapped_images(packed):
    """On the test crops, the number of trees depends on the image; other answers are no better than a constant."""
    rows = load_dataset("parquet", data_files={"test": str(AERIAL_TREES / "test.parquet")}, split="test")
    images, numbers, top_left, bottom_right = [], [], [], []
    for row in rows:
        image = row["image"].convert("RGB")
        quarters = []
        for left, top, right, bottom in row["boxes"]:
            is_right = (left + right) / 2 >= min(image.size) / 2
            is_bottom = (top + bottom) / 2 >= min(image.size) / 2
            quarters.append((is_right, is_bottom))
        images.append(image)
        numbers.append(len(quarters))
        top_left.append(quarters.count((False, False)))
        bottom_right.append(quarters.count((True, True)))
    full = packed.full()

    def answers(question, step=1):
        content = [[{"type": "image", "image": image}, {"type": "text", "text": question}] for image in images[::step]]
        conversations = [[{"role": "user", "content": one}] for one in content]
        return generate_answers(full.model, full.processor, conversations, max_new_tokens=40, do_sample=False)

    counts = np.array([int(re.search(r"\d+", answer).group()) for answer in answers(QUESTION)])
    true = np.array(numbers)
    errors = [np.abs(guess - true).mean() for guess in (counts, 4, np.roll(counts, len(true) // 2), 7)]
    assert errors == pytest.approx([3.2, 3.9, 4.7, 3.2], abs=0.1)  # as the tab says
    assert np.corrcoef(counts, true)[0, 1] > 0.4

    step = 3
    densities = []
    for number in numbers[::step]:
        if number == 0:
            densities.append("no")
        elif number < 4:
            densities.append("open")
        elif number < 12:
            densities.append("sparse")
        else:
            densities.append("dense")
    truths = {
        "Are there more than 8 trees?": ["yes" if number > 8 else "no" for number in numbers[::step]],
        "Is there a tree in the bottom right quarter?": ["yes" if number else "no" for number in bottom_right[::step]],
        "How dense is the forest?": densities,
    }
    for question, truth in truths.items():
        right = np.mean([answer == one for answer, one in zip(answers(question, step), truth)])
        assert right <= max(truth.count(one) for one in set(truth)) / len(truth), question
    top_left = np.array(top_left[::step])
    guesses = np.array([int(answer) for answer in answers("How many trees are in the top left quarter?", step)])
    assert np.abs(guesses - top_left).mean() >= np.abs(np.median(top_left) - top_left).mean()
    assert len(set(answers("Where is the largest tree?", 20))) == 1
    assert all(answer.endswith("most trees in the top left.") for answer in answers("Describe the image.", 20))


def test_api_streams_the_same_answer(models, scene):
    steps = [answer for answer, *_ in ask(models, scene, None, TINY, QUESTION, 8)]
    full = models.full()
    inputs = encode(full.processor, [picture(336, 224)], QUESTION)
    ids = full.model.generate(**inputs, **greedy(full.model, 8))[0, inputs["input_ids"].shape[1] :]
    assert steps[-1].strip() == decode(full.processor, ids) and len(steps) > 3


def test_answer_boxes_are_drawn_and_counted(models, page, scene, monkeypatch):
    answer = "<ref>ship</ref><box>[[250, 250, 750, 750]]</box> and [0, 0, 1001, 5]"
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([answer[:9], answer]))
    said, shown, _, words, _ = page(QUESTION, scene)
    assert texts_of(said)[-1] == ("assistant", answer)
    drawn = np.array(Image.open(shown.value["path"]))
    assert drawn.shape == (448, 672, 3)  # enlarged so that labels are readable
    assert (drawn[112:336, 168] == ImageColor.getrgb(COLORS[0])).all()
    assert words == "1 × ship; invalid (outside the grid from 0 to 1000, or empty): [0, 0, 1001, 5]"
    *_, (text, boxes, again) = ask(models, scene, None, TINY, QUESTION, 8)
    assert (text, again) == (answer, words) and boxes == [{"phrase": "ship", "box": [250, 250, 750, 750]}]


def test_both_images_of_a_pair_are_asked_about(models, page, scene, tmp_path, monkeypatch):
    seen = SimpleNamespace()
    picture(100, 200, seed=1).save(tmp_path / "tall.png")

    def answer_of(model, processor, inputs, max_new_tokens):
        seen.tiles = len(inputs["pixel_values"])
        return iter(["[500, 0, 1000, 1000]"])

    monkeypatch.setattr(ask_tab, "stream_answer", answer_of)
    _, *shown, _, note = page("What has changed?", scene, str(tmp_path / "tall.png"))
    pair = [picture(336, 224), picture(100, 200, 1)]
    assert seen.tiles == len(encode(models.full().processor, pair, QUESTION)["pixel_values"])
    before, after = (np.array(Image.open(one.value["path"])) for one in shown)
    assert note.splitlines() == ["scene.png: PNG, RGB, 336 × 224 pixels", "tall.png: PNG, RGB, 100 × 200 pixels"]
    assert before.shape == (448, 672, 3) and after.shape == (800, 400, 3)
    for drawn in (before, after):
        assert (drawn[100:, drawn.shape[1] // 2] == ImageColor.getrgb(COLORS[0])).all()


def test_markup_in_conversation_is_escaped(page, scene, monkeypatch):
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([MARKUP]))
    said, *_ = page(MARKUP, scene)
    assert texts_of(said) == [("user", MARKUP), ("assistant", MARKUP)]
    assert not any("<" in one["content"] for one in said)


def test_invalid_question_or_image_shows_message(page, scene):
    for question, image, wanted in (
        ("  ", scene, "question is empty"),
        ("x" * 2001, scene, "2,001 characters"),
        ("a <IMG_CONTEXT>", scene, "image token"),
        (QUESTION, None, "No image"),
    ):
        with pytest.raises(ValueError, match=wanted):
            page(question, image)
