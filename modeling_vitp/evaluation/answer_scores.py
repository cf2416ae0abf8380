"""Scores of a model's answers, by the kind of the expected answer; a score is the mean of its values."""

import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from ..instructions.boxes import iou, read_boxes

ACCURATE_IOU = 0.5
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"\d*\.\d+|\d+|[^\W\d_]+|[<>%]")
# A line with a choice, such as `B. a lung` or `(B) a lung`.
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# A letter that is no word of a sentence, by what comes after it: `B.`, `**B**`, `B because`. It names a choice at the
# beginning of an answer, or after words that say so: `The answer is B`, `option B`, `I think B`.
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
# Several letters and nothing else, such as `Both A and B`, without the marks that they may have, as in `(A), **B**`.
SEVERAL = re.compile(
    r"\W*(?i:(?:the|correct|answers?|options?|choices?|is|are|both|either)\W+)*"
    r"[A-Z](?:\s*(?:[,/&;.]|\band\b|\bor\b)\s*(?:(?:and|or)\s+)?[A-Z])+\W*"
)
MARKED = re.compile(r"\(([a-z])\)")
MARKS = re.compile(r"[\"'“”’*$`_{}<>()\[\]]|(?<=\b[A-Z])[.:](?=\s|$)")
ALONE = re.compile(r"\b[A-Z]\b")
# Numbers with their separators, words with their hyphens, and what follows an apostrophe.
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:-\w+)*|'\w+")


def score_answers(
    kind: str, questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray | float]:
    """Return the values of each score by question, or one value where a score is of all answers together.

    Args:
        kind: of [`KINDS`].
        questions: as the model was asked.
        references: of each question, one or several right answers.
    """
    return KINDS[kind](questions, answers, references)


def score_words(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score whether an answer is one of the references, both normalized."""
    wanted = [{normalize_answer(reference) for reference in found} for found in references]
    return {"accuracy": np.array([normalize_answer(one) in found for one, found in zip(answers, wanted)], dtype=float)}


def normalize_answer(text: str) -> str:
    """Normalize a text as VQA does (Antol et al. 2015): lower case, digits up to ten, no articles or punctuation.

    A text of articles alone keeps them, and a text without words is only lower-cased.
    """
    lowered = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "").replace("’", "")
    words = [NUMBERS.get(word, word) for word in WORD.findall(lowered)]
    return " ".join([word for word in words if word not in ARTICLES] or words) or lowered.strip()


def score_choices(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Score whether an answer names or says a right one of the choices that are listed in the question."""
    right = []
    for question, answer, found in zip(questions, answers, references):
        choices = read_choices(question)
        chosen = choose_option(answer, choices)
        right.append(chosen is not None and chosen in {choose_option(reference, choices) for reference in found})
    return {"accuracy": np.array(right, dtype=float)}


def read_choices(question: str) -> dict[str, str]:
    """Return the choices by their letters; empty unless two or more are listed, one a line, from A on without a gap."""
    choices = dict(OPTION.findall(question))
    is_list = len(choices) > 1 and "".join(choices) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    return choices if is_list else {}


def choose_option(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the choice that an answer names, or else of the most similar one (PMC-VQA, OmniMedVQA).

    `None` if no choice is similar, or several are named.
    """
    said, named = answer.strip(), named_choice(answer, choices)
    if named or several_letters(said) or len(repeated(said, choices)) > 1:
        return named

    def similarity(letter: str) -> float:
        return difflib.SequenceMatcher(None, choices[letter].lower(), said.lower()).ratio()

    best = max(choices, key=similarity, default=None)
    return best if best is not None and similarity(best) > 0 else None


def named_choice(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the only choice that an answer repeats word for word or names by its letter, or `None`."""
    said = answer.strip()
    option, texts = OPTION.fullmatch(said), {letter: plain_text(text) for letter, text in choices.items()}
    if option and plain_text(option[2]) == texts.get(option[1]):
        return option[1]
    if said.upper() in choices:
        return said.upper()
    for letter, text in texts.items():
        if said and plain_text(said) == text:
            return letter
    if named := several_letters(said):
        return next((one for one, text in choices.items() if several_letters(text) == named), None)
    first = FIRST.match(said) if len(repeated(said, choices)) < 2 else None
    found = [first] if first else NAMED.finditer(said)
    # `C. albicans is seen` does not name the choice C where another one is `C. albicans`.
    found = [one for one in found if not any(begin_alike(said[one.start(1) :], text) for text in choices.values())]
    letters = {one[1].upper() for one in found}
    return letters.pop() if len(letters) == 1 and letters <= choices.keys() else None


def several_letters(said: str) -> set[str]:
    """Return the letters of a text that is several and nothing else."""
    bare = MARKS.sub("", MARKED.sub(lambda found: found[1].upper(), said))
    return set(ALONE.findall(bare)) if SEVERAL.fullmatch(bare) else set()


def repeated(said: str, choices: dict[str, str]) -> set[str]:
    """Return the letters of the choices that a text repeats: each on its own line, or all with nothing else."""
    lines = {letter for letter, text in OPTION.findall(said) if plain_text(text) == plain_text(choices.get(letter, ""))}
    listed = "|".join(rf"({letter})[.):] ?{re.escape(plain_text(text))}" for letter, text in choices.items())
    rest = re.sub(listed, "", " ".join(said.split()), flags=re.IGNORECASE)
    if re.fullmatch(r"(?:[\W_]|and|or|both|either)*", rest, re.IGNORECASE):
        lines |= {one for found in re.findall(listed, " ".join(said.split()), re.IGNORECASE) for one in found if one}
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
    """Of the first box in an answer, on the grid, its best IoU with that of a reference; 0 if there is none."""
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
    """The share of cells that are right, of those of the reference that is most alike, in their order."""
    pairs = [(cells(answer), map(cells, found)) for answer, found in zip(answers, references)]
    shares = [max(sum(map(str.__eq__, own, one)) / len(one) for one in wanted) for own, wanted in pairs]
    return {"accuracy": np.array(shares)}


def cells(text: str) -> list[str]:
    """Return the words of a map, or the letters of one that has no spaces."""
    return text.split() if len(text.split()) > 1 else list(text.strip())


def score_captions(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray | float]:
    """Return `bleu_1` to `bleu_4` of all captions together; `rouge_l` and `cider` of each.

    Words are told as COCO's evaluation tells them, in lower case and without punctuation, but not by its tokenizer,
    which is a Java program. CIDEr is CIDEr-D, as there: from 0 to 10, and 0 where all images have the same references,
    since no word then tells one image from another.

    Args:
        references: of each caption, one or several.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {place: [tokenize(answer)] for place, answer in enumerate(answers)}
    wanted = {place: [tokenize(reference) for reference in several] for place, several in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, 1)}
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        scores[name] = np.asarray(scorer.compute_score(wanted, found)[1], dtype=float)
    return scores


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, with a space between them."""
    return " ".join(TOKEN.findall(text.lower()))


Score = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], dict[str, np.ndarray | float]]
KINDS: dict[str, Score] = {
    "grounding": score_boxes,
    "choice": score_choices,
    "vqa": score_words,
    "map": score_maps,
    "caption": lambda questions, answers, references: score_captions(answers, references),
}
