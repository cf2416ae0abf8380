"""Tasks of lmms-eval on downloaded folders, and the scores of their answers."""

import os
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


class BenchmarkTask(ConfigurableMessagesTask):
    """Benchmark that is read from a folder.

    In its YAML file, `dataset_path` is the folder, relative to `VITP_BENCHMARKS` or else to the working directory,
    `dataset_name` is a function of [`benchmarks`](benchmarks.py), and `dataset_kwargs` are its arguments.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the documents from the folder; nothing is downloaded."""
        root = Path(os.environ.get(FOLDERS, "."), self.config.dataset_path)
        documents = getattr(benchmarks, self.config.dataset_name)(root, **(dataset_kwargs or {}))
        if not documents:
            raise ValueError(f"No documents of {self.config.task} found in {root}.")
        self.dataset = self.dataset_no_image = DatasetDict({SPLIT: Dataset.from_list(documents)})


def document_images(document: dict[str, Any]) -> list:
    return load_images({"images": document["images"]})


def text_of(document: dict[str, Any], words: dict[str, str] | None = None) -> str:
    words = words or {}
    return f"{words.get('pre_prompt', '')}{document['question']}{words.get('post_prompt', '')}"


def target_of(document: dict[str, Any]) -> str:
    return document["answers"][0]


def score(kind: str, document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    found = score_answers(kind, [document["question"]], [results[0]], [document["answers"]])
    return {name: float(np.mean(values)) for name, values in found.items()}


def score_box(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return score("grounding", document, results)


def score_short_answer(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    return by_type(document, score("vqa", document, results)["accuracy"])


def score_choice(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    return by_type(document, score("choice", document, results)["accuracy"])


def by_type(document: dict[str, Any], value: float) -> dict[str, Any]:
    typed = document["type"], value
    return {"accuracy": value, "average_accuracy": typed, "accuracy_without_numbers": typed}


def average_over_types(typed: Sequence[tuple[str, float]]) -> float:
    """Return the mean over question types of the mean of each type."""
    values: dict[str, list[float]] = {}
    for kind, value in typed:
        values.setdefault(kind, []).append(value)
    return float(np.mean([np.mean(found) for found in values.values()]))


def average_without_numbers(typed: Sequence[tuple[str, float]]) -> float:
    """Return the mean over questions that do not ask for a number, or NaN without such questions."""
    values = [value for kind, value in typed if kind not in NUMBERS]
    return float(np.mean(values)) if values else float("nan")


def keep_caption(document: dict[str, Any], results: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Return the caption with its references for each score, because all captions are scored together."""
    return dict.fromkeys(CAPTION_SCORES, (results[0], document["answers"]))


def caption_score(name: str, captions: Sequence[tuple[str, list[str]]]) -> float:
    answers, references = zip(*captions)
    return float(np.mean(score_captions(answers, references)[name]))


bleu_1, bleu_2, bleu_3, bleu_4, rouge_l, cider = (partial(caption_score, name) for name in CAPTION_SCORES)
