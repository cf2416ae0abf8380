"""Answers of a pretraining beside those with other images and constants, computed by hand."""

import statistics
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_vitp.conversations import GIVEN
from modeling_vitp.data.boxes import iou
from modeling_vitp.evaluation import pretraining
from modeling_vitp.evaluation.pretraining import (
    best_constants,
    candidates_of,
    compare,
    middle_answer,
    score_pretraining,
    split_turns,
    texts_of,
)
from modeling_vitp.evaluation.vlm import Question
from modeling_vitp.instructions.boxes import read_boxes
from modeling_vitp.instructions.from_annotations.storage import FEATURES

HOW_MANY, IS_THERE, WHERE = "How many trees are in the image?", "Is there a tree?", "Where is the tree?"
MAP = "Map the image in 3 x 3 cells. Write tree, road, or background."


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def box(*sides):
    return f"<ref>tree</ref><box>[{list(sides)}]</box>"


def test_constant_count_minimizes_mean_error():
    counts = np.random.default_rng(0).geometric(0.15, 100).tolist()
    constant = best_constants([turn(HOW_MANY, str(count)) for count in counts])["count"]
    errors = {value: sum(abs(count - value) for count in counts) for value in range(max(counts) + 1)}
    assert errors[int(constant)] == min(errors.values())


def test_constant_word_is_most_frequent():
    answers = ["yes"] * 3 + ["no"] * 5 + ["forest"] * 4
    assert best_constants([turn(IS_THERE, answer) for answer in answers]) == {"vqa": "no"}


def test_constant_box_has_best_mean_iou():
    rng, boxes = np.random.default_rng(0), []
    for _ in range(40):
        x, y = rng.integers(0, 500, 2).tolist()
        boxes.append((x, y, x + int(rng.integers(100, 500)), y + int(rng.integers(100, 500))))
    constant = best_constants([turn(WHERE, box(*sides)) for sides in boxes])["grounding"]
    means = {sides: sum(iou(sides, other) for other in boxes) for sides in boxes}
    assert read_boxes(constant)[0][0][:4] == pytest.approx(max(means, key=means.get))


def test_constant_map_has_best_mean_iou():
    """Candidates are the maps themselves, and maps of one word."""
    maps = [["tree"] * 5 + ["road"] * 4, ["road"] * 9, ["background"] * 8 + ["tree"], ["road"] * 6 + ["tree"] * 3]
    constant = best_constants([turn(MAP, " ".join(cells)) for cells in maps])["map"].split()
    assert candidates_of("map", ["a b", "c a a"]) == ["a b", "c a a", "a a a", "b b b", "c c c"]
    means = {}
    for candidate in [*maps, *([word] * 9 for word in ("tree", "road", "background"))]:
        overlaps = []
        for cells in maps:
            of_map = []
            for word in {*cells, *candidate}:
                both = sum(one == other == word for one, other in zip(candidate, cells))
                of_map.append(both / sum(word in pair for pair in zip(candidate, cells)))
            overlaps.append(sum(of_map) / len(of_map))
        means[" ".join(candidate)] = sum(overlaps) / len(maps)
    assert means[" ".join(constant)] == max(means.values())


def test_captions_and_systems_have_no_constant():
    assert best_constants([turn("Describe the image.", "Trees stand along a road with many parked cars.")]) == {}
    assert best_constants([[{"role": "system", "content": HOW_MANY}, *turn(HOW_MANY, "3")[1:]]]) == {}
    assert best_constants([]) == {}


def test_median_of_sampled_counts():
    rng = np.random.default_rng(0)
    for number in (1, 5, 51):
        counts = rng.integers(0, 30, number).tolist()
        assert (
            middle_answer("count", [f"{count} trees" for count in counts]) == f"{statistics.median_low(counts)} trees"
        )
    assert middle_answer("count", ["many", "7", "none at all", "three"]) == "three"
    assert middle_answer("count", ["a", "b"]) == "a"
    assert middle_answer("count", ["2", "4"]) == "2"


def test_middle_map_overlaps_most_with_the_others():
    maps = {"left": "p a p a", "wide": "p p a a", "all": "p p p p", "none": "a a a a"}
    boxes = {"left": (0, 0, 2, 4), "wide": (0, 0, 4, 2), "all": (0, 0, 4, 4)}
    overlaps = {}
    for name, box in boxes.items():
        overlaps[name] = sum(iou(box, other) for other in boxes.values())
    assert max(overlaps, key=overlaps.get) == "all"
    assert middle_answer("fine_map", list(maps.values())) == maps["all"]
    assert middle_answer("fine_map", [maps["none"], maps["left"]]) == maps["left"]
    assert middle_answer("fine_map", [maps["none"]]) == maps["none"]


def test_split_turns_have_one_question_each():
    images = [{"bytes": b"x", "path": None}]
    given = {"role": "assistant", "content": [{"type": GIVEN, "text": "Yes."}]}
    messages = [
        {"role": "system", "content": "Count."},
        *turn(HOW_MANY, "3"),
        *turn("Sure?", ""),
        *turn(IS_THERE, "yes"),
    ]
    messages[4] = given
    rows = split_turns([{"id": "a", "images": images, "messages": messages}, {"id": "b", "images": [], "messages": []}])
    assert [row["messages"] for row in rows] == [turn(HOW_MANY, "3"), turn(IS_THERE, "yes")]
    assert len({row["id"] for row in rows}) == 2
    assert all(row["images"] == images for row in rows)


