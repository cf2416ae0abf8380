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
        ("A.", "A", True),
        ("(A)", "a", True),
        ("the", "a", False),
        (".5", "5", False),
        (".5 cm", ".5 CM.", True),
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
    texts += [
        "1,000",
        "1000",
        "a forest",
        "forests",
        "zero",
        "0",
        "none",
        "more than 1000",
        "blue?",
        "blue",
        ".5",
        "5",
        "0.5",
    ]
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
        ("The answer is a heart", "C"),
        ("It's heart.", "C"),
        ("B. left lung", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("**B.**", "B"),
        ("**Answer:** B", "B"),
        ("'B'", "B"),
        ('"B"', "B"),
        ("[B]", "B"),
        ("$B$", "B"),
        ("\\boxed{B}", "B"),
        ("<answer>B</answer>", "B"),
        ("B;", "B"),
        ("B/", "B"),
        ("B - right lung", "B"),
        ("B\nbecause it is dark", "B"),
        ("I think B", "B"),
        ("I think it's B.", "B"),
        ("Option B is correct", "B"),
        ("The correct answer is option B", "B"),
        ("The answer is B because it is dark", "B"),
        ("A is correct", "A"),
        ("final answer: B", "B"),
        ("The answer is B, not option A", "B"),
        ("The answer is A or B", None),
        ("A, B", None),
        ("Both A and B", None),
        ("(A) and (B)", None),
        ("**A**, **B**", None),
        ("A. and B.", None),
        ("A; B", None),
        ("A.B", None),
        ("Answer: (a)/(b)", None),
        ("A. left lung\nB. right lung\nC. heart", None),
        ("A. left lung, B. right lung", None),
        ("B) right lung and C) heart", None),
        ("A. left lung\nB. right lung\nC. heart\nAnswer: B", "B"),
        ("B. right lung\nA. left lung is not shown", "B"),
        ("###", None),
        ("", None),
    ],
)
def test_a_choice_is_named_by_its_letter_or_else_is_the_most_similar(answer, chosen):
    assert choose(answer, read_choices(CHOICES)) == chosen
    scores = score_answers("choice", [CHOICES] * 2, [answer] * 2, [["B"], ["right lung"]])
    assert scores["accuracy"].tolist() == [float(chosen == "B")] * 2


def test_choices_that_begin_like_a_letter_are_said_by_their_text():
    organisms = ["C. albicans", "E. coli", "S. aureus", "B. cereus"]
    question = "\n".join(["Which?", *(f"{letter}. {text}" for letter, text in zip("ABCD", organisms))])
    choices = read_choices(question)
    for letter, text in zip("ABCD", organisms):
        said = [letter, f"{letter}.", f"({letter})", text, f"{letter}. {text}", f"{letter}: {text.lower()}"]
        said += [f"{text} is shown", f"The answer is {text}", f"The answer is {letter}."]
        assert [choose(one, choices) for one in said] == [letter] * len(said)
        scores = score_answers("choice", [question] * len(said), said, [[text]] * len(said))
        assert scores["accuracy"].tolist() == [1] * len(said)


def test_choices_that_are_letters_or_name_others():
    groups = {"A": "O", "B": "A", "C": "B", "D": "AB"}
    assert [choose(one, groups) for one in ("A", "B. A", "O", "AB", "D")] == ["A", "B", "A", "D", "D"]
    modalities = {"A": "CT", "B": "MRI", "C": "PET", "D": "Both A and B"}
    said = ["Both A and B", "A and B", "D. Both A and B", "A, C"]
    assert [choose(one, modalities) for one in said] == ["D", "D", "D", None]


def test_of_several_right_answers_the_best_one_counts():
    other = "<box>[[500, 500, 600, 600]]</box>"
    answers = [BOX, other, "[0, 0, 9, 9]"]
    scores = score_answers("grounding", [""] * 3, answers, [["There is no ship.", BOX, other]] * 3)
    assert scores["mean_iou"].tolist() == scores["accuracy_at_0.5"].tolist() == [1, 1, 0]
    scores = score_answers("choice", [CHOICES] * 3, ["A", "B", "heart"], [["B", "C. heart"]] * 3)
    assert scores["accuracy"].tolist() == [0, 1, 1]
    scores = score_answers("map", [""] * 2, ["a b c d", "x b x d"], [["x x x x", "a b c x", "x b x d"]] * 2)
    assert scores["accuracy"].tolist() == [0.75, 1]


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
