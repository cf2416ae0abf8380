"""Evaluation of vision-language models: scores of answers with the own image of a question and with another image."""

import hashlib
import importlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from trl import ScriptArguments

from ..cards.sections import table
from ..conversations import message_texts
from ..images.large import weights_digest
from ..images.pixels import colors_of, principal_scores
from ..instructions.boxes import MARKS, read_boxes
from ..instructions.collator import ViTPDataCollator
from ..instructions.rows import images_of, is_given, prepare_rows, sample_id_of
from ..instructions.sources import open_splits
from ..metrics.resampling import resample_mean
from ..modeling_vitp import ViTPForConditionalGeneration
from ..pretraining.generation import Answered, add_features, draw_answers, first_image, generate_answers
from ..processing_vitp import ViTPProcessor
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
    questions: dict[tuple, Question] = {}
    num_unscored = 0
    for index, row in enumerate(rows):
        if row.get("error"):
            raise ValueError(f"Sample {sample_id_of(row)!r}: {row['error']}")
        images = tuple(image_key(image) for image in images_of(row))
        texts = [" ".join(message_texts(message)) for message in row["messages"]]
        for turn, message in enumerate(row["messages"]):
            if message["role"] != "assistant" or is_given(message):
                continue
            question_text = texts[turn - 1] if turn > 0 else ""
            reference = texts[turn]
            question_kind = kind or answer_kind(question_text, reference)
            if not images or question_kind is None:
                num_unscored += 1
                continue
            check_kind(row, question_kind, question_text, reference)
            key = (images, *texts[:turn])  # The same question may follow other messages.
            if key in questions:
                references = (*questions[key].references, reference)
                questions[key] = replace(questions[key], references=references)
            else:
                questions[key] = Question(
                    id=str(sample_id_of(row)),
                    row=index,
                    turn=turn,
                    text=question_text,
                    references=(reference,),
                    kind=question_kind,
                    images=images,
                )
    return list(questions.values()), num_unscored


def check_kind(row: dict[str, Any], kind: str, question: str, reference: str) -> None:
    """Raise a `ValueError` if a question or its reference cannot be scored as the kind, which a user may have set."""
    if kind == "grounding" and not read_boxes(reference)[0]:
        expected = f"a box in the answer, got {reference[:80]!r}"
    elif kind == "choice" and not read_choices(question):
        expected = "choices in the question, one per line"
    else:
        return
    raise ValueError(f"Sample {sample_id_of(row)!r}: expected {expected}. Change kind.")


def image_key(image: Any) -> str:
    """Return the path of an encoded image, or a hash of its bytes."""
    if not isinstance(image, dict):
        return str(image)
    content = image.get("bytes")
    if content is None:
        return str(image.get("path"))
    return hashlib.sha256(content).hexdigest()


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
    words = reference.split()
    boxes, _ = read_boxes(reference)
    if boxes:
        words_beside_boxes = MARKS.sub(" ", reference).split()
        is_one_box = len(boxes) == 1 and len(words_beside_boxes) <= MOST_WORDS
        return "grounding" if is_one_box else None
    if named_choice(reference, read_choices(question)):
        return "choice"
    if COUNT.search(question) and reference.strip().isdecimal():
        return "count"
    if FINE_MAP.search(question) and all(len(word) == 1 for word in words):
        return "fine_map"
    if MAP.search(question) and is_map(question, reference):
        return "map"
    if len(words) > MOST_WORDS and not NUMBERED.fullmatch(reference):
        return "caption"
    boxes_of_question, _ = read_boxes(question)
    if CAPTION.search(question) and not boxes_of_question:
        return "caption"
    return "vqa"


