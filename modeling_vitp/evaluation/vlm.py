"""Evaluation of vision-language models: scores of answers with the own image of a question and with another image."""

import hashlib
import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from trl import ScriptArguments

from ..cards.sections import table
from ..images.large import weights_digest
from ..images.pixels import colors_of, principal_scores
from ..instructions.boxes import MARKS, read_boxes
from ..instructions.collator import ViTPDataCollator
from ..instructions.rows import images_of, is_given, prepare_rows, sample_id_of
from ..instructions.sources import open_splits
from ..metrics.resampling import resample_mean
from ..modeling_vitp import ViTPForConditionalGeneration
from ..pretraining.generation import Answered, add_features, draw_answers, first_image, generate_answers
from ..processing_vitp import ViTPProcessor, message_texts
from ..training.checkpointing import attempt, check_no_model, write_whole
from ..training.config import default_device
from .answer_scores import named_choice, read_choices, score_answers
from .arguments import VLMArguments
from .comparison import read_model_type, short_names

# Questions for a caption, a number and maps, and the maximum number of words of other answers.
CAPTION = re.compile(r"\[caption\]|\b(?:describe|description|caption)\b", re.IGNORECASE)
COUNT = re.compile(r"\b(?:how many|number of|count)\b", re.IGNORECASE)
FINE_MAP = re.compile(r"\bquarters of each\b", re.IGNORECASE)
MAP = re.compile(r"\b(?:map|cells?)\b", re.IGNORECASE)
MOST_WORDS = 6
LONGEST_WORD = 20  # Maximum number of letters of a word.
NUMBERED = re.compile(r"[^,.]+ \d+(?:, [^,.]+ \d+)+")  # An answer such as `top left 2, top right 0`.
STOPS = re.compile(r"[.,;:!?]")
THREE_ALIKE = re.compile(r"(.)\1\1", re.IGNORECASE)  # Words do not have three equal letters in a row.


@dataclass(frozen=True)
class Question:
    """Question of a row.

    Args:
        id: id of the row.
        row: index of the row in the data set.
        turn: index of the answer in the messages.
        text: text of the question.
        references: correct answers, from all rows with the same question about the same images.
        kind: kind of the answer, a key of [`~modeling_vitp.evaluation.answer_scores.KINDS`].
        images: paths or hashes of the row's images.
    """

    id: str
    row: int
    turn: int
    text: str
    references: tuple[str, ...]
    kind: str
    images: tuple[str, ...]


def read_questions(rows: Iterable[dict[str, Any]], kind: str | None = None) -> tuple[list[Question], int]:
    """Return the questions about images, in the order of the rows, and the number of answers that are not scored.

    Questions without an image are not scored, and neither are answers of unknown kind, such as several boxes.

    Args:
        rows: conversations with undecoded images.
        kind: kind of all answers; recognized for each answer, see [`answer_kind`], if `None`.

    Raises:
        ValueError: If a row is invalid or does not match `kind`; the message names it.
    """
    found: dict[tuple, Question] = {}
    left_out = 0
    for index, row in enumerate(rows):
        if row.get("error"):
            raise ValueError(f"Sample {sample_id_of(row)!r}: {row['error']}")
        images = tuple(image_key(image) for image in images_of(row))
        messages = row["messages"]
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or is_given(message):
                continue
            asked = [" ".join(message_texts(one)) for one in messages[:turn]]
            text, reference = asked[-1] if asked else "", " ".join(message_texts(message))
            wanted = kind or answer_kind(text, reference)
            if not images or wanted is None:
                left_out += 1
                continue
            if wanted == "grounding" and not read_boxes(reference)[0]:
                raise ValueError(
                    f"Sample {sample_id_of(row)!r}: expected a box in the answer, got {reference[:80]!r}. Change kind."
                )
            if wanted == "choice" and not read_choices(text):
                raise ValueError(
                    f"Sample {sample_id_of(row)!r}: expected choices in the question, one per line. Change kind."
                )
            same = found.get((images, *asked))
            references = (*same.references, reference) if same else (reference,)
            first = (same.id, same.row, same.turn) if same else (str(sample_id_of(row)), index, turn)
            found[(images, *asked)] = Question(*first, text, references, same.kind if same else wanted, images)
    return list(found.values()), left_out


