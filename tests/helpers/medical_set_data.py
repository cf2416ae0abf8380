"""Miniatures of the medical and general public data sets of the paper's mixtures, each in its layout."""

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pictures import picture
from public_set_data import miniature, save_json, save_picture, save_text


def save_table(path: Path, rows: list[Mapping[str, object]], delimiter: str = ",") -> None:
    """A table as pandas writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_lines(path: Path, rows: Iterable[object]) -> None:
    save_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def llava(image: object, *texts: str, **fields: object) -> dict:
    """A LLaVA conversation of questions and answers."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return fields | ({} if image is None else {"image": image}) | {"conversations": turns}


def encoded(seed: int, form: str = "PNG") -> str:
    file = io.BytesIO()
    picture(32, 24, seed).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


@miniature
def gmai_mmbench(folder: Path) -> int:
    """Four questions, of four choices but for one of two and one of five; the file of the test split has no answers."""
    names = ("index", "image", "question", "A", "B", "C", "D", "E", "answer", "category", "original task", "modality")
    rows = [
        (0, encoded(0), "Which finding does the image show?", "Cyst", "Polyp", "Ulcer", "Normal", "", "B", "Polyp"),
        (1, encoded(1, "JPEG"), "Which organ is marked?", "Liver", "Spleen", "", "", "", "A", "Liver"),
        (2, encoded(2), 'What is "seen", and where?', "Edema", "Nodule", "Mass", "None", "Scar", "E", "Scar"),
        (7, encoded(3), "Which grade is it?", "Mild", "Moderate", "Severe", "Absent", "None", "C", "Severe"),
    ]
    rows = [dict(zip(names, (*row, "CLS_2D", "CT"))) for row in rows]
    save_table(folder / "GMAI_mm_bench_VAL.tsv", rows, "\t")
    save_table(folder / "GMAI_mm_bench_TEST.tsv", [{**row, "answer": ""} for row in rows], "\t")
    return len(rows)


@miniature
def open_i(folder: Path) -> int:
    """Two examinations with five images; the second has no findings, and its report has two lines."""
    names = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
    first = (1, "normal", "normal", "Xray Chest PA and Lateral", "Positive TB test", "None.")
    second = (
        12,
        "Cardiomegaly/mild",
        "Cardiomegaly",
        "PA and lateral",
        "Dyspnea",
        "",
        "",
        "Mild XXXX.\nNo effusion.",
    )
    rows = [(*first, 'The heart is "normal" in size, the lungs are clear.', "No acute disease."), second]
    save_table(folder / "indiana_reports.csv", [dict(zip(names, row)) for row in rows])
    images = [
        {"uid": uid, "filename": f"{uid}_IM-{n:04d}-4001.dcm.png", "projection": ("Frontal", "Lateral")[n % 2]}
        for n, uid in enumerate((1, 1, 12, 12, 12))
    ]
    save_table(folder / "indiana_projections.csv", images)
    for n, image in enumerate(images):
        save_picture(folder / "images/images_normalized" / image["filename"], seed=n)
    return len(images)


def save_pubmedvision(folder: Path, part: str) -> int:
    """Three figures of six images, without places for them, in conversations of one and of two questions."""
    groups = (["images/pmc_1_0.jpg"], [f"images/pmc_2_{n}.jpg" for n in range(4)], ["images/pmc_10_0.jpg"])
    texts = ("What is seen in the images?", "A lesion.", "Where is it?", "In the left lobe.")
    fields = {"modality": "Computed Tomography", "body_part": "Liver"}
    rows = [llava(images, *texts[: 2 + 2 * (n % 2)], id=f"{part}_{n}", **fields) for n, images in enumerate(groups)]
    save_json(folder / f"PubMedVision_{part}.json", rows)
    for n, image in enumerate(sum(groups, [])):
        save_picture(folder / image, seed=n)
    return len(rows)


@miniature
def huatuo_oa(folder: Path) -> int:
    return save_pubmedvision(folder, "Alignment_VQA")


@miniature
def huatuo_vqa(folder: Path) -> int:
    return save_pubmedvision(folder, "InstructionTuning_VQA")


@miniature
def pmc_oa(folder: Path) -> int:
    """Five figures, of which the first version has one in its test and one in its validation split."""
    rows = [
        {
            "image": f"PMC21231{n}_Fig3_4.jpg",
            "caption": f"({n}) Axial CT [12].",
            "alignment_score": 0.5,
        }
        for n in range(5)
    ]
    save_lines(folder / "pmc_oa.jsonl", rows)
    for name, row in (("test", rows[3]), ("valid", rows[1])):
        first = {"image": row["image"], "caption": "A. Whole. B. Caption.", "pmcid": "PMC1", "url_name": "1-2.jpg"}
        save_lines(folder / f"{name}.jsonl", [first])
    for n, row in enumerate(rows):
        save_picture(folder / "images/caption_T060_filtered_top4_sep_v0_subfigures" / row["image"], seed=n)
    return 3


