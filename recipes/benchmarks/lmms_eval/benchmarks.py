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


def document(
    name: Any, images: Sequence[Path], question: str, answers: Sequence[str], kind: str | None = ""
) -> dict[str, Any]:
    paths = [str(image.absolute()) for image in images]
    return {"id": str(name), "images": paths, "question": question, "answers": list(answers), "type": kind or ""}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def vrsbench(root: Path, annotations: str) -> list[dict]:
    """Read VRSBench (Li et al. 2024): `Images_val/` and a list with `image_id`, `question` and `ground_truth`.

    Its boxes are written `{<x1><y1><x2><y2>}`, in percent of the image.
    """
    documents = []
    for entry in read_json(root / annotations):
        answer = str(entry["ground_truth"])
        corners = PERCENT_BOX.fullmatch(answer.strip())
        answer = write_boxes([tuple(map(int, corners.groups()[:4]))], (100, 100)) if corners else answer
        image = root / "Images_val" / entry["image_id"]
        name = entry.get("question_id", len(documents))
        documents.append(document(name, [image], entry.get("question") or "", [answer], entry.get("type")))
    return documents


def rsvqa(root: Path, prefix: str, images: str) -> list[dict]:
    """Read RSVQA (Lobry et al. 2020): `PREFIX_questions.json`, `PREFIX_answers.json` and images by number.

    Active questions and answers belong to the split.
    """
    listed = {name: read_json(root / f"{prefix}_{name}.json")[name] for name in ("questions", "answers")}
    answers = {one["id"]: one["answer"] for one in listed["answers"] if one["active"]}
    documents = []
    for one in listed["questions"]:
        if one["active"]:
            image, answer = root / images / f"{one['img_id']}.tif", str(answers[one["answers_ids"][0]])
            documents.append(document(one["id"], [image], one["question"], [answer], one["type"]))
    return documents


def dior_rsvg(root: Path, indices: str = "test.txt") -> list[dict]:
    """Read DIOR-RSVG (Zhan et al. 2023): VOC's XML with descriptions of objects, and the split's object numbers."""
    wanted, documents = set((root / indices).read_text().split()), []
    for number, entry in DiorRSVG(root).objects():
        if number in wanted:
            _, name, box, expression = entry.content
            image = root / "JPEGImages" / name
            answer = write_boxes([box], stored_size(image))
            documents.append(document(number, [image], expression, [answer]))
    return documents


def levir_cc(root: Path, split: str = "test") -> list[dict]:
    """Read LEVIR-CC (Liu et al. 2022): `LevirCCcaptions.json`, five sentences a pair in `images/SPLIT/A` and `…/B`."""
    return [
        document(
            entry["filename"],
            [root / "images" / split / time / entry["filename"] for time in "AB"],
            "",
            [sentence["raw"].strip() for sentence in entry["sentences"]],
        )
        for entry in read_json(root / "LevirCCcaptions.json")["images"]
        if entry["split"] == split
    ]


def pmc_vqa(root: Path, annotations: str = "test_clean.csv", images: str = "images") -> list[dict]:
    """Read PMC-VQA (Zhang et al. 2023): a table with `Figure_path`, `Question`, `Choice A` to `D` and the right letter.

    The letter is in `Answer_label`, or in `Answer` in the second version.
    """
    documents = []
    with (root / annotations).open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file)):
            choices = [re.sub(r"^\s*[A-D]\s*:\s*", "", row[f"Choice {letter}"]).strip() for letter in "ABCD"]
            right = (row.get("Answer_label") or row["Answer"]).strip()
            question = with_choices(row["Question"].strip(), choices)
            documents.append(document(number, [root / images / row["Figure_path"]], question, [right]))
    return documents


def omnimedvqa(root: Path, annotations: str = "QA_information/Open-access") -> list[dict]:
    """Read OmniMedVQA (Hu et al. 2024): a JSON list for each of its sources; the type of a question is its modality."""
    documents = []
    for path in sorted((root / annotations).glob("*.json")):
        for entry in read_json(path):
            choices = [entry[f"option_{letter}"] for letter in LETTERS if entry.get(f"option_{letter}")]
            right = choose_option(entry["gt_answer"], dict(zip(LETTERS, choices))) or entry["gt_answer"]
            kind = entry.get("modality_type") or entry.get("modality")
            question = with_choices(entry["question"], choices)
            documents.append(document(entry["question_id"], [root / entry["image_path"]], question, [right], kind))
    return documents


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with its choices, one a line."""
    return "\n".join([question, *(f"{letter}. {' '.join(choice.split())}" for letter, choice in zip(LETTERS, choices))])