def image_key(image: Any) -> str:
    """Return the path of an encoded image, or a hash of its bytes."""
    path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
    return hashlib.sha256(content).hexdigest() if content is not None else str(path)


def answer_kind(question: str, reference: str) -> str | None:
    """Return the kind of an answer, or `None` if it is not scored.

    - `count`: the question asks for a number, and the answer is an integer.
    - `grounding`: the answer is one box. Several boxes, or a box in a longer text, are not scored.
    - `choice`: the answer is one of the choices that the question lists.
    - `fine_map`: the question asks for the covered quarters of cells, and the answer has a letter for each cell.
    - `map`: the question is about a map or its cells, and the answer is a map, see [`is_map`].
    - `caption`: the question asks for a description, but not of a box, or the answer has more than 6 words and is no
      list of numbers.
    - `vqa`: other answers.
    """
    boxes, rest = read_boxes(reference)[0], MARKS.sub(" ", reference)
    if boxes:
        return "grounding" if len(boxes) == 1 and len(rest.split()) <= MOST_WORDS else None
    if named_choice(reference, read_choices(question)):
        return "choice"
    if COUNT.search(question) and reference.strip().isdecimal():
        return "count"
    if FINE_MAP.search(question) and all(len(word) == 1 for word in reference.split()):
        return "fine_map"
    if MAP.search(question) and is_map(question, reference):
        return "map"
    is_long = len(reference.split()) > MOST_WORDS and not NUMBERED.fullmatch(reference)
    asks = CAPTION.search(question) and not read_boxes(question)[0]
    return "caption" if is_long or asks else "vqa"


def is_map(question: str, answer: str) -> bool:
    """Return whether an answer is a map of cells.

    A map has a word for each cell: more than 6 words that all occur in the question, or that form no sentence and of
    which at most half are distinct. Or it has a letter for each cell: more than 20 letters, with three equal ones in a
    row.
    """
    words = answer.split()
    if len(words) > MOST_WORDS:
        is_repeated = 2 * len(set(words)) <= len(words) and not STOPS.search(answer)
        return is_repeated or set(words) <= {word.strip(",.?") for word in question.split()}
    return len(words) == 1 and len(answer) > LONGEST_WORD and THREE_ALIKE.search(answer) is not None


