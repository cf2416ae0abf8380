"""A vision-language model's answers to the questions of rows, scored beside its answers about other images."""

import importlib
import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from trl import ScriptArguments

from ..cards.sections import table
from ..images.pixels import colors_of, principal_scores
from ..instructions.collator import ViTPDataCollator
from ..instructions.rows import prepare_rows
from ..instructions.sources import open_splits
from ..modeling_vitp import ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor
from ..training.checkpointing import attempt, write_whole
from ..training.generation import Answered, draw_answers, first_image, generate_answers, look
from .answer_scores import score_answers
from .arguments import VLMArguments
from .questions import Question, conversation_of, others, read_questions
from .robustness import labels

logger = logging.getLogger(__name__)
RESAMPLED = 1000


def evaluate_vlm(args: VLMArguments) -> dict[str, Any]:
    """Asks every model each question with its own image and with another one; writes `metrics.json` after each model,
    `answers_MODEL.jsonl` and `answers_MODEL.png`.

    Returns:
        The metrics: what was asked, and `models`, with the scores of each by kind, see [`compare`].

    Raises:
        ValueError: if the rows make no questions about images, or all are about one image; if a model cannot be used.
    """
    for name in args.models:
        check_model(name)
    rows = open_rows(args)
    questions, left_out = read_questions(rows, args.kind)
    if not questions:
        raise ValueError(f"{args.dataset_name} has no questions about images that are scored, in {len(rows)} rows.")
    places = others([question.images for question in questions])
    pairs = [(one, questions[place]) for one, place in zip(questions, places) if place is not None]
    if not pairs:
        raise ValueError("all questions are about the same image, so that none can be swapped: give more rows.")
    left_out += places.count(None)
    if args.limit is not None and args.limit < len(pairs):
        chosen = random.Random(args.seed).sample(range(len(pairs)), args.limit)
        pairs = [pairs[place] for place in sorted(chosen)]
    questions, partners = (list(side) for side in zip(*pairs))
    if any(question.kind == "caption" for question in questions):
        importlib.import_module("pycocoevalcap")  # whose absence is told before anything is asked
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
    output_dir = Path(args.output_dir)
    for name, label in zip(args.models, labels(args.models)):
        model, processor = open_model(name, args.bf16)
        collator = ViTPDataCollator(processor)
        own = ask(model, collator, rows, questions, None, args, label)
        other = ask(model, collator, rows, questions, partners, args, f"{label}, other images")
        scores = {
            kind: compare(kind, [one for one in zip(questions, own, other) if one[0].kind == kind], args.seed)
            for kind in metrics["questions"]
        }
        metrics["models"].append({"model": label, "scores": scores})
        write_answers(output_dir / f"answers_{label.replace('/', '--')}.jsonl", questions, own, other)
        write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        picture = output_dir / f"answers_{label.replace('/', '--')}.png"
        shown = model, collator, rows, list(zip(questions, own, other)), args.pictures, picture
        attempt(output_dir, "the picture of answers", draw, *shown)
    return metrics


def check_model(name: str) -> None:
    """Raises a `ValueError` unless there is a vision-language model of ours by that name."""
    try:
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"{name} is no model: {str(error).splitlines()[0]}") from error
    if model_type != ViTPForConditionalGeneration.config_class.model_type:
        raise ValueError(f"{name} is a {model_type!r} model; one that answers is needed, as `vitp pretrain` leaves it.")


def open_rows(args: VLMArguments) -> Dataset:
    """The rows of the split as conversations, their images encoded."""
    names = {"dataset_train_split": args.split, "dataset_test_split": args.split}
    wanted = ScriptArguments(dataset_name=args.dataset_name, dataset_config=args.dataset_config, **names)
    try:
        opened, _ = open_splits(wanted, args.image_root)
    except ValueError as error:
        raise ValueError(str(error).replace("dataset_train_split", "split")) from error
    return prepare_rows(opened[args.split])


def open_model(name: str, bf16: bool) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    options = {"dtype": torch.bfloat16} if bf16 else {}
    model = ViTPForConditionalGeneration.from_pretrained(name, **options)
    return model.to(device).eval(), ViTPProcessor.from_pretrained(name)


def ask(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    questions: Sequence[Question],
    partners: Sequence[Question] | None,
    args: VLMArguments,
    description: str,
) -> list[str]:
    """The answers, greedy, with the images of the questions' own rows, or of their partners'."""
    pairs, answers = list(zip(questions, partners or [None] * len(questions))), []
    for start in tqdm(range(0, len(pairs), args.batch_size), desc=description):
        batch = [conversation_of(collator, rows, *pair) for pair in pairs[start : start + args.batch_size]]
        answers += generate_answers(model, collator.processor, batch, max_new_tokens=args.max_new_tokens)
    return answers


def compare(kind: str, answered: Sequence[tuple[Question, str, str]], seed: int) -> dict[str, dict[str, Any]]:
    """Each score of the answers with `own` and with `other_images`; where it is a mean over questions, an interval of
    95 % of the `gain` from the own ones, from drawing images with repeats.
    """
    questions, *answers = zip(*answered)
    texts, references = [question.text for question in questions], [question.references for question in questions]
    own, other = (score_answers(kind, texts, one, references) for one in answers)
    images = np.unique([" ".join(question.images) for question in questions], return_inverse=True)[1]
    compared = {}
    for name, values in own.items():
        compared[name] = {"own": float(np.mean(values)), "other_images": float(np.mean(other[name]))}
        if isinstance(values, np.ndarray):
            compared[name]["gain"] = interval(values - other[name], images, seed)
    return compared


def interval(values: np.ndarray, groups: np.ndarray, seed: int) -> list[float]:
    """The 2.5th and the 97.5th percentile of the mean, over sets of as many groups, drawn with repeats.

    Args:
        groups: which of them each value belongs to, from 0 on without a gap.
    """
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(RESAMPLED))
    return np.percentile([sums[one].sum() / counts[one].sum() for one in drawn], [2.5, 97.5]).tolist()


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


def draw(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Dataset,
    answered: Sequence[tuple[Question, str, str]],
    number: int,
    path: Path,
) -> None:
    """Questions evenly from all, with their images, the right answer, the model's, and that with another image."""
    shown = []
    for place in np.linspace(0, len(answered) - 1, min(number, len(answered))).astype(int):
        question, own, other = answered[place]
        picture = Answered(question.id, question.text, question.references[0], own, other)
        with torch.no_grad():
            messages = conversation_of(collator, rows, question)
            look(model, collator.processor, first_image(messages), {"max_patches": 1}, picture)
        shown.append(picture)
    if shown:
        maps = [colors_of(principal_scores(one.features.float().cpu())) for one in shown]
        draw_answers(shown, maps, path)


def summary_table(metrics: dict[str, Any]) -> str:
    """Markdown: a line for each score; of each model with its own and with other images, and the gain's interval."""
    models, lines = metrics["models"], []
    for kind, number in metrics["questions"].items():
        for name in models[0]["scores"][kind]:
            cells = [cell for model in models for cell in written(model["scores"][kind][name])]
            lines.append([f"{kind}: {name.replace('_', ' ')}", number, *cells])
    header = [title for model in models for title in (model["model"], "with other images", "gain, 95 %")]
    return table(["score", "questions", *header], lines)


def written(score: dict[str, Any]) -> list[str]:
    low_high = "{:.3f} to {:.3f}".format(*score["gain"]) if "gain" in score else ""
    return [f"{score['own']:.3f}", f"{score['other_images']:.3f}", low_high]
