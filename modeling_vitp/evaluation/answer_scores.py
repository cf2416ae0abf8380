"""Scores of answers by kind of the expected answer; a score is the mean of its values."""

import difflib
import math
import re
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ..data.boxes import Box, iou
from ..instructions.boxes import COVER_LETTERS, read_boxes

ACCURATE_IOU = 0.5
LOWER_IS_BETTER = ("mean_error",)  # All other scores are better when they are higher.
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"\d*\.\d+|\d+|[^\W\d_]+|[<>%]")
# Line with a choice, such as `B. a lung` or `(B) a lung`.
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# Letter that is not a word of a sentence, by the text after it: `B.`, `**B**`, `B because`. It names a choice at the
# beginning of an answer, or after words such as `The answer is B`, `option B`, `I think B`.
LETTER = (
    r"(?<![a-z0-9])([a-z])(?:[.):,;]|[\"'”’*$`_\]}<]+(?![a-z0-9])|[\W_]*?$|\s+[-–—]\s"
    r"|\s+(?:because|since|as|is (?:the )?(?:correct|right|best))\b)"
)
FIRST = re.compile(rf"[\W_]*{LETTER}", re.IGNORECASE | re.MULTILINE)
NAMED = re.compile(
    r"(?<!not )\b(?:answer|option|choice|boxed|choose|think|believe|it(?: i|['’])s)"
    r"(?:\W+(?:is|it|its|it['’]s|that|the|correct|right|answer|option|choice))*(?:[^\w.!?]|_)*" + LETTER,
    re.IGNORECASE | re.MULTILINE,
)
# Several letters without other text, such as `Both A and B`. Marks, as in `(A), **B**`, are removed before.
SEVERAL = re.compile(
    r"\W*(?i:(?:the|correct|answers?|options?|choices?|is|are|both|either)\W+)*"
    r"[A-Z](?:\s*(?:[,/&;.]|\band\b|\bor\b)\s*(?:(?:and|or)\s+)?[A-Z])+\W*"
)
MARKED = re.compile(r"\(([a-z])\)")
MARKS = re.compile(r"[\"'“”’*$`_{}<>()\[\]]|(?<=\b[A-Z])[.:](?=\s|$)")
ALONE = re.compile(r"\b[A-Z]\b")
# Numbers with separators, words with hyphens, and letters after an apostrophe.
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:-\w+)*|'\w+")


def score_answers(
    kind: str, questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray | float]:
    """Return the values of each score, one per question, or a single value if the score is defined on all answers.

    Args:
        kind: kind of the answers, a key of [`KINDS`].
        questions: texts of the questions.
        answers: answer to each question.
        references: one or several correct answers to each question.
    """
    return KINDS[kind](questions, answers, references)


def score_words(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score whether an answer equals one of the references after normalization."""
    wanted = [{normalize_answer(reference) for reference in found} for found in references]
    return {"accuracy": np.array([normalize_answer(one) in found for one, found in zip(answers, wanted)], dtype=float)}


def score_counts(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score the numbers of answers: whether a number equals a reference, and its absolute error.

    The error of an answer without a number is that of 0.
    """
    numbers = [read_number(answer) for answer in answers]
    errors = []
    for number, several in zip(numbers, references):
        wanted = [read_number(reference) or 0 for reference in several]
        errors.append(min(abs((number or 0) - reference) for reference in wanted))
    has_number = np.array([number is not None for number in numbers])
    errors = np.array(errors, dtype=float)
    return {"mean_error": errors, "accuracy": ((errors == 0) & has_number).astype(float)}


def read_number(answer: str) -> int | None:
    """Return the first integer of an answer, written in digits or as a word up to ten, or `None`."""
    words = [NUMBERS.get(word, word) for word in WORD.findall(answer.lower())]
    return next((int(word) for word in words if word.isdecimal()), None)


def normalize_answer(text: str) -> str:
    """Normalize a text as VQA does (Antol et al. 2015): lower case, digits up to ten, no articles or punctuation.

    A text of articles alone keeps them. A text without words is only converted to lower case.
    """
    lowered = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "").replace("’", "")
    words = [NUMBERS.get(word, word) for word in WORD.findall(lowered)]
    return " ".join([word for word in words if word not in ARTICLES] or words) or lowered.strip()


