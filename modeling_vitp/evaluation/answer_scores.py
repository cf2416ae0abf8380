"""Scores of answers by kind of the expected answer; a score is the mean of its values."""

import difflib
import math
import re
import string
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ..data.boxes import Box, iou
from ..instructions.boxes import COVER_LETTERS, read_boxes

ACCURATE_IOU = 0.5
LOWER_IS_BETTER = ("mean_error",)  # All other scores are better when they are higher.
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
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

# Values of each score, one per answer, or a single value if the score is defined on all answers.
ScoreValues = dict[str, np.ndarray | float]


def score_answers(
    kind: str,
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Return the values of each score, one per question, or a single value if the score is defined on all answers.

    Args:
        kind: kind of the answers, a key of [`KINDS`].
        questions: texts of the questions.
        answers: answer to each question.
        references: one or several correct answers to each question.
    """
    return KINDS[kind](questions, answers, references)


def score_words(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score whether an answer equals one of the references after normalization."""
    is_correct = []
    for answer, correct_answers in zip(answers, references):
        normalized_references = {normalize_answer(reference) for reference in correct_answers}
        is_correct.append(normalize_answer(answer) in normalized_references)
    return {"accuracy": np.array(is_correct, dtype=float)}


def score_counts(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score the numbers of answers: whether a number equals a reference, and its absolute error.

    The error of an answer without a number is that of 0.
    """
    has_number = []
    errors = []
    for answer, correct_answers in zip(answers, references):
        number = read_number(answer)
        has_number.append(number is not None)
        distances = []
        for reference in correct_answers:
            correct_number = read_number(reference) or 0
            distances.append(abs((number or 0) - correct_number))
        errors.append(min(distances))
    errors = np.array(errors, dtype=float)
    is_correct = (errors == 0) & np.array(has_number)
    return {"mean_error": errors, "accuracy": is_correct.astype(float)}


def read_number(answer: str) -> int | None:
    """Return the first integer of an answer, written in digits or as a word up to ten, or `None`."""
    for word in WORD.findall(answer.lower()):
        digits = NUMBERS.get(word, word)
        if digits.isdecimal():
            return int(digits)
    return None


def normalize_answer(text: str) -> str:
    """Normalize a text as VQA does (Antol et al. 2015): lower case, digits up to ten, no articles or punctuation.

    A text of articles alone keeps them. A text without words is only converted to lower case.
    """
    lowered = text.lower()
    lowered = re.sub(r"(?<=\d),(?=\d)", "", lowered)
    lowered = lowered.replace("'", "")
    lowered = lowered.replace("’", "")
    words = [NUMBERS.get(word, word) for word in WORD.findall(lowered)]
    if not words:
        return lowered.strip()
    words_without_articles = [word for word in words if word not in ARTICLES]
    return " ".join(words_without_articles or words)


def score_choices(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score whether an answer names or repeats a correct choice of those that the question lists."""
    is_correct = []
    for question, answer, correct_answers in zip(questions, answers, references):
        choices = read_choices(question)
        letter = choose_option(answer, choices)
        correct_letters = {choose_option(reference, choices) for reference in correct_answers}
        is_correct.append(letter is not None and letter in correct_letters)
    return {"accuracy": np.array(is_correct, dtype=float)}


def read_choices(question: str) -> dict[str, str]:
    """Return the choices by their letters; empty unless a question lists at least two, one per line, from A on."""
    choices = dict(OPTION.findall(question))
    first_letters = list(string.ascii_uppercase[: len(choices)])
    if len(choices) < 2 or list(choices) != first_letters:
        return {}
    return choices


def choose_option(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the choice that an answer names, or else of the most similar one (PMC-VQA, OmniMedVQA).

    Return `None` if no choice is similar, or several are named.
    """
    letter = named_choice(answer, choices)
    if letter is not None:
        return letter
    response = answer.strip()
    if several_letters(response) or len(repeated(response, choices)) > 1:
        return None

    most_similar_letter = None
    highest_similarity = 0.0
    for letter, text in choices.items():
        matcher = difflib.SequenceMatcher(None, text.lower(), response.lower())
        similarity = matcher.ratio()
        if similarity > highest_similarity:
            most_similar_letter = letter
            highest_similarity = similarity
    return most_similar_letter


def named_choice(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the only choice that an answer repeats verbatim or names by its letter, or `None`."""
    response = answer.strip()
    plain_choices = {letter: plain_text(text) for letter, text in choices.items()}
    option = OPTION.fullmatch(response)
    if option:
        letter, text = option.groups()
        if plain_text(text) == plain_choices.get(letter):
            return letter
    if response.upper() in choices:
        return response.upper()
    if response:
        for letter, text in plain_choices.items():
            if plain_text(response) == text:
                return letter
    response_letters = several_letters(response)
    if response_letters:
        return choice_of_letters(response_letters, choices)
    return letter_in_sentence(response, choices)


def choice_of_letters(letters: set[str], choices: dict[str, str]) -> str | None:
    """Return the first choice whose own text is several letters, such as `Both A and B`, and the given ones."""
    for choice, text in choices.items():
        if several_letters(text) == letters:
            return choice
    return None


def letter_in_sentence(response: str, choices: dict[str, str]) -> str | None:
    """Return the only letter of a choice that a sentence begins with or refers to, such as `The answer is B`."""
    first_letter = None
    if len(repeated(response, choices)) < 2:
        first_letter = FIRST.match(response)
    if first_letter:
        mentions = [first_letter]
    else:
        mentions = NAMED.finditer(response)
    letters = set()
    for mention in mentions:
        # `C. albicans is seen` does not name the choice C if another choice is `C. albicans`.
        text_from_letter = response[mention.start(1) :]
        if not any(begin_alike(text_from_letter, text) for text in choices.values()):
            letters.add(mention[1].upper())
    if len(letters) != 1 or not letters <= choices.keys():
        return None
    return letters.pop()


def several_letters(response: str) -> set[str]:
    """Return the letters of a text that consists of several letters, or an empty set."""
    without_parentheses = MARKED.sub(lambda match: match[1].upper(), response)
    bare_text = MARKS.sub("", without_parentheses)
    if not SEVERAL.fullmatch(bare_text):
        return set()
    return set(ALONE.findall(bare_text))


def repeated(response: str, choices: dict[str, str]) -> set[str]:
    """Return the letters of the choices that a text repeats: each on its own line, or all without other text."""
    letters = set()
    for letter, text in OPTION.findall(response):
        if plain_text(text) == plain_text(choices.get(letter, "")):
            letters.add(letter)
    one_line = " ".join(response.split())
    patterns = []
    for letter, text in choices.items():
        patterns.append(rf"({letter})[.):] ?{re.escape(plain_text(text))}")
    any_choice = re.compile("|".join(patterns), re.IGNORECASE)
    text_without_choices = any_choice.sub("", one_line)
    if re.fullmatch(r"(?:[\W_]|and|or|both|either)*", text_without_choices, re.IGNORECASE):
        for match in any_choice.finditer(one_line):
            if match.lastindex is not None:  # Without choices, the pattern is empty and has no group.
                letters.add(match[match.lastindex].upper())
    return letters


def plain_text(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def begin_alike(text: str, other_text: str) -> bool:
    """Return whether two texts have the same first two words."""
    first_words = re.findall(r"\w+", text.casefold())[:2]
    other_first_words = re.findall(r"\w+", other_text.casefold())[:2]
    return len(first_words) == 2 and first_words == other_first_words


def score_boxes(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score the first box of an answer by its highest IoU with the first box of a reference; 0 without a box."""
    has_box = []
    overlaps = []
    for answer, correct_answers in zip(answers, references):
        box = first_box(answer)
        highest_overlap = 0.0
        for reference in correct_answers:
            reference_box = first_box(reference)
            if box is not None and reference_box is not None:
                highest_overlap = max(highest_overlap, iou(box, reference_box))
        has_box.append(box is not None)
        overlaps.append(highest_overlap)
    overlaps = np.array(overlaps)
    is_accurate = overlaps >= ACCURATE_IOU
    return {
        f"accuracy_at_{ACCURATE_IOU}": is_accurate.astype(float),
        "mean_iou": overlaps,
        "answers_with_box": np.array(has_box, dtype=float),
    }


def first_box(text: str) -> Box | None:
    boxes, _ = read_boxes(text)
    if not boxes:
        return None
    return boxes[0][:4]


def score_maps(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score the cells of a map, in order: the share of correct ones, and the mean IoU of the words of both maps.

    With several references, the scores are those of the best one.
    """
    accuracies = []
    overlaps = []
    for answer, correct_answers in zip(answers, references):
        answer_map = cells(answer)
        map_accuracies = []
        map_overlaps = []
        for reference in correct_answers:
            reference_map = cells(reference)
            map_accuracies.append(share_of_equal_cells(answer_map, reference_map))
            map_overlaps.append(mean_iou_of_words(answer_map, reference_map))
        accuracies.append(max(map_accuracies))
        overlaps.append(max(map_overlaps))
    return {"accuracy": np.array(accuracies), "mean_iou": np.array(overlaps)}


def score_fine_maps(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score maps of covered quarters: the share of correct cells, and the IoU of the box of the largest covered area.

    If neither the answer nor the reference has a covered area, the IoU is 1; if one of them has none, it is 0.
    """
    accuracies = []
    overlaps = []
    for answer, correct_answers in zip(answers, references):
        reference = correct_answers[0]
        accuracies.append(share_of_equal_cells(cells(answer), cells(reference)))
        answer_box = largest_area(answer)
        reference_box = largest_area(reference)
        if answer_box is None or reference_box is None:
            overlaps.append(float(answer_box is reference_box))
        else:
            overlaps.append(iou(answer_box, reference_box))
    return {"largest_area_iou": np.array(overlaps), "accuracy": np.array(accuracies)}


def largest_area(answer: str) -> Box | None:
    """Return the box of the largest connected area of the covered quarters of a map, in quarters, or `None`."""
    letters = answer.lower().split()
    side = math.isqrt(len(letters))
    covers = []
    for letter in letters[: side**2]:
        cover = COVER_LETTERS.find(letter)
        covers.append(max(cover, 0))
    covers = np.array(covers, dtype=np.int64)
    if not covers.any():
        return None
    # Each of the four lowest bits says whether a quarter of the cell is covered: two rows of two quarters.
    bits = np.arange(4)
    quarters = (covers[:, None] >> bits) & 1
    quarters = quarters.reshape(side, side, 2, 2)
    quarters = quarters.swapaxes(1, 2)
    covered = quarters.reshape(2 * side, 2 * side)
    covered = covered.astype(np.uint8)
    _, _, areas, _ = cv2.connectedComponentsWithStats(covered, connectivity=4)
    areas = areas[1:]  # The first is the background.
    largest = areas[:, cv2.CC_STAT_AREA].argmax()
    left, top, width, height, _ = areas[largest].tolist()
    return (left, top, left + width, top + height)


def share_of_equal_cells(answer_map: Sequence[str], reference_map: Sequence[str]) -> float:
    num_equal = 0
    for answer_cell, reference_cell in zip(answer_map, reference_map):
        num_equal += answer_cell == reference_cell
    return num_equal / len(reference_map)


def mean_iou_of_words(answer_map: Sequence[str], reference_map: Sequence[str]) -> float:
    """Return the intersection over union of the cells with a word, as a mean over the words of two maps."""
    num_cells = len(reference_map)
    answer_cells = list(answer_map[:num_cells])
    answer_cells += [""] * (num_cells - len(answer_cells))
    answer_cells = np.array(answer_cells)
    reference_cells = np.array(reference_map)
    overlaps = []
    for word in {*answer_cells, *reference_cells} - {""}:
        in_answer = answer_cells == word
        in_reference = reference_cells == word
        intersection = (in_answer & in_reference).sum()
        union = (in_answer | in_reference).sum()
        overlaps.append(intersection / union)
    return float(np.mean(overlaps))


def cells(text: str) -> list[str]:
    """Return the words of a map, or its letters if it has no spaces."""
    words = text.split()
    if len(words) > 1:
        return words
    return list(text.strip())


def score_captions(answers: Sequence[str], references: Sequence[Sequence[str]]) -> ScoreValues:
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

    captions = {}
    for index, answer in enumerate(answers):
        captions[index] = [tokenize(answer)]
    reference_captions = {}
    for index, correct_captions in enumerate(references):
        reference_captions[index] = [tokenize(caption) for caption in correct_captions]
    scores = {}
    bleu_scores, _ = Bleu(4).compute_score(reference_captions, captions, verbose=0)
    for order, score in enumerate(bleu_scores, start=1):
        scores[f"bleu_{order}"] = float(score)
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        _, caption_scores = scorer.compute_score(reference_captions, captions)
        scores[name] = np.asarray(caption_scores, dtype=float)
    return scores


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces."""
    return " ".join(TOKEN.findall(text.lower()))


def score_caption_questions(
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ScoreValues:
    """Score captions, see [`score_captions`], whatever the questions are."""
    return score_captions(answers, references)


Score = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], ScoreValues]
KINDS: dict[str, Score] = {
    "count": score_counts,
    "grounding": score_boxes,
    "choice": score_choices,
    "vqa": score_words,
    "map": score_maps,
    "fine_map": score_fine_maps,
    "caption": score_caption_questions,
}