def other_images(images: Sequence[tuple[str, ...]]) -> list[int | None]:
    """Return for each question the index of a question with the same number of images, but other images.

    The partner is half of the distinct images away. It is `None` if all questions with this number of images have the
    same images.
    """
    first: dict[int, dict[tuple[str, ...], int]] = {}
    for index, one in enumerate(images):
        first.setdefault(len(one), {}).setdefault(one, index)
    partner = {}
    for indices in first.values():
        keys = list(indices)
        if len(keys) > 1:
            partner |= {key: indices[keys[(at + len(keys) // 2) % len(keys)]] for at, key in enumerate(keys)}
    return [partner.get(one) for one in images]


def conversation_of(
    collator: ViTPDataCollator, rows: Dataset, question: Question, other: Question | None = None
) -> list[dict[str, Any]]:
    """Return the messages up to a question, with the images of its row or of another row.

    Earlier answers are the references.
    """
    row, name = rows[question.row], f"Sample {question.id!r}"
    if other is not None:
        row, name = {**row, "images": images_of(rows[other.row])}, f"{name} with the images of {other.id!r}"
    try:
        return collator.conversation(row)[0][: question.turn]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def evaluate_vlm(args: VLMArguments) -> dict[str, Any]:
    """Score the answers of all models to each question, with its own image and with another one.

    After each model, `metrics.json`, `answers_MODEL.jsonl` and `answers_MODEL.png` are written. An interrupted
    evaluation goes on after the last batch of questions.

    Returns:
        Metrics: a description of the questions, and `models` with the scores by kind, see [`compare`].

    Raises:
        ValueError: If the output folder is that of a model, the rows have no questions about images, all questions are
            about the same image, or a model cannot be used.
    """
    check_no_model(args.output_dir)
    for name in args.models:
        model_type = read_model_type(name)
        if model_type != ViTPForConditionalGeneration.config_class.model_type:
            raise ValueError(
                f"Expected a vision-language model, as created by `vitp pretrain`, got {name} of type {model_type!r}."
            )
    rows, questions, partners, left_out = choose_questions(args)
    metrics = {
        "dataset": args.dataset_name,
        "split": args.split,
        "questions": dict(Counter(question.kind for question in questions)),
        "images": len({question.images for question in questions}),
        "not_scored": left_out,
        "limit": args.limit,
        "seed": args.seed,
        "models": [],
    }
    output_dir, logs = Path(args.output_dir), []
    asked = hashlib.sha256(repr((questions, partners, args.batch_size, args.max_new_tokens)).encode()).hexdigest()
    for name, label in zip(args.models, short_names(args.models)):
        model, processor = open_model(name, args.bf16)
        collator, state = ViTPDataCollator(processor), f"{asked} {weights_digest(model)}"
        logs.append(AnswerLog(output_dir / f"unfinished_{label.replace('/', '--')}.jsonl", state))
        options = args.batch_size, args.max_new_tokens
        own = ask_questions(model, collator, rows, questions, None, *options, label, logs[-1])
        other = ask_questions(model, collator, rows, questions, partners, *options, f"{label}, other images", logs[-1])
        scores = {
            kind: compare(kind, [one for one in zip(questions, own, other) if one[0].kind == kind], args.seed)
            for kind in metrics["questions"]
        }
        metrics["models"].append({"model": label, "scores": scores})
        file = output_dir / f"answers_{label.replace('/', '--')}"
        write_answers(Path(f"{file}.jsonl"), questions, own, other)
        write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        shown = model, collator, rows, list(zip(questions, own, other)), args.pictures, Path(f"{file}.png")
        attempt(output_dir, "the picture of answers", draw_questions, *shown)
    for log in logs:
        log.path.unlink(missing_ok=True)
    return metrics


class AnswerLog:
    """File with the answers to each batch of questions, so that an interrupted evaluation goes on.

    Args:
        path: JSON Lines file: the state, then a list of answers for each batch. A file of another state is replaced.
        state: hash of the model and the questions.
    """

    def __init__(self, path: Path, state: str):
        self.path, lines = path, path.read_text().split("\n") if path.is_file() else []
        self.left = lines[1:-1] if lines[:1] == [state] else []  # The last line is empty, or was not written in full.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(f"{line}\n" for line in (state, *self.left)))

    def answers(self, ask: Callable[[], list[str]]) -> list[str]:
        """Return the answers to the next batch from the file, or else ask and append them."""
        if self.left:
            return json.loads(self.left.pop(0))
        answers = ask()
        with self.path.open("a") as file:
            file.write(json.dumps(answers) + "\n")
        return answers


def choose_questions(args: VLMArguments) -> tuple[Dataset, list[Question], list[Question], int]:
    """Return the rows, the questions to ask, a question with other images for each, and the number of others.

    Raises:
        ValueError: If the rows have no questions about images, or all questions are about the same image.
        ModuleNotFoundError: If the package that scores captions is missing.
    """
    rows = open_rows(args)
    questions, left_out = read_questions(rows, args.kind)
    if not questions:
        raise ValueError(f"No questions that can be scored found in {len(rows)} rows of {args.dataset_name}.")
    indices = other_images([question.images for question in questions])
    pairs = [(one, questions[index]) for one, index in zip(questions, indices) if index is not None]
    if not pairs:
        raise ValueError("All questions are about the same image, so that images cannot be swapped. Add rows.")
    left_out += indices.count(None)
    if args.limit is not None and args.limit < len(pairs):
        chosen = random.Random(args.seed).sample(range(len(pairs)), args.limit)
        pairs = [pairs[index] for index in sorted(chosen)]
    questions, partners = (list(side) for side in zip(*pairs))
    if any(question.kind == "caption" for question in questions):
        importlib.import_module("pycocoevalcap")  # A missing package must raise an error before the first model runs.
    return rows, questions, partners, left_out


def open_rows(args: VLMArguments) -> Dataset:
    """Open the rows of the split as conversations with encoded images."""
    names = {"dataset_train_split": args.split, "dataset_test_split": args.split}
    wanted = ScriptArguments(dataset_name=args.dataset_name, dataset_config=args.dataset_config, **names)
    try:
        opened, _ = open_splits(wanted, args.image_root)
    except ValueError as error:
        raise ValueError(str(error).replace("dataset_train_split", "split")) from error
    return prepare_rows(opened[args.split])


def open_model(name: str, bf16: bool) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    options = {"dtype": torch.bfloat16} if bf16 else {}
    model = ViTPForConditionalGeneration.from_pretrained(name, **options)
    return model.to(default_device()).eval(), ViTPProcessor.from_pretrained(name)


def ask_questions(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    questions: Sequence[Question],
    partners: Sequence[Question] | None,
    batch_size: int,
    max_new_tokens: int,
    description: str,
    log: AnswerLog,
) -> list[str]:
    """Return the greedy answers to questions, with their own images or those of their partners."""
    pairs, answers = list(zip(questions, partners or [None] * len(questions))), []
    for start in tqdm(range(0, len(pairs), batch_size), desc=description):

        def ask(start=start) -> list[str]:
            batch = [conversation_of(collator, rows, *pair) for pair in pairs[start : start + batch_size]]
            return generate_answers(model, collator.processor, batch, max_new_tokens=max_new_tokens)

        answers += log.answers(ask)
    return answers


def compare(kind: str, answered: Sequence[tuple[Question, str, str]], seed: int) -> dict[str, dict[str, Any]]:
    """Return each score of the answers with their own images (`own`) and with others (`other_images`).

    If the score is a mean over questions, `gain` is the 95 % bootstrap interval, over images, of the difference.
    """
    questions, *answers = zip(*answered)
    texts, references = [question.text for question in questions], [question.references for question in questions]
    own, other = (score_answers(kind, texts, one, references) for one in answers)
    images = [" ".join(question.images) for question in questions]
    compared = {}
    for name, values in own.items():
        compared[name] = {"own": float(np.mean(values)), "other_images": float(np.mean(other[name]))}
        if isinstance(values, np.ndarray):
            resampled = resample_mean(values - other[name], images, seed)
            compared[name]["gain"] = np.percentile(resampled, [2.5, 97.5]).tolist()
    return compared


def write_answers(path: Path, questions: Sequence[Question], own: Sequence[str], other: Sequence[str]) -> None:
    lines = [
        {
            "id": question.id,
            "kind": question.kind,
            "question": question.text,
            "references": question.references,
            "answer": answer,
            "answer_with_other_image": blind,
        }
        for question, answer, blind in zip(questions, own, other)
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def draw_questions(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    answered: Sequence[tuple[Question, str, str]],
    number: int,
    path: Path,
) -> None:
    """Draw evenly spaced questions with their images, references, and answers with the own and with another image."""
    shown = []
    for index in np.linspace(0, len(answered) - 1, min(number, len(answered))).astype(int):
        question, own, other = answered[index]
        picture = Answered(question.id, question.text, question.references[0], own, other)
        with torch.no_grad():
            messages = conversation_of(collator, rows, question)
            add_features(model, collator.processor, first_image(messages), {}, picture)
        shown.append(picture)
    if shown:
        maps = [colors_of(principal_scores(one.features.float().cpu())) for one in shown]
        draw_answers(shown, maps, path)


def answers_table(metrics: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each score: values with own and other images, and the gain's interval."""
    models, lines = metrics["models"], []
    for kind, number in metrics["questions"].items():
        for name in models[0]["scores"][kind]:
            cells = [cell for model in models for cell in format_gain(model["scores"][kind][name])]
            lines.append([f"{kind}: {name.replace('_', ' ')}", number, *cells])
    header = [title for model in models for title in (model["model"], "with other images", "gain, 95 %")]
    return table(["score", "questions", *header], lines)


def format_gain(score: dict[str, Any]) -> list[str]:
    low_high = "{:.3f} to {:.3f}".format(*score["gain"]) if "gain" in score else ""
    return [f"{score['own']:.3f}", f"{score['other_images']:.3f}", low_high]
