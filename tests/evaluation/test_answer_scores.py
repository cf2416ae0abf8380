"""Scores of answers, compared with brute force and, if lmms-eval is installed, with the rules of the VQA challenge."""

import collections
import itertools
import math

import numpy as np
import pytest

from modeling_vitp.evaluation.answer_scores import (
    choose_option,
    normalize_answer,
    read_choices,
    score_answers,
    score_captions,
    tokenize,
)

CHOICES = "Where is it?\nA. left lung\nB. right lung\nC. heart"
BOX = "<ref>ship</ref><box>[[100, 200, 300, 400]]</box>"


EQUAL_ANSWERS = [("Yes.", "yes"), ("two", "2"), ("None", "0"), ("a Rural area", "rural area"), ("1,000", "1000")]
EQUAL_ANSWERS += [("between 0 and 10", "Between 0 and 10"), ("top-left", "top left"), ("it's", "its"), ("A", "a")]
EQUAL_ANSWERS += [("A.", "A"), ("(A)", "a"), (".5 cm", ".5 CM.")]
OTHER_ANSWERS = [("more than 1000", "1000"), ("0.5", "5"), (".5", "5"), ("", "no"), ("A", "B"), ("the", "a")]


def test_answers_are_normalized():
    for pairs, accuracy in ((EQUAL_ANSWERS, 1.0), (OTHER_ANSWERS, 0.0)):
        for answer, reference in pairs:
            scores = score_answers("vqa", [""], [answer], [["other", reference]])
            assert scores["accuracy"].tolist() == [accuracy], (answer, reference)


@pytest.mark.slow
def test_normalization_matches_vqa_challenge():
    metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    process = metric.EvalAIAnswerProcessor()
    texts = ["Yes.", "yes", "no!", "Two", "2", "an urban area", "Urban area", "the 10", "ten", "top, left", "top left"]
    texts += ["1,000", "1000", "a forest", "forests", "zero", "0", "none", "more than 1000", "blue?", "blue"]
    texts += [".5", "5", "0.5"]
    for one, other in itertools.product(texts, texts):
        assert (normalize_answer(one) == normalize_answer(other)) == (process(one) == process(other)), (one, other)


ANSWERS_BY_CHOICE = {
    "A": ["A is correct"],
    "B": ["B", "(b)", "b", "'B'", '"B"', "[B]", "$B$", "**B**", "**B.**", "B;", "B/", "\\boxed{B}", "right lung"]
    + ["B. left lung", "B - right lung", "B\nbecause it is dark", "B. right lung\nA. left lung is not shown"]
    + ["answer: B", "**Answer:** B", "final answer: B", "I think B", "I think it's B.", "The answer is B, not option A"]
    + ["Option B is correct", "The correct answer is option B", "The answer is B because it is dark"]
    + ["A. left lung\nB. right lung\nC. heart\nAnswer: B", "<answer>B</answer>"],
    "C": ["C. heart", "answer: C", "the hearth", "A heart", "The answer is a heart", "It's heart."],
    None: ["The answer is A or B", "A, B", "Both A and B", "(A) and (B)", "**A**, **B**", "A. and B.", "A; B", "A.B"]
    + ["Answer: (a)/(b)", "A. left lung\nB. right lung\nC. heart", "A. left lung, B. right lung"]
    + ["B) right lung and C) heart", "###", ""],
}


@pytest.mark.parametrize("chosen", ANSWERS_BY_CHOICE)
def test_choice_by_letter_or_similarity(chosen):
    for answer in ANSWERS_BY_CHOICE[chosen]:
        assert choose_option(answer, read_choices(CHOICES)) == chosen, answer
        scores = score_answers("choice", [CHOICES] * 2, [answer] * 2, [["B"], ["right lung"]])
        assert scores["accuracy"].tolist() == [float(chosen == "B")] * 2


