"""Scores of captions, against values that a second implementation publishes, and against brute force."""

import collections
import math

import numpy as np
import pytest

from modeling_vitp.evaluation.answer_scores import score_captions, tokenize

pytest.importorskip("pycocoevalcap")
# The example of aac-metrics 0.6, with the values that it gives there.
ANSWERS = ["a man is speaking", "rain falls"]
REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]


def test_scores_are_those_that_a_second_implementation_publishes():
    scores = score_captions(ANSWERS, REFERENCES)
    assert scores["bleu_1"] == pytest.approx(0.4278, abs=1e-4)
    assert scores["cider"] == pytest.approx([1.3641, 0.5587], abs=1e-4)
    assert scores["cider"].mean() == pytest.approx(0.9614, abs=1e-4)


def grams(words: list[str], order: int) -> collections.Counter:
    return collections.Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))


def bleu(answers, references, most: int) -> float:
    """Papineni et al. 2002, of the corpus, with the closest length of the references."""
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
    """CIDEr-D, Vedantam et al. 2015, section 5."""
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
    """Lin 2004, with the weight of recall that COCO has."""

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


def test_scores_are_those_of_brute_force():
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


def test_empty_captions_score_nothing_and_a_single_image_has_no_cider():
    scores = score_captions(["", ""], REFERENCES)
    assert scores["cider"].tolist() == scores["rouge_l"].tolist() == [0, 0] and scores["bleu_1"] < 1e-6
    alone = score_captions(["a man speaks"], REFERENCES[:1])
    assert alone["cider"].tolist() == [0] and alone["rouge_l"].tolist() == [1] and alone["bleu_1"] == pytest.approx(1)


def test_words_have_no_case_and_no_punctuation():
    assert tokenize("Two-story houses, 0.5 km2; the tree's SHADE!") == "two-story houses 0.5 km2 the tree 's shade"