def score_choices(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score whether an answer names or repeats a correct choice of those that the question lists."""
    right = []
    for question, answer, found in zip(questions, answers, references):
        choices = read_choices(question)
        chosen = choose_option(answer, choices)
        right.append(chosen is not None and chosen in {choose_option(reference, choices) for reference in found})
    return {"accuracy": np.array(right, dtype=float)}


def read_choices(question: str) -> dict[str, str]:
    """Return the choices by their letters; empty unless a question lists at least two, one per line, from A on."""
    choices = dict(OPTION.findall(question))
    is_list = len(choices) > 1 and "".join(choices) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    return choices if is_list else {}


def choose_option(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the choice that an answer names, or else of the most similar one (PMC-VQA, OmniMedVQA).

    Return `None` if no choice is similar, or several are named.
    """
    response, named = answer.strip(), named_choice(answer, choices)
    if named or several_letters(response) or len(repeated(response, choices)) > 1:
        return named

    def similarity(letter: str) -> float:
        return difflib.SequenceMatcher(None, choices[letter].lower(), response.lower()).ratio()

    best = max(choices, key=similarity, default=None)
    return best if best is not None and similarity(best) > 0 else None


def named_choice(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the only choice that an answer repeats verbatim or names by its letter, or `None`."""
    response = answer.strip()
    option, texts = OPTION.fullmatch(response), {letter: plain_text(text) for letter, text in choices.items()}
    if option and plain_text(option[2]) == texts.get(option[1]):
        return option[1]
    if response.upper() in choices:
        return response.upper()
    for letter, text in texts.items():
        if response and plain_text(response) == text:
            return letter
    if named := several_letters(response):
        return next((one for one, text in choices.items() if several_letters(text) == named), None)
    first = FIRST.match(response) if len(repeated(response, choices)) < 2 else None
    found = [first] if first else NAMED.finditer(response)
    # `C. albicans is seen` does not name the choice C if another choice is `C. albicans`.
    found = [one for one in found if not any(begin_alike(response[one.start(1) :], text) for text in choices.values())]
    letters = {one[1].upper() for one in found}
    return letters.pop() if len(letters) == 1 and letters <= choices.keys() else None


def several_letters(response: str) -> set[str]:
    """Return the letters of a text that consists of several letters, or an empty set."""
    bare = MARKS.sub("", MARKED.sub(lambda found: found[1].upper(), response))
    return set(ALONE.findall(bare)) if SEVERAL.fullmatch(bare) else set()


def repeated(response: str, choices: dict[str, str]) -> set[str]:
    """Return the letters of the choices that a text repeats: each on its own line, or all without other text."""
    options = OPTION.findall(response)
    lines = {letter for letter, text in options if plain_text(text) == plain_text(choices.get(letter, ""))}
    listed = "|".join(rf"({letter})[.):] ?{re.escape(plain_text(text))}" for letter, text in choices.items())
    rest = re.sub(listed, "", " ".join(response.split()), flags=re.IGNORECASE)
    if re.fullmatch(r"(?:[\W_]|and|or|both|either)*", rest, re.IGNORECASE):
        lines |= {
            one for found in re.findall(listed, " ".join(response.split()), re.IGNORECASE) for one in found if one
        }
    return {letter.upper() for letter in lines}


def plain_text(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def begin_alike(one: str, other: str) -> bool:
    """Return whether two texts have the same first two words."""
    first, second = (re.findall(r"\w+", text.casefold())[:2] for text in (one, other))
    return len(first) == 2 and first == second


def score_boxes(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score the first box of an answer by its highest IoU with the first box of a reference; 0 without a box."""
    found = [read_boxes(answer)[0][:1] for answer in answers]
    wanted = [[box for reference in several for box in read_boxes(reference)[0][:1]] for several in references]
    pairs = [[iou(box[:4], other[:4]) for box in own for other in others] for own, others in zip(found, wanted)]
    overlaps = np.array([max(one, default=0.0) for one in pairs])
    return {
        f"accuracy_at_{ACCURATE_IOU}": (overlaps >= ACCURATE_IOU).astype(float),
        "mean_iou": overlaps,
        "answers_with_box": np.array([bool(box) for box in found], dtype=float),
    }


def score_maps(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score the cells of a map, in order: the share of correct ones, and the mean IoU of the words of both maps.

    With several references, the scores are those of the best one.
    """
    accuracies, overlaps = [], []
    for answer, several in zip(answers, references):
        own, maps = cells(answer), [cells(reference) for reference in several]
        accuracies.append(max(share_of_equal_cells(own, wanted) for wanted in maps))
        overlaps.append(max(mean_iou_of_words(own, wanted) for wanted in maps))
    return {"accuracy": np.array(accuracies), "mean_iou": np.array(overlaps)}


def score_fine_maps(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score maps of covered quarters: the share of correct cells, and the IoU of the box of the largest covered area.

    If neither the answer nor the reference has a covered area, the IoU is 1; if one of them has none, it is 0.
    """
    accuracies, overlaps = [], []
    for answer, several in zip(answers, references):
        own, wanted = cells(answer), cells(several[0])
        accuracies.append(share_of_equal_cells(own, wanted))
        boxes = largest_area(answer), largest_area(several[0])
        overlaps.append(iou(*boxes) if None not in boxes else float(boxes[0] is boxes[1]))
    return {"largest_area_iou": np.array(overlaps), "accuracy": np.array(accuracies)}


def largest_area(answer: str) -> Box | None:
    """Return the box of the largest connected area of the covered quarters of a map, in quarters, or `None`."""
    letters = answer.lower().split()
    side = math.isqrt(len(letters))
    numbers = np.array([max(COVER_LETTERS.find(letter), 0) for letter in letters[: side**2]], dtype=np.int64)
    if not numbers.any():
        return None
    quarters = (numbers[:, None] >> np.arange(4)) & 1
    covered = quarters.reshape(side, side, 2, 2).swapaxes(1, 2).reshape(2 * side, 2 * side)
    _, _, areas, _ = cv2.connectedComponentsWithStats(covered.astype(np.uint8), connectivity=4)
    left, top, width, height, _ = areas[1 + areas[1:, cv2.CC_STAT_AREA].argmax()].tolist()
    return (left, top, left + width, top + height)


def share_of_equal_cells(own: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(map(str.__eq__, own, wanted)) / len(wanted)


def mean_iou_of_words(own: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the intersection over union of the cells with a word, as a mean over the words of two maps."""
    own = [*own[: len(wanted)], *[""] * (len(wanted) - len(own))]
    overlaps = []
    for word in {*own, *wanted} - {""}:
        is_own, is_wanted = np.array([[cell == word for cell in one] for one in (own, wanted)])
        overlaps.append((is_own & is_wanted).sum() / (is_own | is_wanted).sum())
    return float(np.mean(overlaps))


def cells(text: str) -> list[str]:
    """Return the words of a map, or its letters if it has no spaces."""
    return text.split() if len(text.split()) > 1 else list(text.strip())


def score_captions(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray | float]:
    """Return `bleu_1` to `bleu_4` of all captions together, and `rouge_l` and `cider` of each caption.

    Words are split as in COCO's evaluation, in lower case and without punctuation, but without its tokenizer, which is
    a Java program. CIDEr is CIDEr-D, from 0 to 10. It is 0 if all images have the same references.

    Args:
        answers: captions.
        references: one or several references of each caption.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {index: [tokenize(answer)] for index, answer in enumerate(answers)}
    wanted = {index: [tokenize(reference) for reference in several] for index, several in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, 1)}
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        scores[name] = np.asarray(scorer.compute_score(wanted, found)[1], dtype=float)
    return scores


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces."""
    return " ".join(TOKEN.findall(text.lower()))


Score = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], dict[str, np.ndarray | float]]
KINDS: dict[str, Score] = {
    "count": score_counts,
    "grounding": score_boxes,
    "choice": score_choices,
    "vqa": score_words,
    "map": score_maps,
    "fine_map": score_fine_maps,
    "caption": lambda questions, answers, references: score_captions(answers, references),
}