@miniature
def pmc_vqa(folder: Path) -> int:
    """Four questions to train on, one about an image that the test rows have too."""
    choices = {f"Choice {letter}": f" {letter}:Pattern {letter}, seen" for letter in "ABCD"}
    train = [
        {
            "Figure_path": f"PMC106409{n}_F1.jpg",
            "Question": f"What is {n}? ",
            "Answer": f"Pattern {letter}, seen",
        }
        | choices
        | {"Answer_label": letter}
        for n, letter in enumerate("BADC")
    ]
    save_table(folder / "train.csv", train)
    save_table(folder / "test.csv", [{**train[2], "Question": "And this?"}, {**train[0], "Figure_path": "PMC9_F1.jpg"}])
    for n, name in enumerate([row["Figure_path"] for row in train] + ["PMC9_F1.jpg"]):
        save_picture(folder / "images" / name, seed=n)
    return 3


@miniature
def omnimedvqa(folder: Path) -> int:
    """Three data sets; one names its modality otherwise, and has an image of its own test split."""

    def save(dataset: str, image: str, choices: tuple[str, ...], **fields: str) -> None:
        options = {f"option_{letter}": choice for letter, choice in zip("ABCD", choices)}
        row = {"dataset": dataset, "question_id": f"{dataset}_0001", "question_type": "Disease Diagnosis"}
        row |= {
            "question": "What is seen?",
            "gt_answer": choices[-1],
            "image_path": f"Images/{dataset}/{image}",
        }
        save_json(folder / f"OmniMedVQA/QA_information/Open-access/{dataset}.json", [row | options | fields])
        save_picture(folder / "OmniMedVQA/Images" / dataset / image, seed=len(dataset))

    save("ACRIMA", "Im002_ACRIMA.png", ("Normal", "Cataract", "Drusen", "Glaucoma"), modality_type="Fundus Photography")
    save("Covid-19 tianchi", "1.png", ("No", "Yes"), modality_type="X-Ray")
    save("Chest CT Scan", "test/normal/6 (1).png", ("Nodule", "Normal"), modality="CT(Computed Tomography)")
    save_json(folder / "OmniMedVQA/QA_information/Restricted-access/KVASIR.json", [])
    return 2


@miniature
def quilt_1m(folder: Path) -> int:
    """Three views."""
    names = [f"_KJZm1orOvU_image_{n}.jpg" for n in range(3)]
    rows = [llava(name, "<image>\nDescribe it.", "Sheets of cells.", id=str(n)) for n, name in enumerate(names)]
    save_json(folder / "quilt_pretrain.json", rows)
    for n, name in enumerate(names):
        save_picture(folder / "quilt_1m" / name, seed=n)
    return len(rows)


@miniature
def quilt_instruct(folder: Path) -> int:
    """A view in each of the three files."""
    for n, name in enumerate(("107k", "conv_desc", "complex_abductive")):
        image, answer = f"_KJZm1orOvU_roi_{n}.jpg", "Because the nuclei are large."
        rows = [llava(image, "What is this?\n<image>", "A carcinoma.", "Why?", answer, id=f"{name}-{n}")]
        save_json(folder / f"quilt_instruct_{name}.json", rows)
        save_picture(folder / "quilt_instruct" / image, seed=n)
    return 3


@miniature
def mini_internvl_general(folder: Path) -> int:
    """A row of each of the files, one more without an image, and one about an image of a test split."""
    names = {
        "ai2d_train_12k": ("abc_images/0.png", "ai2d"),
        "chartqa_train_18k": ("train/png/1.png", "chartqa"),
        "docvqa_train_10k": ("train/documents/2.png", "docvqa"),
        "dvqa_train_200k": ("images/bar_train_3.png", "dvqa"),
        "geoqa+": ("images/4.png", "geoqa+"),
        "llava_instruct_150k_zh": ("train2017/5.jpg", "coco"),
        "sharegpt4v_instruct_gpt4-vision_cap100k": ("sam/images/sa_6.jpg", "."),
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": ("vg/VG_100K/7.jpg", "."),
        "synthdog_en": ("images/8.jpg", "synthdog-en"),
    }
    for n, (name, (image, root)) in enumerate(names.items()):
        rows = [llava(image, "<image>\nWhat is it?", f"A box: <box>[[1, 2, {300 + n}, 1000]]</box>", id=n)]
        if name.startswith("sharegpt4v_mix"):
            rows.append(llava(None, "Who are you?", "A model.", id="talk_1"))
        if name.startswith("chartqa"):
            rows.append(llava("test/png/1.png", "<image>\nWhat is it?", "A chart.", id="test_1"))
            save_picture(folder / "data" / root / "test/png/1.png", seed=99)
        save_lines(folder / f"opensource/{name}.jsonl", rows)
        save_picture(folder / "data" / root / image, seed=n)
    return len(names) + 1
