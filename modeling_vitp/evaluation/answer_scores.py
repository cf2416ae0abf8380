"""Scores of a model's answers, by the kind of answer that is wanted; each is the mean of its values."""

import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from ..instructions.boxes import iou, read_boxes
from .caption_scores import score_captions

ACCURATE_IOU = 0.5
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[<>%]")
# A line with a choice, such as `B. a lung` or `(B) a lung`; and an answer that names one.
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
LETTER = re.compile(r"\W*(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? )?\W*([A-Z])(?:[.):,]|\s*$)", re.I)


def score_answers(
    kind: str, questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray | float]:
    """Values of each score by question, or one value where a score is of all answers together.

    Args:
        kind: of [`KINDS`].
        questions: as the model was asked.
        references: of each question, one or several right answers.
    """
    return KINDS[kind](questions, answers, references)


def score_words(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Whether an answer is one of the references, both normalized."""
    wanted = [{normalize_answer(reference) for reference in found} for found in references]
    return {"accuracy": np.array([normalize_answer(one) in found for one, found in zip(answers, wanted)], dtype=float)}


def normalize_answer(text: str) -> str:
    """As VQA is scored (Antol et al. 2015): lower case, digits for numbers up to ten, no articles or punctuation.

    What is nothing else stays as it is in lower case.
    """
    lowered = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "").replace("’", "")
    words = [NUMBERS.get(word, word) for word in WORD.findall(lowered) if word not in ARTICLES]
    return " ".join(words) or lowered.strip()


def score_choices(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Whether an answer names or says the right one of the choices that are listed in the question."""
    right = []
    for question, answer, found in zip(questions, answers, references):
        choices = read_choices(question)
        chosen = choose(answer, choices)
        right.append(chosen is not None and chosen == choose(found[0], choices))
    return {"accuracy": np.array(right, dtype=float)}


def read_choices(question: str) -> dict[str, str]:
    """Choices by their letters; empty unless two or more are listed, one a line, from A on without a gap."""
    choices = dict(OPTION.findall(question))
    is_list = len(choices) > 1 and "".join(choices) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    return choices if is_list else {}


def choose(answer: str, choices: dict[str, str]) -> str | None:
    """The letter of a choice: which an answer names, or else whose text is most similar to it (PMC-VQA, OmniMedVQA)."""
    named = LETTER.match(answer)
    if named and named[1].upper() in choices:
        return named[1].upper()
    if not answer.strip():
        return None

    def similarity(letter: str) -> float:
        return difflib.SequenceMatcher(None, choices[letter].lower(), answer.strip().lower()).ratio()

    return max(choices, key=similarity, default=None)


def score_boxes(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Of the first box in an answer, on the grid, its IoU with that of the reference; 0 if there is none."""
    found = [read_boxes(answer)[0][:1] for answer in answers]
    wanted = [read_boxes(reference[0])[0][0] for reference in references]
    overlaps = np.array([iou(box[0][:4], other[:4]) if box else 0.0 for box, other in zip(found, wanted)])
    return {
        f"accuracy_at_{ACCURATE_IOU}": (overlaps >= ACCURATE_IOU).astype(float),
        "mean_iou": overlaps,
        "answers_with_box": np.array([bool(box) for box in found], dtype=float),
    }


def score_maps(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """The share of cells that are right, of those of the reference, in their order."""
    pairs = [(cells(answer), cells(found[0])) for answer, found in zip(answers, references)]
    return {"accuracy": np.array([sum(map(str.__eq__, own, wanted)) / len(wanted) for own, wanted in pairs])}


def cells(text: str) -> list[str]:
    """The words of a map, or the letters of one that has no spaces."""
    return text.split() if len(text.split()) > 1 else list(text.strip())


Score = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], dict[str, np.ndarray | float]]
KINDS: dict[str, Score] = {
    "grounding": score_boxes,
    "choice": score_choices,
    "vqa": score_words,
    "map": score_maps,
    "caption": lambda questions, answers, references: score_captions(answers, references),
}
