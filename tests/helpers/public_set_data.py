"""Miniatures of public data sets in their download layouts, with generated pictures."""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pictures import picture
from row_formats import write_archive

MINIATURES: dict[str, Callable[[Path], int]] = {}  # writers by name, which return the number of resulting rows


def miniature(write: Callable[[Path], int]) -> Callable[[Path], int]:
    MINIATURES[write.__name__] = write
    return write


def save_picture(path: Path, width: int = 32, height: int = 24, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, seed).save(path)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content))


VOC_OBJECT = """
  <object>
    <name>ship</name>
    <pose>Unspecified</pose>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
    <description>{4}</description>
  </object>"""


@miniature
def dior_rsvg(folder: Path) -> int:
    """Write seven objects in four images; the second image has an object of the test split and one of training."""
    numbers = iter(range(100))
    for image, count in enumerate((2, 2, 1, 2), start=1):
        objects = [VOC_OBJECT.format(2, 3, 10, 9, f"The ship {next(numbers)} at the pier") for _ in range(count)]
        save_text(
            folder / f"Annotations/{image:05d}.xml",
            f"<annotation>\n  <filename>{image:05d}.jpg</filename>{''.join(objects)}\n</annotation>",
        )
        save_picture(folder / f"JPEGImages/{image:05d}.jpg", seed=image)
    save_text(folder / "train.txt", "0\n1\n3\n6\n")
    save_text(folder / "val.txt", "5\n")
    save_text(folder / "test.txt", "2\n4\n")
    return 3


def turns(*texts: str) -> list[dict]:
    """Return questions and answers in the format of LLaVA."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def asked(question: str, *more: str) -> list[dict]:
    return turns(f"<image>\n{question}", *more)


@miniature
def geochat(folder: Path) -> int:
    images = folder / "share/softwares/kartik/GeoChat_finetuning/final_images_llava"
    for number in range(3):
        save_picture(images / f"P000{number}.png", 200, 100, seed=number)
    turned = "{<25><40><75><60>|<90>}"
    conversations = [
        asked("[refer] where is <p>gray ship</p> ?", "{<10><20><30><40>|<0>}", "[refer] <p>2 cars</p>", turned * 2),
        asked(f"[identify] what is the object in {turned}", "<p>1 dump-truck at the center</p>"),
        asked("[grounding] describe the image", "There are <p>two ships</p> {<50><50><60><60>|<0>} at a pier ."),
        asked("Is it a rural or an urban area?", "rural"),
    ]
    entries = [{"id": f"{n}", "image": f"P000{n % 3}.png", "conversations": c} for n, c in enumerate(conversations)]
    save_json(folder / "GeoChat_Instruct.json", entries)
    return 3


@miniature
def vrsbench(folder: Path) -> int:
    save_picture(folder / "Images_train/P0003_0002.png", 64, 64)
    conversations = [
        asked("[refer] give me the location of <p> The ship at the pier. </p>", "{<25><40><33><60>}"),
        asked("[caption] Could you describe the contents of this image for me?", "The image shows a ship."),
        asked("[vqa] How many ships are there? A short answer to the question is", "1"),
    ]
    entries = [{"id": n, "image": "P0003_0002.png", "conversations": c} for n, c in enumerate(conversations)]
    save_json(folder / "VRSBench_train.json", entries)
    save_json(
        folder / "VRSBench_EVAL_referring.json", [{"image_id": "P0009_0001.png", "question": "Q", "ground_truth": ""}]
    )
    save_json(folder / "Annotations_train/P0003_0002.json", {"image": "P0003_0002.png"})
    return 1


def refgeo_part(folder: Path, part: str, suffix: str = ".jpg") -> None:
    rows = [
        {
            "image_id": f"{n:05d}.jpg",
            "dataset": part,
            "question_id": n,
            "question": f"ship {n}",
            "bbox": [1.5, 2, 9.2, 8],
        }
        for n in range(3)
    ]
    for split, of_split in (("train", rows[:2]), ("test", rows[1:])):  # The second image is in both splits.
        save_lines(folder / f"metainfo/{part}_{split}.jsonl", of_split)
    for n in range(3):
        save_picture(folder / f"images/{part}/{n:05d}{suffix}", seed=n)


@miniature
def refgeo(folder: Path) -> int:
    for part in ("rsvg", "dior_rsvg", "vrsbench"):
        refgeo_part(folder, part)
    refgeo_part(folder, "geochat", ".png")
    return 4


@miniature
def rsvg(folder: Path) -> int:
    refgeo_part(folder, "rsvg")
    return 1


def rsvqa_files(folder: Path, start: str, images: str) -> int:
    """Write files with stubs of the other splits' questions and answers."""
    texts = [("Is there a road?", "yes"), ("How many buildings are there?", "12"), ("What is the area?", "36m2")]
    for split, chosen in (("train", (0, 2)), ("val", ()), ("test", (1,))):
        questions, answers = [], []
        for n, (question, answer) in enumerate(texts):
            is_active = n in chosen
            active = {"id": n, "active": is_active}
            asks = {"img_id": n, "people_id": 0, "type": "presence", "question": question, "answers_ids": [n]}
            questions.append(active | asks if is_active else active)
            answers.append(active | {"question_id": n, "people_id": 0, "answer": answer} if is_active else active)
        save_json(folder / f"{start}_split_{split}_questions.json", {"questions": questions})
        save_json(folder / f"{start}_split_{split}_answers.json", {"answers": answers})
    for n in range(3):
        save_picture(folder / f"{images}/{n}.tif", seed=n)
    return 2


