"""Scores of answers, against brute force and, where lmms-eval is installed, the VQA challenge's own rules."""

import itertools

import numpy as np
import pytest

from modeling_vitp.evaluation.answer_scores import choose, normalize_answer, read_choices, score_answers

CHOICES = "Where is it?\nA. left lung\nB. right lung\nC. heart"
BOX = "<ref>ship</ref><box>[[100, 200, 300, 400]]</box>"


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("Yes.", "yes", True),
        ("two", "2", True),
        ("None", "0", True),
        ("a Rural area", "rural area", True),
        ("between 0 and 10", "Between 0 and 10", True),
        ("1,000", "1000", True),
        ("more than 1000", "1000", False),
        ("0.5", "5", False),
        ("top-left", "top left", True),
        ("", "no", False),
        ("it's", "its", True),
        ("A", "B", False),
        ("A", "a", True),
        ("no", "yes", False),
    ],
)
def test_an_answer_is_right_if_it_is_a_reference_but_for_case_numbers_articles_and_punctuation(
    answer, reference, is_right
):
    assert score_answers("vqa", [""], [answer], [["other", reference]])["accuracy"].tolist() == [float(is_right)]


@pytest.mark.slow
def test_two_answers_are_the_same_if_the_vqa_challenges_processor_says_so():
    metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    process = metric.EvalAIAnswerProcessor()
    texts = ["Yes.", "yes", "no!", "Two", "2", "an urban area", "Urban area", "the 10", "ten", "top, left", "top left"]
    texts += ["1,000", "1000", "a forest", "forests", "zero", "0", "none", "more than 1000", "blue?", "blue"]
    for one, other in itertools.product(texts, texts):
        assert (normalize_answer(one) == normalize_answer(other)) == (process(one) == process(other)), (one, other)


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("C. heart", "C"),
        ("The answer is B.", "B"),
        ("answer: C", "C"),
        ("right lung", "B"),
        ("the hearth", "C"),
        ("A heart", "C"),
        ("", None),
    ],
)
def test_a_choice_is_named_by_its_letter_or_else_is_the_most_similar(answer, chosen):
    assert choose(answer, read_choices(CHOICES)) == chosen
    scores = score_answers("choice", [CHOICES] * 2, [answer] * 2, [["B"], ["right lung"]])
    assert scores["accuracy"].tolist() == [float(chosen == "B")] * 2


def test_lines_that_are_no_list_from_a_on_are_no_choices():
    assert read_choices("Is it A. or B.?") == read_choices("A. one") == read_choices("B. one\nC. two") == {}


def test_boxes_are_scored_by_the_first_one_in_the_answer():
    answers = [
        BOX,
        "[200, 200, 400, 400]",
        "[[100, 200, 300, 310]] and [100, 200, 300, 400]",
        "somewhere",
        "[9, 9, 1, 1]",
    ]
    scores = score_answers("grounding", [""] * 5, answers, [[BOX]] * 5)
    grid = np.zeros((5, 1000, 1000), dtype=bool)
    for place, (left, top, right, bottom) in enumerate(
        [(100, 200, 300, 400), (200, 200, 400, 400), (100, 200, 300, 310)]
    ):
        grid[place, top:bottom, left:right] = True
    overlaps = [(grid[0] & other).sum() / (grid[0] | other).sum() for other in grid]
    assert scores["mean_iou"] == pytest.approx(overlaps)
    assert scores["accuracy_at_0.5"].tolist() == [1, 0, 1, 0, 0]
    assert scores["answers_with_box"].tolist() == [1, 1, 1, 0, 0]


def test_a_map_is_scored_by_its_cells_in_order():
    answers, references = ["a b c d e", "a b", "abXd", ""], [["a b x d"], ["a b c d"], ["abcd"], ["abcd"]]
    assert score_answers("map", [""] * 4, answers, references)["accuracy"].tolist() == [0.75, 0.5, 0.75, 0]