def test_choices_may_begin_like_letter():
    organisms = ["C. albicans", "E. coli", "S. aureus", "B. cereus"]
    question = "\n".join(["Which?", *(f"{letter}. {text}" for letter, text in zip("ABCD", organisms))])
    choices = read_choices(question)
    for letter, text in zip("ABCD", organisms):
        said = [letter, f"{letter}.", f"({letter})", text, f"{letter}. {text}", f"{letter}: {text.lower()}"]
        said += [f"{text} is shown", f"The answer is {text}", f"The answer is {letter}."]
        assert [choose_option(one, choices) for one in said] == [letter] * len(said)
        scores = score_answers("choice", [question] * len(said), said, [[text]] * len(said))
        assert scores["accuracy"].tolist() == [1] * len(said)


def test_choices_may_contain_letters():
    groups = {"A": "O", "B": "A", "C": "B", "D": "AB"}
    assert [choose_option(one, groups) for one in ("A", "B. A", "O", "AB", "D")] == ["A", "B", "A", "D", "D"]
    modalities = {"A": "CT", "B": "MRI", "C": "PET", "D": "Both A and B"}
    said = ["Both A and B", "A and B", "D. Both A and B", "A, C"]
    assert [choose_option(one, modalities) for one in said] == ["D", "D", "D", None]


def test_best_reference_counts():
    other = "<box>[[500, 500, 600, 600]]</box>"
    answers = [BOX, other, "[0, 0, 9, 9]"]
    scores = score_answers("grounding", [""] * 3, answers, [["There is no ship.", BOX, other]] * 3)
    assert scores["mean_iou"].tolist() == scores["accuracy_at_0.5"].tolist() == [1, 1, 0]
    scores = score_answers("choice", [CHOICES] * 3, ["A", "B", "heart"], [["B", "C. heart"]] * 3)
    assert scores["accuracy"].tolist() == [0, 1, 1]
    scores = score_answers("map", [""] * 2, ["a b c d", "x b x d"], [["x x x x", "a b c x", "x b x d"]] * 2)
    assert scores["accuracy"].tolist() == [0.75, 1]


def test_choices_start_at_a():
    assert read_choices("Is it A. or B.?") == read_choices("A. one") == read_choices("B. one\nC. two") == {}


def test_first_box_is_scored():
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


# Example of aac-metrics 0.6 with its values.
ANSWERS = ["a man is speaking", "rain falls"]
REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]


def test_caption_scores_match_aac_metrics():
    scores = score_captions(ANSWERS, REFERENCES)
    assert scores["bleu_1"] == pytest.approx(0.4278, abs=1e-4)
    assert scores["cider"] == pytest.approx([1.3641, 0.5587], abs=1e-4)
    assert scores["cider"].mean() == pytest.approx(0.9614, abs=1e-4)


def grams(words: list[str], order: int) -> collections.Counter:
    return collections.Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))


def bleu(answers, references, most: int) -> float:
    """Return corpus BLEU (Papineni et al. 2002) with the closest reference length."""
    logs, length, wanted = [], sum(map(len, answers)), 0
    for answer, found in zip(answers, references):
        wanted += min((abs(len(one) - len(answer)), len(one)) for one in found)[1]
    for order in range(1, most + 1):
        right = total = 0
        for answer, found in zip(answers, references):
            best = collections.Counter()
            for one in found:
                best |= grams(one, order)
            right += (grams(answer, order) & best).total()
            total += grams(answer, order).total()
        logs.append(math.log(right / total))
    return math.exp(sum(logs) / most + min(0.0, 1 - wanted / length))


def cider(answers, references) -> list[float]:
    """Return CIDEr-D (Vedantam et al. 2015, section 5)."""
    scores = np.zeros(len(answers))
    for order in range(1, 5):
        seen = collections.Counter(
            gram for found in references for gram in set().union(*(grams(one, order) for one in found))
        )

        def vector(words, seen=seen, order=order):
            return {
                gram: count * (math.log(len(answers)) - math.log(max(1, seen[gram])))
                for gram, count in grams(words, order).items()
            }

        for place, (answer, found) in enumerate(zip(answers, references)):
            own = vector(answer)
            for one in found:
                other = vector(one)
                norm = math.hypot(*own.values()) * math.hypot(*other.values())
                shared = sum(min(value, other.get(gram, 0)) * other.get(gram, 0) for gram, value in own.items())
                penalty = math.exp(-((len(answer) - len(one)) ** 2) / (2 * 6**2))
                scores[place] += 10 / 4 * penalty * (shared / norm if norm else 0) / len(found)
    return scores.tolist()


