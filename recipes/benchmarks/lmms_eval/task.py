"""Tasks of lmms-eval on downloaded folders, and the scores of their answers."""

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from modeling_vitp.evaluation.answer_scores import score_answers, score_captions
from modeling_vitp.instructions.rows import load_images
from modeling_vitp.recipes.benchmarks.lmms_eval import benchmarks

FOLDERS = "VITP_BENCHMARKS"  # environment variable with the parent folder of `dataset_path`
SPLIT = "test"
NUMBERS = ("count", "area")  # question types of RSVQA that comparisons of vision-language models exclude
CAPTION_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")

Document = dict[str, Any]


class BenchmarkTask(ConfigurableMessagesTask):
    """Benchmark that is read from a folder.

    In its YAML file, `dataset_path` is the folder, relative to `VITP_BENCHMARKS` or else to the working directory,
    `dataset_name` is a function of [`benchmarks`](benchmarks.py), and `dataset_kwargs` are its arguments.
    """

    def __init__(self, config: dict[str, Any]):
        fields = dict(config)
        fields.pop("class", None)
        super().__init__(config=fields)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the documents from the folder; nothing is downloaded."""
        parent = os.environ.get(FOLDERS, ".")
        root = Path(parent, self.config.dataset_path)
        read_documents = getattr(benchmarks, self.config.dataset_name)
        options = dataset_kwargs or {}
        documents = read_documents(root, **options)
        if not documents:
            raise ValueError(f"No documents of {self.config.task} found in {root}.")
        rows = Dataset.from_list(documents)
        self.dataset = DatasetDict({SPLIT: rows})
        self.dataset_no_image = self.dataset


def document_images(document: Document) -> list:
    return load_images({"images": document["images"]})


def text_of(document: Document, words: dict[str, str] | None = None) -> str:
    words = words or {}
    prefix = words.get("pre_prompt", "")
    suffix = words.get("post_prompt", "")
    return f"{prefix}{document['question']}{suffix}"


def target_of(document: Document) -> str:
    return document["answers"][0]


def score(kind: str, document: Document, results: Sequence[str]) -> dict[str, float]:
    scores = score_answers(
        kind,
        questions=[document["question"]],
        answers=[results[0]],
        references=[document["answers"]],
    )
    means = {}
    for name, scores_of_answers in scores.items():
        means[name] = float(np.mean(scores_of_answers))
    return means


def score_box(document: Document, results: Sequence[str]) -> dict[str, float]:
    return score("grounding", document, results)


def score_short_answer(document: Document, results: Sequence[str]) -> dict[str, Any]:
    scores = score("vqa", document, results)
    return by_type(document, scores["accuracy"])


def score_choice(document: Document, results: Sequence[str]) -> dict[str, Any]:
    scores = score("choice", document, results)
    return by_type(document, scores["accuracy"])


def by_type(document: Document, accuracy: float) -> dict[str, Any]:
    """Return an accuracy for its mean over all questions, and with the type of the question for the other scores."""
    typed_accuracy = (document["type"], accuracy)
    return {
        "accuracy": accuracy,
        "average_accuracy": typed_accuracy,
        "accuracy_without_numbers": typed_accuracy,
    }


def average_over_types(typed_accuracies: Sequence[tuple[str, float]]) -> float:
    """Return the mean over question types of the mean of each type."""
    accuracies_by_type = defaultdict(list)
    for question_type, accuracy in typed_accuracies:
        accuracies_by_type[question_type].append(accuracy)
    means = []
    for accuracies in accuracies_by_type.values():
        means.append(np.mean(accuracies))
    return float(np.mean(means))


def average_without_numbers(typed_accuracies: Sequence[tuple[str, float]]) -> float:
    """Return the mean over questions that do not ask for a number, or NaN without such questions."""
    accuracies = []
    for question_type, accuracy in typed_accuracies:
        if question_type not in NUMBERS:
            accuracies.append(accuracy)
    if not accuracies:
        return float("nan")
    return float(np.mean(accuracies))


def keep_caption(document: Document, results: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Return the caption with its references for each score, because all captions are scored together."""
    caption = (results[0], document["answers"])
    return dict.fromkeys(CAPTION_SCORES, caption)


def caption_score(name: str, captions: Sequence[tuple[str, list[str]]]) -> float:
    answers, references = zip(*captions)
    scores = score_captions(answers, references)
    return float(np.mean(scores[name]))


# The YAML files name these functions.
bleu_1 = partial(caption_score, "bleu_1")
bleu_2 = partial(caption_score, "bleu_2")
bleu_3 = partial(caption_score, "bleu_3")
bleu_4 = partial(caption_score, "bleu_4")
rouge_l = partial(caption_score, "rouge_l")
cider = partial(caption_score, "cider")