@miniature
def rsvqa(folder: Path) -> int:
    return rsvqa_files(folder, "USGS", "Data")


@miniature
def rsvqa_lr(folder: Path) -> int:
    return rsvqa_files(folder, "LR", "Images_LR")


@miniature
def fit_rs(folder: Path) -> int:
    save_picture(folder / "FIT-RS_Image/imgv2_split_512_100_vaild/0000__512__0___0.png")
    entries = [
        {"id": f"vqa_{n}", "image": "0000__512__0___0.png", "conversations": asked(f"Is there a {what}?", "Yes")}
        for n, what in enumerate(("ship", "crane"))
    ]
    tasks = folder / "FIT-RS_Instruction/train_data_of_each_individual_task"
    save_json(tasks / "train_instruction_vqa_400k.json", entries)
    save_json(tasks / "train_instruction_imagecaption_65k.json", entries)
    return 2


@miniature
def levir_cc(folder: Path) -> int:
    pairs = []
    for split, number in (("train", 1), ("train", 2), ("val", 1), ("test", 1)):
        name = f"{split}_{number:06d}.png"
        said = [" a road is built .", " a house appears on the left .", " a road is built ."]
        pairs.append(
            {
                "filepath": split,
                "filename": name,
                "imgid": len(pairs),
                "split": split,
                "changeflag": 1,
                "sentences": [{"tokens": text.split(), "raw": text} for text in said],
            }
        )
        for place, moment in enumerate("AB"):
            save_picture(folder / f"images/{split}/{moment}/{name}", seed=10 * len(pairs) + place)
    save_json(folder / "LevirCCcaptions.json", {"images": pairs, "dataset": "LEVIR-CC"})
    return 4


@miniature
def vhm(folder: Path) -> int:
    rows = [
        ("fmow/airport_1.jpg", asked("{CLS} Which class is it? Answer with one word or short phrase.", "airport")),
        ("crowdAI/1.jpg", asked("{IT} How many buildings are there?", "3")),
        ("DOIR-RSVG/00001.jpg", asked("{VG} Where is the ship?", "[[1,2,3,4]]")),
        ("dota-test/P0001.png", asked("{IDK} What color is the ship?", "There is no ship.")),
    ]
    for number, (image, _) in enumerate(rows):
        save_picture(folder / image, seed=number)
    save_json(folder / "list_sft.json", [{"id": n, "image": i, "conversations": c} for n, (i, c) in enumerate(rows)])
    return 2


