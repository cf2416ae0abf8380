"""Benchmarks as they are downloaded, read to documents."""

import json
from pathlib import Path

import pytest
from benchmark_folders import write_benchmarks

from modeling_vitp.recipes.benchmarks.lmms_eval import benchmarks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def read(root: Path, folder: str, name: str, **options) -> list[dict]:
    documents = getattr(benchmarks, name)(root / folder, **options)
    assert all(Path(image).is_file() for one in documents for image in one["images"])
    assert all(set(one) == {"id", "images", "question", "answers", "type"} for one in documents)
    return documents


def test_vrsbench(root):
    vqa, referring, captions = (
        read(root, "VRSBench", "vrsbench", annotations=f"VRSBench_EVAL_{kind}.json")
        for kind in ("vqa", "referring", "Cap")
    )
    assert vqa[1] == {
        "id": "1",
        "images": [str(root / "VRSBench/Images_val/P0001_0001.png")],
        "question": "How many ships?",
        "answers": ["2"],
        "type": "object quantity",
    }
    assert referring[2]["answers"] == ["<box>[[200, 50, 600, 600]]</box>"]
    assert captions[3]["answers"] == ["The image shows 3 ships beside a long pier."]


@pytest.mark.parametrize(
    ("folder", "prefix", "images"),
    [
        ("RSVQA_LR", "LR_split_test", "Images_LR"),
        ("RSVQA_HR", "USGS_split_test", "Data"),
        ("RSVQA_HR", "USGS_split_test_phili", "Data"),
    ],
)
def test_rsvqa_has_the_active_questions_with_their_types(root, folder, prefix, images):
    documents = read(root, folder, "rsvqa", prefix=prefix, images=images)
    assert [one["type"] for one in documents] == ["presence", "comp", "count", "rural_urban"] * 2
    assert documents[2]["answers"] == ["between 0 and 10"] and documents[2]["question"] == "How many houses?"
    assert documents[3]["images"] != documents[4]["images"] == documents[7]["images"]


def test_dior_rsvg(root):
    documents = read(root, "DIOR-RSVG", "dior_rsvg")
    expressions = ["Ship 1 of image 1", "Ship 0 of image 2", "Ship 1 of image 3"]
    assert [one["question"] for one in documents] == expressions
    assert documents[0]["answers"] == ["<box>[[100, 200, 600, 700]]</box>"]


def test_levir_cc_has_pairs_with_all_their_sentences(root):
    documents = read(root, "LEVIR-CC", "levir_cc")
    assert len(documents) == 3 and [Path(image).parent.name for image in documents[1]["images"]] == ["A", "B"]
    sentences = [f"1 houses {verb} beside the road ." for verb in ("appear", "are built", "stand")]
    assert documents[1]["answers"] == sentences


def test_medical_benchmarks(root):
    documents = read(root, "PMC-VQA", "pmc_vqa")
    assert documents[1]["question"] == "Which modality is it?\nA. CT\nB. MRI\nC. US\nD. PET"
    assert [one["answers"] for one in documents] == [["A"], ["B"], ["C"]]
    documents = read(root, "OmniMedVQA", "omnimedvqa")
    assert [(one["answers"][0], one["type"]) for one in documents] == [
        ("A", "CT"),
        ("B", "CT"),
        ("A", "Dermoscopy"),
        ("B", "Dermoscopy"),
    ]
    assert documents[0]["question"] == "Is it healthy?\nA. No\nB. Yes"
    assert documents[3]["question"] == "Is it healthy?\nA. No\nB. Yes\nC. Lung\nD. Skin"


def test_omnimedvqa_answers_that_begin_like_a_letter(tmp_path):
    options = {"option_A": "C. albicans", "option_B": "E. coli", "option_C": "S. aureus"}
    entry = {"question_id": "1", "question": "Which?", "gt_answer": "C. albicans", "image_path": "1.png"}
    (tmp_path / "one.json").write_text(json.dumps([entry | options]))
    (one,) = benchmarks.omnimedvqa(tmp_path, annotations=".")
    assert one["answers"] == ["A"]
