"""Miniatures of public benchmarks in their download layouts."""

import csv
from pathlib import Path

from public_set_data import save_json, save_picture

TYPES = ("presence", "comp", "count", "rural_urban")


def save(path: Path, seed: int, width: int = 60, height: int = 56) -> None:
    save_picture(path, width, height, seed)


def write_benchmarks(folder: Path) -> None:
    write_vrsbench(folder / "VRSBench")
    write_rsvqa(folder / "RSVQA_LR", "LR_split_test", "Images_LR", 40)
    write_rsvqa(folder / "RSVQA_HR", "USGS_split_test", "Data", 50)
    write_rsvqa(folder / "RSVQA_HR", "USGS_split_test_phili", "Data", 60)
    write_dior_rsvg(folder / "DIOR-RSVG")
    write_levir_cc(folder / "LEVIR-CC")
    write_pmc_vqa(folder / "PMC-VQA")
    write_omnimedvqa(folder / "OmniMedVQA")


def write_vrsbench(root: Path) -> None:
    names = [f"P000{number}_0001.png" for number in range(4)]
    for number, name in enumerate(names):
        save(root / "Images_val" / name, number)
    entries = {
        "vqa": [
            (question, answer, about)
            for yes, number in (("Yes", "2"), ("No", "3"))
            for question, answer, about in (
                ("Is there a ship?", yes, "object existence"),
                ("How many ships?", number, "object quantity"),
            )
        ],
        "referring": [
            (f"The ship number {number}", f"{{<{10 * number}><5><{10 * number + 40}><60>}}", "ref")
            for number in range(4)
        ],
        "Cap": [("", f"The image shows {number} ships beside a long pier.", "caption") for number in range(4)],
    }
    for kind, found in entries.items():
        lines = [
            {"image_id": name, "question": question, "ground_truth": answer, "question_id": number, "type": about}
            for number, (name, (question, answer, about)) in enumerate(zip(names, found))
        ]
        save_json(root / f"VRSBench_EVAL_{kind}.json", lines)


def write_rsvqa(root: Path, prefix: str, images: str, first: int) -> None:
    """Write lists of all questions and answers, of which those of other splits are inactive and empty."""
    questions, answers = [{"id": 0, "active": False}], [{"id": 0, "active": False}]
    said = ("yes", "no", "between 0 and 10", "rural", "no", "yes", "more than 1000", "urban")
    for number in range(1, 9):
        kind, image = (number - 1) % 4, first + (number - 1) // 4
        text = ("Is a road present?", "Are there more roads than houses?", "How many houses?", "Is it rural or urban?")
        save(root / images / f"{image}.tif", image)
        about = {"img_id": image, "type": TYPES[kind], "question": text[kind], "answers_ids": [number], "active": True}
        questions.append({"id": number, "people_id": 0, **about})
        answers.append(
            {"id": number, "question_id": number, "people_id": 0, "answer": said[number - 1], "active": True}
        )
    save_json(root / f"{prefix}_questions.json", {"questions": questions})
    save_json(root / f"{prefix}_answers.json", {"answers": answers})


def write_dior_rsvg(root: Path) -> None:
    """Write two objects a file; the numbers of the test split are counted over all files."""
    (root / "Annotations").mkdir(parents=True)
    for number in (2, 1, 3):
        save(root / "JPEGImages" / f"0000{number}.jpg", 70 + number, 80, 40)
        objects = "".join(
            f"<object><name>ship</name><pose>Unspecified</pose><bndbox><xmin>{8 * number}</xmin><ymin>{4 + 4 * place}"
            f"</ymin><xmax>{8 * number + 40}</xmax><ymax>{24 + 4 * place}</ymax></bndbox>"
            f"<description>Ship {place} of image {number}</description></object>"
            for place in range(2)
        )
        text = f"<annotation><filename>0000{number}.jpg</filename>{objects}</annotation>"
        (root / "Annotations" / f"0000{number}.xml").write_text(text)
    (root / "test.txt").write_text("1\n2\n5\n")
    (root / "train.txt").write_text("0\n3\n4\n")


def write_levir_cc(root: Path) -> None:
    entries = []
    for number in range(4):
        split, name = ("train" if number == 3 else "test"), f"test_00000{number}.png"
        for seed, time in enumerate("AB"):
            save(root / "images" / split / time / name, 80 + 2 * number + seed)
        sentences = [
            {"raw": f" {number} houses {verb} beside the road . "} for verb in ("appear", "are built", "stand")
        ]
        entries.append({"filename": name, "filepath": split, "split": split, "sentences": sentences, "changeflag": 1})
    save_json(root / "LevirCCcaptions.json", {"images": entries})


def write_pmc_vqa(root: Path) -> None:
    for number in range(3):
        save(root / "images" / f"PMC{number}_F1.jpg", 90 + number)
    fields = ("Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in "ABCD"), "Answer_label")
    with (root / "test_clean.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        for number in range(3):
            choices = {
                f"Choice {letter}": f" {letter}:{text} " for letter, text in zip("ABCD", ("CT", "MRI", "US", "PET"))
            }
            label = "ABC"[number]
            told = {"Answer": choices[f"Choice {label}"][3:-1], "Answer_label": label}
            table.writerow(
                {"Figure_path": f"PMC{number}_F1.jpg", "Question": " Which modality is it? ", **choices, **told}
            )


def write_omnimedvqa(root: Path) -> None:
    """Write sources with different numbers of options, one with another name of the modality field."""
    for place, (source, modality, key) in enumerate(
        (("Chest CT Scan", "CT", "modality"), ("ISIC2018", "Dermoscopy", "modality_type"))
    ):
        entries = []
        for number in range(2):
            image = f"Images/{source}/test/{number}.png"
            save(root / image, 100 + 2 * place + number)
            options = {
                f"option_{letter}": text for letter, text in zip("ABCD", ("No", "Yes", "Lung", "Skin")[: 2 + 2 * place])
            }
            about = {"dataset": source, "question_id": f"{source}_{number}", "question_type": "Disease Diagnosis"}
            told = {"question": "Is it healthy?", "gt_answer": ("No", "Yes")[number], "image_path": image}
            entries.append({**about, **told, **options, key: modality})
        save_json(root / "QA_information" / "Open-access" / f"{source}.json", entries)