def is_map(question: str, answer: str) -> bool:
    """Return whether an answer is a map of cells.

    A map has a word for each cell: more than 6 words that all occur in the question, or that form no sentence and of
    which at most half are distinct. Or it has a letter for each cell: more than 20 letters, with three equal ones in a
    row.
    """
    words = answer.split()
    if len(words) > MOST_WORDS:
        distinct_words = set(words)
        if 2 * len(distinct_words) <= len(words) and not STOPS.search(answer):
            return True
        words_of_question = {word.strip(",.?") for word in question.split()}
        return distinct_words <= words_of_question
    is_one_long_word = len(words) == 1 and len(answer) > LONGEST_WORD
    return is_one_long_word and THREE_ALIKE.search(answer) is not None


def other_images(images: Sequence[tuple[str, ...]]) -> list[int | None]:
    """Return for each question the index of a question with the same number of images, but other images.

    The partner is half of the distinct images away. It is `None` if all questions with this number of images have the
    same images.
    """
    # Index of the first question about each images, by the number of images.
    first_indices: dict[int, dict[tuple[str, ...], int]] = defaultdict(dict)
    for index, question_images in enumerate(images):
        first_indices[len(question_images)].setdefault(question_images, index)
    partners = {}
    for indices in first_indices.values():
        distinct_images = list(indices)
        number = len(distinct_images)
        if number == 1:
            continue
        for position, question_images in enumerate(distinct_images):
            images_of_partner = distinct_images[(position + number // 2) % number]
            partners[question_images] = indices[images_of_partner]
    return [partners.get(question_images) for question_images in images]


def conversation_of(
    collator: ViTPDataCollator,
    rows: Dataset,
    question: Question,
    other: Question | None = None,
) -> list[dict[str, Any]]:
    """Return the messages up to a question, with the images of its row or of another row.

    Earlier answers are the references.
    """
    row = rows[question.row]
    name = f"Sample {question.id!r}"
    if other is not None:
        row = {**row, "images": images_of(rows[other.row])}
        name = f"{name} with the images of {other.id!r}"
    try:
        messages, *_ = collator.conversation(row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return messages[: question.turn]


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
    check_model_types(args.models)
    rows, questions, partners, num_unscored = choose_questions(args)
    metrics = {**description_of(args, questions, num_unscored), "models": []}
    output_dir = Path(args.output_dir)
    digest = digest_of_questions(args, questions, partners)
    logs = []
    for name, label in zip(args.models, short_names(args.models)):
        model, processor = open_model(name, args.bf16)
        collator = ViTPDataCollator(processor)
        file_name = label.replace("/", "--")
        log = AnswerLog(
            output_dir / f"unfinished_{file_name}.jsonl",
            state=f"{digest} {weights_digest(model)}",
        )
        logs.append(log)
        answered = answer_with_both_images(args, model, collator, rows, questions, partners, label, log)
        scores = compare_by_kind(answered, args.seed)
        metrics["models"].append({"model": label, "scores": scores})
        write_answers(output_dir / f"answers_{file_name}.jsonl", answered)
        write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        attempt(
            output_dir,
            "the picture of answers",
            draw_questions,
            model,
            collator,
            rows,
            answered,
            args.pictures,
            output_dir / f"answers_{file_name}.png",
        )
    for log in logs:
        log.path.unlink(missing_ok=True)
    return metrics


def digest_of_questions(
    args: VLMArguments,
    questions: Sequence[Question],
    partners: Sequence[Question],
) -> str:
    """Return a hash of the questions and of the settings on which the answers depend."""
    settings_of_answers = (questions, partners, args.batch_size, args.max_new_tokens)
    content = repr(settings_of_answers).encode()
    return hashlib.sha256(content).hexdigest()


def answer_with_both_images(
    args: VLMArguments,
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    questions: Sequence[Question],
    partners: Sequence[Question],
    label: str,
    log: "AnswerLog",
) -> list[tuple[Question, str, str]]:
    """Return each question with the model's answer to its own images, and to those of its partner."""
    ask = partial(
        ask_questions,
        model,
        collator,
        rows,
        questions,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        log=log,
    )
    own_answers = ask(partners=None, description=label)
    other_answers = ask(partners=partners, description=f"{label}, other images")
    return list(zip(questions, own_answers, other_answers))


def description_of(args: VLMArguments, questions: Sequence[Question], num_unscored: int) -> dict[str, Any]:
    """Return what the metrics say about the questions."""
    num_questions = Counter()
    distinct_images = set()
    for question in questions:
        num_questions[question.kind] += 1
        distinct_images.add(question.images)
    return {
        "dataset": args.dataset_name,
        "split": args.split,
        "questions": dict(num_questions),
        "images": len(distinct_images),
        "not_scored": num_unscored,
        "limit": args.limit,
        "seed": args.seed,
    }


def check_model_types(names: Sequence[str]) -> None:
    """Raise a `ValueError` if a model is no vision-language model."""
    for name in names:
        model_type = read_model_type(name)
        if model_type != ViTPForConditionalGeneration.config_class.model_type:
            raise ValueError(
                f"Expected a vision-language model, as created by `vitp pretrain`, got {name} of type {model_type!r}."
            )


class AnswerLog:
    """File with the answers to each batch of questions, so that an interrupted evaluation goes on.

    Args:
        path: JSON Lines file: the state, then a list of answers for each batch. A file of another state is replaced.
        state: hash of the model and the questions.
    """

    def __init__(self, path: Path, state: str):
        self.path = path
        self.stored_batches = []
        if path.is_file():
            recorded_state, *batches = path.read_text().split("\n")
            if recorded_state == state:
                self.stored_batches = batches[:-1]  # The last line is empty, or was not written in full.
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [state, *self.stored_batches]
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def answers(self, ask: Callable[[], list[str]]) -> list[str]:
        """Return the answers to the next batch from the file, or else ask and append them."""
        if self.stored_batches:
            return json.loads(self.stored_batches.pop(0))
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
    questions, num_unscored = read_questions(rows, args.kind)
    if not questions:
        raise ValueError(f"No questions that can be scored found in {len(rows)} rows of {args.dataset_name}.")
    pairs = []
    partner_indices = other_images([question.images for question in questions])
    for question, partner_index in zip(questions, partner_indices):
        if partner_index is None:
            num_unscored += 1
        else:
            pairs.append((question, questions[partner_index]))
    if not pairs:
        raise ValueError("All questions are about the same image, so that images cannot be swapped. Add rows.")
    if args.limit is not None and args.limit < len(pairs):
        drawn_indices = random.Random(args.seed).sample(range(len(pairs)), args.limit)
        pairs = [pairs[index] for index in sorted(drawn_indices)]
    questions = [question for question, _ in pairs]
    partners = [partner for _, partner in pairs]
    kinds = {question.kind for question in questions}
    if "caption" in kinds:
        importlib.import_module("pycocoevalcap")  # A missing package must raise an error before the first model runs.
    return rows, questions, partners, num_unscored


def open_rows(args: VLMArguments) -> Dataset:
    """Open the rows of the split as conversations with encoded images."""
    script_arguments = ScriptArguments(
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        dataset_train_split=args.split,
        dataset_test_split=args.split,
    )
    try:
        splits, _ = open_splits(script_arguments, args.image_root)
    except ValueError as error:
        raise ValueError(str(error).replace("dataset_train_split", "split")) from error
    return prepare_rows(splits[args.split])


def open_model(name: str, bf16: bool) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    options = {"dtype": torch.bfloat16} if bf16 else {}
    model = ViTPForConditionalGeneration.from_pretrained(name, **options)
    processor = ViTPProcessor.from_pretrained(name)
    return model.to(default_device()).eval(), processor


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
    if partners is None:
        partners = [None] * len(questions)
    pairs = list(zip(questions, partners))

    def ask(batch: Sequence[tuple[Question, Question | None]]) -> list[str]:
        conversations = []
        for question, partner in batch:
            conversations.append(conversation_of(collator, rows, question, partner))
        return generate_answers(model, collator.processor, conversations, max_new_tokens=max_new_tokens)

    answers = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=description):
        batch = pairs[start : start + batch_size]
        answers += log.answers(partial(ask, batch))
    return answers


def compare_by_kind(
    answered: Sequence[tuple[Question, str, str]],
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the scores of [`compare`] by the kind of the questions."""
    answered_by_kind = defaultdict(list)
    for question, own_answer, other_answer in answered:
        answered_by_kind[question.kind].append((question, own_answer, other_answer))
    scores = {}
    for kind, answered_of_kind in answered_by_kind.items():
        scores[kind] = compare(kind, answered_of_kind, seed)
    return scores


def compare(kind: str, answered: Sequence[tuple[Question, str, str]], seed: int) -> dict[str, dict[str, Any]]:
    """Return each score of the answers with their own images (`own`) and with others (`other_images`).

    If the score is a mean over questions, `gain` is the 95 % bootstrap interval, over images, of the difference.
    """
    questions, own_answers, other_answers = zip(*answered)
    texts = [question.text for question in questions]
    references = [question.references for question in questions]
    images = [" ".join(question.images) for question in questions]
    own_scores = score_answers(kind, texts, own_answers, references)
    other_scores = score_answers(kind, texts, other_answers, references)
    comparisons = {}
    for name, own_score in own_scores.items():
        other_score = other_scores[name]
        comparison = {
            "own": float(np.mean(own_score)),
            "other_images": float(np.mean(other_score)),
        }
        if isinstance(own_score, np.ndarray):
            resampled_gains = resample_mean(own_score - other_score, images, seed)
            comparison["gain"] = np.percentile(resampled_gains, [2.5, 97.5]).tolist()
        comparisons[name] = comparison
    return comparisons


def write_answers(path: Path, answered: Sequence[tuple[Question, str, str]]) -> None:
    lines = []
    for question, own_answer, other_answer in answered:
        fields = {
            "id": question.id,
            "kind": question.kind,
            "question": question.text,
            "references": question.references,
            "answer": own_answer,
            "answer_with_other_image": other_answer,
        }
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def draw_questions(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    answered: Sequence[tuple[Question, str, str]],
    number: int,
    path: Path,
) -> None:
    """Draw evenly spaced questions with their images, references, and answers with the own and with another image."""
    pictures = []
    feature_maps = []
    number = min(number, len(answered))
    for index in np.linspace(0, len(answered) - 1, number).astype(int):
        question, own_answer, other_answer = answered[index]
        picture = Answered(
            name=question.id,
            question=question.text,
            reference=question.references[0],
            answer=own_answer,
            blind=other_answer,
        )
        messages = conversation_of(collator, rows, question)
        with torch.no_grad():
            add_features(model, collator.processor, first_image(messages), {}, picture)
        scores = principal_scores(picture.features.float().cpu())
        feature_maps.append(colors_of(scores))
        pictures.append(picture)
    if pictures:
        draw_answers(pictures, feature_maps, path)


def answers_table(metrics: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each score: values with own and other images, and the gain's interval."""
    header = ["score", "questions"]
    for model in metrics["models"]:
        header += [model["model"], "with other images", "gain, 95 %"]
    first_model = metrics["models"][0]
    rows = []
    for kind, number in metrics["questions"].items():
        for name in first_model["scores"][kind]:
            row = [f"{kind}: {name.replace('_', ' ')}", number]
            for model in metrics["models"]:
                row += format_gain(model["scores"][kind][name])
            rows.append(row)
    return table(header, rows)


def format_gain(score: dict[str, Any]) -> list[str]:
    interval = ""
    if "gain" in score:
        low, high = score["gain"]
        interval = f"{low:.3f} to {high:.3f}"
    return [f"{score['own']:.3f}", f"{score['other_images']:.3f}", interval]