def test_worse_answers_have_negative_gain():
    questions = [Question(str(n), n, 1, HOW_MANY, ("5",), "count", (f"{n}.png",)) for n in range(2)]
    error = compare("count", questions, ["9", "9"], ["5", "7"], ["5", "5"], seed=0)["mean_error"]
    assert error["least_gain"] == -4 and "ratio_to_constant" not in error  # the constant has no error


class Answers:
    """Stub of `generate_answers` that reads the number of trees from the color of the image."""

    def __init__(self, monkeypatch, read=lambda number: number):
        self.read, self.asked, self.options = read, Counter(), []
        monkeypatch.setattr(pretraining, "generate_answers", self.generate)

    def generate(self, model, processor, conversations, samples=1, **options):
        self.options.append({"samples": samples, **options})
        answers = []
        for messages in conversations:
            parts = [part for message in messages for part in message["content"]]
            (image,) = (part["image"] for part in parts if part["type"] == "image")
            number = self.read(int(np.asarray(image)[0, 0, 0]) // 10)
            question = [part["text"] for part in parts if part["type"] == "text"][-1]
            self.asked[len(messages), question] += 1
            answers += [str(number) if question == HOW_MANY else "yes" if number > 3 else "no"] * samples
        return answers


@pytest.fixture
def rows():
    """Return rows with 0 to 7 trees, which the color of the image says, each with two questions."""
    rows = []
    for number in range(8):
        messages = [*turn(HOW_MANY, str(number)), *turn(IS_THERE, "yes" if number > 3 else "no")]
        rows.append(
            {"id": f"row {number}", "images": [Image.new("RGB", (56, 56), (10 * number, 0, 0))], "messages": messages}
        )
    return Dataset.from_list(rows, features=FEATURES)


@pytest.mark.parametrize("are_independent", [True, False])
def test_known_answers_have_known_scores(monkeypatch, processor, rows, are_independent):
    """The other image of n trees has n + 4 trees, or n - 4, and one tree is always missed."""
    stub, trained = Answers(monkeypatch, lambda number: max(number - 1, 0)), [turn(HOW_MANY, "4"), turn(IS_THERE, "no")]
    scores = score_pretraining(SimpleNamespace(eval=lambda: None), processor, rows, trained, 0, are_independent)
    assert set(scores) == {"count", "vqa"}
    error = scores["count"]["mean_error"]
    others = [max((number + 4) % 8 - 1, 0) for number in range(8)]
    assert error["own"] == 7 / 8
    assert error["other_images"] == sum(abs(number - other) for number, other in enumerate(others)) / 8
    assert error["constant"] == sum(abs(number - 4) for number in range(8)) / 8
    assert error["least_gain"] == min(error["other_images"], error["constant"]) - 7 / 8
    assert error["ratio_to_other_images"] == 7 / 8 / error["other_images"]
    assert error["ratio_to_constant"] == 7 / 8 / error["constant"]
    accuracy = scores["vqa"]["accuracy"]
    assert (accuracy["own"], accuracy["other_images"], accuracy["constant"]) == (7 / 8, 1 / 8, 1 / 2)
    assert accuracy["least_gain"] == 3 / 8
    lengths = {HOW_MANY: 1, IS_THERE: 1 if are_independent else 3}
    assert stub.asked == {(length, question): 16 for question, length in lengths.items()}
    assert {options["samples"] for options in stub.options} == {51, 1}
    assert all(options.get("do_sample", False) == (options["samples"] == 51) for options in stub.options)


@pytest.mark.parametrize("are_independent", [True, False])
def test_scores_do_not_depend_on_memory(monkeypatch, processor, rows, are_independent):
    """Rows whose images are decoded must be known by their content, not by their address."""
    Answers(monkeypatch, lambda number: number // 2)
    rows = Dataset.from_list([row for row in rows for _ in range(3)], features=FEATURES)
    trained = [turn(HOW_MANY, "4")]
    model = SimpleNamespace(eval=lambda: None)
    scores = [score_pretraining(model, processor, rows, trained, 0, are_independent) for _ in range(3)]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["count"]["mean_error"]["questions"] == 8  # The same question about the same image is asked once.


def test_questions_are_limited_by_kind(monkeypatch, processor, rows):
    Answers(monkeypatch)
    monkeypatch.setattr(pretraining, "MOST_QUESTIONS", 5)
    scores = score_pretraining(SimpleNamespace(eval=lambda: None), processor, rows, [], 0)
    assert scores["count"]["mean_error"]["questions"] == scores["vqa"]["accuracy"]["questions"] == 5


def test_texts_of_training_rows(rows):
    assert list(texts_of(rows, None, 0)) == list(rows["messages"])
    seen = []

    class Drawn:
        def messages(self, row, generator):
            seen.append(row["id"])
            return turn(HOW_MANY, str(int(generator.initial_seed()) % 7))

    first, again, other = (list(texts_of(rows, Drawn(), seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert seen == 3 * list(rows["id"])
