"""Tasks of lmms-eval with its InternVL model on a converted checkpoint, compared with `vitp evaluate_vlm`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_folders import write_benchmarks
from paths import ROOT
from tiny_models import TEXT, VISION

from modeling_vitp import ViTPDataCollator
from modeling_vitp.convert.checkpoint import convert_checkpoint
from modeling_vitp.evaluation.arguments import VLMArguments
from modeling_vitp.evaluation.vlm import evaluate_vlm
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.recipes.benchmarks.lmms_eval import benchmarks

KINDS = {
    "vrsbench_vqa": "vqa",
    "vrsbench_grounding": "grounding",
    "vrsbench_caption": "caption",
    "rsvqa_lr": "vqa",
    "rsvqa_hr": "vqa",
    "rsvqa_hr_philadelphia": "vqa",
    "dior_rsvg": "grounding",
    "levir_cc": "caption",
    "pmc_vqa": "choice",
    "omnimedvqa": "choice",
}
TASKS = ROOT / "recipes" / "benchmarks" / "lmms_eval" / "tasks"
STEPS, MAX_PATCHES = 80, 4


@pytest.mark.slow
def test_printed_folder_has_all_tasks():
    program = [sys.executable, "-m", "modeling_vitp.recipes.benchmarks.lmms_eval"]
    printed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    groups = {"vitp_remote_sensing", "vitp_medical"}
    assert {path.stem for path in Path(printed.strip()).glob("*.yaml")} == {*KINDS, *groups}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with benchmarks, the same as rows, a model that has learned most answers, and its conversion."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("the extra lmms_eval is not installed")
    from lmms_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lmms_eval")
    write_benchmarks(folder / "benchmarks")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITP_BENCHMARKS", str(folder / "benchmarks"))
        for name, task in manager.load_task_or_group(list(KINDS), "chat").items():
            rows = [
                {"images": one["images"], "question": task.doc_to_text(one), "answer": answer}
                for one in task.test_docs()
                for answer in one["answers"]
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += rows
    learn(lines, folder / "model")
    convert_checkpoint(folder / "model", folder / "internvl", "internvl", license="apache-2.0")
    return folder


def learn(lines: list[dict], folder: Path) -> None:
    """Train a tiny model on rows, but not to convergence: some answers are right, some only with the image."""
    from modeling_vitp.instructions.schemas import RowReader

    tokenizer = build_tokenizer([f"{line['question']} {line['answer']}" for line in lines], vocab_size=500)
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": MAX_PATCHES})
    read, collator = RowReader.of(dict.fromkeys(lines[0])), ViTPDataCollator(processor)
    rows = [read(line, number) for number, line in enumerate(lines)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:16]
        loss = model(**collator([rows[place] for place in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run_lmms_eval(place: Path, tasks: str) -> dict[str, dict[str, float]]:
    """Run the command of lmms-eval and return the scores by task."""
    args = f"pretrained={place / 'internvl'},device=cpu,device_map=cpu,max_patches={MAX_PATCHES}"
    words = ["--model", "internvl_hf", "--model_args", args, "--tasks", tasks, "--batch_size", "1"]
    words += ["--include_path", str(TASKS), "--output_path", str(place / "out"), "--verbosity", "ERROR"]
    environment = {**os.environ, "VITP_BENCHMARKS": str(place / "benchmarks"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words], cwd=place, env=environment, capture_output=True, text=True
    )
    written = list((place / "out").rglob("*_results.json"))
    assert len(written) == 1, done.stdout[-5000:] + done.stderr[-5000:]
    found = json.loads(written[0].read_text())["results"]
    return {
        task: {key.partition(",")[0]: value for key, value in scores.items() if key.endswith(",none")}
        for task, scores in found.items()
    }


@pytest.mark.slow
def test_converted_model_scores_as_in_evaluate_vlm(place):
    found = run_lmms_eval(place, "vitp_remote_sensing,vitp_medical")
    gains = {}
    for task, kind in KINDS.items():
        options = {"dataset_name": str(place / f"{task}.jsonl"), "split": "train", "kind": kind, "pictures": 0}
        options |= {"batch_size": 3, "bf16": True, "output_dir": str(place / "vlm")}
        scores = evaluate_vlm(VLMArguments(models=[str(place / "model")], **options))["models"][0]["scores"][kind]
        for name, values in scores.items():
            assert found[task][name] == pytest.approx(values["own"]), (task, name)
            gains[task, name] = values["own"], values["other_images"]
    # Equal scores would be meaningless for a model that is always wrong or ignores the image.
    assert sum(own > 0 for own, _ in gains.values()) > len(gains) / 2
    assert sum(own != other for own, other in gains.values()) > 5


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


def test_levir_cc_has_pairs_with_all_sentences(root):
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
