import json

import pytest
from public_set_data import (
    MINIATURES,
    gmai_mmbench,
    mini_internvl_general,
    omnimedvqa,
    open_i,
    pmc_oa,
    pmc_vqa,
    save_json,
    save_text,
)

from modeling_vitp.recipes.datasets.public_set import load_public_set, load_public_sets, make_rows

MEDICAL = [name for name, kind in load_public_sets().items() if not kind.__module__.endswith("remote_sensing")]


def make(name, folder, **options):
    made = make_rows(load_public_set(name)(folder), folder.parent, **options)
    return made, [json.loads(line) for line in made.annotation.read_text().splitlines()]


def said(row):
    return [message["content"] for message in row["messages"]]


def test_choices_have_letters(tmp_path):
    gmai_mmbench(tmp_path / "gmai")
    _, rows = make("gmai_mmbench", tmp_path / "gmai")
    assert said(rows[0]) == ["Which finding does the image show?\nA. Cyst\nB. Polyp\nC. Ulcer\nD. Normal", "B. Polyp"]
    assert said(rows[1]) == ["Which organ is marked?\nA. Liver\nB. Spleen", "A. Liver"]
    assert said(rows[2])[0].startswith('What is "seen", and where?\n')
    assert said(rows[3])[0].endswith("\nD. Absent") and [row["id"] for row in rows] == ["0", "1", "2", "7"]
    assert [row["images"] for row in rows[:2]] == [["images/0.png"], ["images/1.jpg"]]
    pmc_vqa(tmp_path / "pmc")
    _, rows = make("pmc_vqa", tmp_path / "pmc")
    choices = "".join(f"\n{letter}. Pattern {letter}, seen" for letter in "ABCD")
    assert said(rows[0]) == ["What is 0?" + choices, "B. Pattern B, seen"]


def test_answer_without_a_letter_is_unusable(tmp_path):
    pmc_vqa(tmp_path / "pmc")
    path = tmp_path / "pmc" / "train.csv"
    lines = path.read_text().splitlines()
    start = lines[1].rpartition(",")[0]
    for label in ("", "BC", "E"):
        path.write_text("\n".join([lines[0], f"{start},{label}", *lines[2:]]) + "\n")
        conversion, rows = make("pmc_vqa", tmp_path / "pmc")
        assert [said(row)[0].splitlines()[0] for row in rows] == ["What is 1?", "What is 3?"]
        assert len(conversion.unused) == 1


def test_report_has_findings_impression_and_view(tmp_path):
    open_i(tmp_path / "open_i")
    _, rows = make("open_i", tmp_path / "open_i")
    report = 'Findings: The heart is "normal" in size, the lungs are clear.\nImpression: No acute disease.'
    assert [said(row)[1] for row in rows] == [report] * 2 + ["Impression: Mild XXXX.\nNo effusion."] * 3
    assert ["frontal chest" in said(row)[0] for row in rows] == [True, False, True, False, True]
    assert ["lateral chest" in said(row)[0] for row in rows] == [False, True, False, True, False]


def test_images_of_a_figure_precede_the_question(tmp_path):
    MINIATURES["huatuo_vqa"](tmp_path / "pubmedvision")
    _, rows = make("huatuo_vqa", tmp_path / "pubmedvision")
    assert [len(row["images"]) for row in rows] == [1, 4, 1] and [len(row["messages"]) for row in rows] == [2, 4, 2]
    assert not any("<image>" in text for row in rows for text in said(row))


