"""Readers of downloaded benchmarks, which return documents with `id`, `images`, `question`, `answers` and `type`.

Boxes in answers are on the grid from 0 to 1000. The folder layouts follow the publications and public loaders of the
benchmarks; `tests/helpers/benchmark_folders.py` writes a miniature of each.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_vitp.evaluation.answer_scores import choose_option
from modeling_vitp.images.reading import stored_size
from modeling_vitp.instructions.boxes import write_boxes
from modeling_vitp.recipes.datasets.remote_sensing import PERCENT_BOX, DiorRSVG

LETTERS = "ABCDEFGH"
Document = dict[str, Any]


def document(
    name: Any,
    images: Sequence[Path],
    question: str,
    answers: Sequence[str],
    kind: str | None = "",
) -> Document:
    return {
        "id": str(name),
        "images": [str(image.absolute()) for image in images],
        "question": question,
        "answers": list(answers),
        "type": kind or "",
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def vrsbench(root: Path, annotations: str) -> list[Document]:
    """Read VRSBench (Li et al. 2024): `Images_val/` and a list with `image_id`, `question` and `ground_truth`.

    Its boxes are written `{<x1><y1><x2><y2>}`, in percent of the image.
    """
    documents = []
    for entry in read_json(root / annotations):
        answer = str(entry["ground_truth"])
        corners = PERCENT_BOX.fullmatch(answer.strip())
        if corners:
            left, top, right, bottom = corners.groups()[:4]
            box = (int(left), int(top), int(right), int(bottom))
            answer = write_boxes([box], (100, 100))
        entry_document = document(
            entry.get("question_id", len(documents)),
            [root / "Images_val" / entry["image_id"]],
            question=entry.get("question") or "",
            answers=[answer],
            kind=entry.get("type"),
        )
        documents.append(entry_document)
    return documents


def rsvqa(root: Path, prefix: str, images: str) -> list[Document]:
    """Read RSVQA (Lobry et al. 2020): `PREFIX_questions.json`, `PREFIX_answers.json` and images by number.

    Active questions and answers belong to the split.
    """
    questions = read_json(root / f"{prefix}_questions.json")["questions"]
    answers = {}
    for answer in read_json(root / f"{prefix}_answers.json")["answers"]:
        if answer["active"]:
            answers[answer["id"]] = str(answer["answer"])
    documents = []
    for question in questions:
        if not question["active"]:
            continue
        answer_id = question["answers_ids"][0]
        image = root / images / f"{question['img_id']}.tif"
        question_document = document(
            question["id"],
            [image],
            question=question["question"],
            answers=[answers[answer_id]],
            kind=question["type"],
        )
        documents.append(question_document)
    return documents


def dior_rsvg(root: Path, indices: str = "test.txt") -> list[Document]:
    """Read DIOR-RSVG (Zhan et al. 2023): VOC's XML with descriptions of objects, and the split's object numbers."""
    text = (root / indices).read_text()
    numbers_of_split = set(text.split())
    documents = []
    for number, entry in DiorRSVG(root).objects():
        if number in numbers_of_split:
            _, name, box, expression = entry.content
            image = root / "JPEGImages" / name
            size = stored_size(image)
            answer = write_boxes([box], size)
            documents.append(document(number, [image], expression, [answer]))
    return documents


def levir_cc(root: Path, split: str = "test") -> list[Document]:
    """Read LEVIR-CC (Liu et al. 2022): `LevirCCcaptions.json`, five sentences a pair in `images/SPLIT/A` and `…/B`."""
    folder = root / "images" / split
    documents = []
    for pair in read_json(root / "LevirCCcaptions.json")["images"]:
        if pair["split"] != split:
            continue
        name = pair["filename"]
        images = [folder / "A" / name, folder / "B" / name]
        captions = [sentence["raw"].strip() for sentence in pair["sentences"]]
        documents.append(document(name, images, question="", answers=captions))
    return documents


def pmc_vqa(root: Path, annotations: str = "test_clean.csv", images: str = "images") -> list[Document]:
    """Read PMC-VQA (Zhang et al. 2023): a table with `Figure_path`, `Question`, `Choice A` to `D` and the right letter.

    The letter is in `Answer_label`, or in `Answer` in the second version.
    """
    documents = []
    with (root / annotations).open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file)):
            choices = []
            for letter in "ABCD":
                choice = re.sub(r"^\s*[A-D]\s*:\s*", "", row[f"Choice {letter}"])
                choices.append(choice.strip())
            question = with_choices(row["Question"].strip(), choices)
            answer = row.get("Answer_label") or row["Answer"]
            image = root / images / row["Figure_path"]
            row_document = document(
                number,
                [image],
                question=question,
                answers=[answer.strip()],
            )
            documents.append(row_document)
    return documents


def omnimedvqa(root: Path, annotations: str = "QA_information/Open-access") -> list[Document]:
    """Read OmniMedVQA (Hu et al. 2024): a JSON list for each of its sources; the type of a question is its modality."""
    documents = []
    for path in sorted((root / annotations).glob("*.json")):
        for entry in read_json(path):
            choices = []
            for letter in LETTERS:
                choice = entry.get(f"option_{letter}")
                if choice:
                    choices.append(choice)
            lettered_choices = dict(zip(LETTERS, choices))
            right = choose_option(entry["gt_answer"], lettered_choices)
            entry_document = document(
                entry["question_id"],
                [root / entry["image_path"]],
                question=with_choices(entry["question"], choices),
                answers=[right or entry["gt_answer"]],
                kind=entry.get("modality_type") or entry.get("modality"),
            )
            documents.append(entry_document)
    return documents


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with its choices, one a line."""
    lines = [question]
    for letter, choice in zip(LETTERS, choices):
        words = choice.split()
        lines.append(f"{letter}. {' '.join(words)}")
    return "\n".join(lines)
