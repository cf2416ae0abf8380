"""What rows ask: each question with its right answers, what kind of answer is wanted, and whose images are others."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..instructions.boxes import MARKS, read_boxes
from ..instructions.collator import ViTPDataCollator
from ..instructions.rows import images_of, is_given, sample_id_of
from ..processing_vitp import message_texts
from .answer_scores import named_choice, read_choices

# Questions for a caption and for a map, and the most words of an answer that is neither.
CAPTION = re.compile(r"\[caption\]|\b(?:describe|description|caption)\b", re.IGNORECASE)
MAP = re.compile(r"\b(?:map|cells?)\b", re.IGNORECASE)
MOST_WORDS = 6
LONGEST_WORD = 20  # letters
STOPS = re.compile(r"[.,;:!?]")
THREE_ALIKE = re.compile(r"(.)\1\1", re.IGNORECASE)  # letters in a row, as no word has


@dataclass(frozen=True)
class Question:
    """A turn of a row that is to be answered.

    Args:
        id: of the row.
        row: its place in the data set.
        turn: place of the answer among the messages.
        text: of the question.
        references: right answers: of all rows that ask the same of the same images.
        kind: of [`~modeling_vitp.evaluation.answer_scores.KINDS`].
        images: what tells the row's images from others.
    """

    id: str
    row: int
    turn: int
    text: str
    references: tuple[str, ...]
    kind: str
    images: tuple[str, ...]


def read_questions(rows: Iterable[dict[str, Any]], kind: str | None = None) -> tuple[list[Question], int]:
    """The questions about images, in the order of the rows, and the number of answers that are not scored.

    Not scored are questions without an image, and answers of no kind, such as several boxes.

    Args:
        rows: conversations with undecoded images.
        kind: of all questions; recognised of each, see [`kind_of`], if `None`.

    Raises:
        ValueError: names the row if it is no conversation.
    """
    found: dict[tuple, Question] = {}
    left_out = 0
    for place, row in enumerate(rows):
        if row.get("error"):
            raise ValueError(f"Sample {sample_id_of(row)!r}: {row['error']}")
        images = tuple(image_key(image) for image in images_of(row))
        messages = row["messages"]
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or is_given(message):
                continue
            asked = [" ".join(message_texts(one)) for one in messages[:turn]]
            text, reference = asked[-1] if asked else "", " ".join(message_texts(message))
            wanted = kind or kind_of(text, reference)
            if not images or wanted is None:
                left_out += 1
                continue
            if wanted == "grounding" and not read_boxes(reference)[0]:
                raise ValueError(f"Sample {sample_id_of(row)!r}: its answer {reference[:80]!r} has no box: give kind.")
            if wanted == "choice" and not read_choices(text):
                raise ValueError(f"Sample {sample_id_of(row)!r}: its question lists no choices, one a line: give kind.")
            same = found.get((images, *asked))
            references = (*same.references, reference) if same else (reference,)
            first = (same.id, same.row, same.turn) if same else (str(sample_id_of(row)), place, turn)
            found[(images, *asked)] = Question(*first, text, references, same.kind if same else wanted, images)
    return list(found.values()), left_out


def image_key(image: Any) -> str:
    """The path of an encoded image, or a hash of its bytes."""
    path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
    return hashlib.sha256(content).hexdigest() if content is not None else str(path)


def kind_of(question: str, reference: str) -> str | None:
    """`grounding` if the answer is one box; `choice` if it is one of those that the question lists; `map` if a question
    about a map or its cells is answered with one, see [`is_map`]; `caption` if the question asks for a description, but
    not of a box, or the answer has more than 6 words; else `vqa`. `None` if it has several boxes, or one in a longer
    text.
    """
    boxes, rest = read_boxes(reference)[0], MARKS.sub(" ", reference)
    if boxes:
        return "grounding" if len(boxes) == 1 and len(rest.split()) <= MOST_WORDS else None
    if named_choice(reference, read_choices(question)):
        return "choice"
    if MAP.search(question) and is_map(question, reference):
        return "map"
    is_long = len(reference.split()) > MOST_WORDS
    asks = CAPTION.search(question) and not read_boxes(question)[0]
    return "caption" if is_long or asks else "vqa"


def is_map(question: str, answer: str) -> bool:
    """Whether an answer has a word for each cell: more than 6, all of them in the question, or no sentence and at most
    half of them different; or a letter for each: more than 20, with three in a row the same.
    """
    words = answer.split()
    if len(words) > MOST_WORDS:
        is_repeated = 2 * len(set(words)) <= len(words) and not STOPS.search(answer)
        return is_repeated or set(words) <= {word.strip(",.?") for word in question.split()}
    return len(words) == 1 and len(answer) > LONGEST_WORD and THREE_ALIKE.search(answer) is not None


def others(images: Sequence[tuple[str, ...]]) -> list[int | None]:
    """For the images of each question, the place of a question with as many others: half of all images away. `None`
    where all with as many have the same.
    """
    first: dict[int, dict[tuple[str, ...], int]] = {}
    for place, one in enumerate(images):
        first.setdefault(len(one), {}).setdefault(one, place)
    partner = {}
    for places in first.values():
        keys = list(places)
        if len(keys) > 1:
            partner |= {key: places[keys[(at + len(keys) // 2) % len(keys)]] for at, key in enumerate(keys)}
    return [partner.get(one) for one in images]


def conversation_of(
    collator: ViTPDataCollator, rows: Dataset, question: Question, other: Question | None = None
) -> list[dict[str, Any]]:
    """The messages up to a question, earlier answers as they should be, with the images of its row or of another's."""
    row, name = rows[question.row], f"Sample {question.id!r}"
    if other is not None:
        row, name = {**row, "images": images_of(rows[other.row])}, f"{name} with the images of {other.id!r}"
    try:
        return collator.conversation(row)[0][: question.turn]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