def test_test_split_is_excluded_by_default(tmp_path):
    for name, write, kept in (("pmc_vqa", pmc_vqa, 4), ("omnimedvqa", omnimedvqa, 3), ("pmc_oa", pmc_oa, 5)):
        rows = write(tmp_path / name)
        made, _ = make(name, tmp_path / name)
        assert (made.rows, made.held_out) == (rows, kept - rows)
        made, made_rows = make(name, tmp_path / name, keep_shared=True)
        assert (made.rows, made.held_out) == (kept, 0)
        assert not any("And this?" in text for row in made_rows for text in said(row))
    for name in ("test.jsonl", "valid.jsonl"):
        (tmp_path / "pmc_oa" / name).unlink()
    assert make("pmc_oa", tmp_path / "pmc_oa")[0].rows == 5
    (tmp_path / "pmc_vqa/test.csv").unlink()
    with pytest.raises(ValueError, match=r"test\.csv not found in .*`vitp make_public_set pmc_vqa`"):
        make("pmc_vqa", tmp_path / "pmc_vqa")
    gmai_mmbench(tmp_path / "gmai_mmbench")
    (tmp_path / "gmai_mmbench/GMAI_mm_bench_VAL.tsv").unlink()
    with pytest.raises(ValueError, match=r"GMAI_mm_bench_VAL\.tsv not found"):
        make("gmai_mmbench", tmp_path / "gmai_mmbench")


def test_general_files_have_their_image_folders(tmp_path):
    mini_internvl_general(tmp_path / "general")
    made, rows = make("mini_internvl_general", tmp_path / "general")
    assert made.held_out == 1
    named = [image for row in rows for image in row["images"]]
    assert named[:2] == ["data/ai2d/abc_images/0.png", "data/chartqa/train/png/1.png"]
    assert {"data/sam/images/sa_6.jpg", "data/coco/train2017/5.jpg"} < set(named)
    assert [row["id"] for row in rows if not row["images"]] == ["talk_1"]


@pytest.mark.parametrize("name", sorted(set(MEDICAL) - {"gmai_mmbench"}))
def test_broken_image_is_named(name, tmp_path):
    rows = MINIATURES[name](tmp_path / name)
    image = make(name, tmp_path / name)[1][0]["images"][0]
    path = tmp_path / name / image
    for spoil in (lambda: path.write_bytes(b"no image"), path.unlink):
        spoil()
        made, _ = make(name, tmp_path / name)
        assert made.rows == rows - 1 and len(made.unused) == 1 and image in made.unused[0]


def test_broken_rows_and_files_are_named(tmp_path):
    gmai_mmbench(tmp_path / "gmai")
    table = tmp_path / "gmai/GMAI_mm_bench_VAL.tsv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("iVBOR", "!VBOR")  # invalid base64
    lines[2] = lines[2].replace("/9j/", "AAAA")  # invalid image
    lines[3] = lines[3].replace("\tE\tScar\t", "\tF\tScar\t")  # not among the choices
    save_text(table, "\n".join([*lines, "8\tcut"]) + "\n")
    made, rows = make("gmai_mmbench", tmp_path / "gmai")
    assert [row["id"] for row in rows] == ["7"] and [line.split(": ")[0] for line in made.unused] == [
        f"{table}, row {n}" for n in (0, 1, 2, 4)
    ]
    omnimedvqa(tmp_path / "omnimedvqa")
    folder = tmp_path / "omnimedvqa/OmniMedVQA/QA_information/Open-access"
    save_text(folder / "Bone.json", '[{"question": ')
    save_json(folder / "Wrong.json", [{**json.loads((folder / "ACRIMA.json").read_text())[0], "gt_answer": "Myopia"}])
    made, _ = make("omnimedvqa", tmp_path / "omnimedvqa")
    assert made.rows == 2 and len(made.unused) == 2
    assert "Bone.json" in made.unused[0] and "the answer 'Myopia'" in made.unused[1]
    open_i(tmp_path / "open_i")
    reports = tmp_path / "open_i/indiana_reports.csv"
    save_text(reports, reports.read_text().replace('"Mild XXXX.\nNo effusion."', ""))
    made, _ = make("open_i", tmp_path / "open_i")
    assert made.rows == 2 and len(made.unused) == 3


def test_long_image_field_in_table_is_read(tmp_path):
    gmai_mmbench(tmp_path / "gmai")
    table = tmp_path / "gmai/GMAI_mm_bench_VAL.tsv"
    header, first, *_ = table.read_text().splitlines()
    index, image, rest = first.split("\t", 2)
    image = image.rstrip("=") + "A" * (-len(image.rstrip("=")) % 4) + "A" * 200_000
    save_text(table, f"{header}\n{index}\t{image}\t{rest}\n")
    assert make("gmai_mmbench", tmp_path / "gmai")[0].rows == 1