@miniature
def gaia(folder: Path) -> int:
    for split, seed in (("train", 0), ("val", 2), ("test", 4)):
        members = {}
        for n in range(2):
            buffer = io.BytesIO()
            picture(16, 16, seed + n).save(buffer, "PNG")
            fields = {"id": f"{split}-{n}", "captions": [f"A storm over {split} {n}.", "Clouds and the sea."]}
            members |= {f"00000000{n}.png": buffer.getvalue(), f"00000000{n}.txt": b"alt"}
            members |= {f"00000000{n}.json": json.dumps(fields).encode()}
        write_archive(folder / split / "00000.tar", members)
        save_json(folder / f"{split}_data.json", [])
    return 4


@miniature
def million_aid(folder: Path) -> int:
    save_picture(folder / "train/agriculture_land/arable_land/dry_field/P0115678.jpg")
    save_picture(folder / "train/water_area/lake/P0115679.jpg", seed=1)
    save_picture(folder / "test/P0000001.jpg", seed=2)
    return 2


@miniature
def isprs_sar(folder: Path) -> int:
    save_picture(folder / "internal_wave/0001.png")
    save_picture(folder / "ocean_eddy/0001.png", seed=1)
    return 2


@miniature
def sar_sentinel_1_2(folder: Path) -> int:
    for number, name in enumerate(("agri", "barrenland", "grassland", "urban")):
        for satellite in ("s1", "s2"):
            save_picture(folder / f"v_2/{name}/{satellite}/ROIs1868_summer_{satellite}_59_p10{number}.png", seed=number)
    return 4


def save_table(path: Path, rows: list[Mapping[str, object]], delimiter: str = ",") -> None:
    """Write a table with pandas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_lines(path: Path, rows: Iterable[object]) -> None:
    save_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def llava(image: object, *texts: str, **fields: object) -> dict:
    """Return a LLaVA conversation of questions and answers."""
    return fields | ({} if image is None else {"image": image}) | {"conversations": turns(*texts)}


def encoded(seed: int, form: str = "PNG") -> str:
    file = io.BytesIO()
    picture(32, 24, seed).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


@miniature
def gmai_mmbench(folder: Path) -> int:
    """Write four questions with two to five choices; the file of the test split has no answers."""
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
    """Write two examinations with five images; the second one has no findings and a report of two lines."""
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
    """Write three figures of six images, without placeholders, in conversations of one and two questions."""
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
    """Write five figures, of which one is in the test and one in the validation split of the first version."""
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
    """Write four training questions, one about an image that is also in the test rows."""
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
    """Write three data sets, one with another modality field and an image of its test split."""

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
    """Write three views."""
    names = [f"_KJZm1orOvU_image_{n}.jpg" for n in range(3)]
    rows = [llava(name, "<image>\nDescribe it.", "Sheets of cells.", id=str(n)) for n, name in enumerate(names)]
    save_json(folder / "quilt_pretrain.json", rows)
    for n, name in enumerate(names):
        save_picture(folder / "quilt_1m" / name, seed=n)
    return len(rows)


@miniature
def quilt_instruct(folder: Path) -> int:
    """Write a view in each of the three files."""
    for n, name in enumerate(("107k", "conv_desc", "complex_abductive")):
        image, answer = f"_KJZm1orOvU_roi_{n}.jpg", "Because the nuclei are large."
        rows = [llava(image, "What is this?\n<image>", "A carcinoma.", "Why?", answer, id=f"{name}-{n}")]
        save_json(folder / f"quilt_instruct_{name}.json", rows)
        save_picture(folder / "quilt_instruct" / image, seed=n)
    return 3


@miniature
def mini_internvl_general(folder: Path) -> int:
    """Write a row of each of the files, one without an image, and one about an image of a test split."""
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