def rouge(answer, found) -> float:
    """Return ROUGE-L (Lin 2004) with COCO's weight of recall."""

    def common(one, other):
        if not one or not other:
            return 0
        if one[-1] == other[-1]:
            return 1 + common(one[:-1], other[:-1])
        return max(common(one[:-1], other), common(one, other[:-1]))

    shared = [common(answer, one) for one in found]
    precision = max(count / len(answer) for count in shared)
    recall = max(count / len(one) for count, one in zip(shared, found))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


def test_caption_scores_match_brute_force():
    rng = np.random.default_rng(0)
    words = ["a", "road", "house", "tree", "was", "built", "beside"]
    texts = [[" ".join(rng.choice(words, rng.integers(6, 9))) for _ in range(4)] for _ in range(12)]
    answers, references = [one[0] for one in texts], [one[1:] for one in texts]
    scores = score_captions(answers, references)
    split, wanted = [one.split() for one in answers], [[text.split() for text in found] for found in references]
    for most in range(1, 5):
        assert scores[f"bleu_{most}"] == pytest.approx(bleu(split, wanted, most), rel=1e-6)
    assert scores["rouge_l"] == pytest.approx([rouge(*pair) for pair in zip(split, wanted)])
    assert scores["cider"] == pytest.approx(cider(split, wanted))


def test_empty_captions_and_single_image_are_scored():
    scores = score_captions(["", ""], REFERENCES)
    assert scores["cider"].tolist() == scores["rouge_l"].tolist() == [0, 0] and scores["bleu_1"] < 1e-6
    alone = score_captions(["a man speaks"], REFERENCES[:1])
    assert alone["cider"].tolist() == [0] and alone["rouge_l"].tolist() == [1] and alone["bleu_1"] == pytest.approx(1)


def test_caption_words_are_normalized():
    assert tokenize("Two-story houses, 0.5 km2; the tree's SHADE!") == "two-story houses 0.5 km2 the tree 's shade"


def test_counts_match_loop():
    rng = np.random.default_rng(0)
    answers, references, errors, are_right = [], [], [], []
    for _ in range(300):
        value, wanted = rng.integers(0, 12, 2).tolist()
        kind = rng.integers(0, 4)
        answers.append([str(value), f"There are {value} trees, not 99.", "many trees", "three"][kind])
        number = [value, value, None, 3][kind]
        others = rng.integers(0, 12, rng.integers(0, 3)).tolist()
        references.append([str(count) for count in [wanted, *others]])
        errors.append(min(abs((number or 0) - count) for count in [wanted, *others]))
        are_right.append(number is not None and number in [wanted, *others])
    scores = score_answers("count", [""] * 300, answers, references)
    assert scores["mean_error"].tolist() == errors
    assert scores["accuracy"].tolist() == are_right
    assert 0.05 < np.mean(are_right) < 0.9


def test_map_scores_match_loops():
    """Maps may be too short or too long; cells that are missing are wrong."""
    rng, words = np.random.default_rng(0), np.array(["tree", "road", "water", "none"])
    for _ in range(200):
        wanted = words[rng.integers(0, rng.integers(1, 5), 9)].tolist()
        own = words[rng.integers(0, rng.integers(1, 5), rng.integers(7, 12))].tolist()
        scores = score_answers("map", [""], [" ".join(own)], [[" ".join(wanted)]])
        own = [own[cell] if cell < len(own) else None for cell in range(9)]
        overlaps = []
        for word in words:
            both = sum(a == b == word for a, b in zip(own, wanted))
            either = sum(a == word or b == word for a, b in zip(own, wanted))
            if either:
                overlaps.append(both / either)
        assert scores["mean_iou"][0] == pytest.approx(sum(overlaps) / len(overlaps))
        assert scores["accuracy"][0] == pytest.approx(sum(a == b for a, b in zip(own, wanted)) / 9)


def test_letters_of_map_may_have_no_spaces():
    scores = score_answers("map", [""], ["AABAABBBA"], [["A A B A A B B B B"]])
    assert scores["accuracy"][0] == 8 / 9 and scores["mean_iou"][0] == pytest.approx((4 / 5 + 4 / 5) / 2)
