"""Tasks of lmms-eval and its InternVL model on a converted checkpoint, against `vitp evaluate_vlm`."""

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
from modeling_vitp.training.loading import build_model, build_tokenizer

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


def test_printed_folder_has_all_tasks():
    program = [sys.executable, "-m", "modeling_vitp.recipes.benchmarks.lmms_eval"]
    printed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    groups = {"vitp_remote_sensing", "vitp_medical"}
    assert {path.stem for path in Path(printed.strip()).glob("*.yaml")} == {*KINDS, *groups}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the benchmarks, the same as rows, a model that has learned most of their answers, and its copy."""
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
    """Trains a tiny model on rows, not to the end, so that some answers are right, and some only by the image."""
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
    """Scores by task, as its command writes them."""
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
    # The equality above would mean nothing of a model that is always wrong, or that does not look.
    assert sum(own > 0 for own, _ in gains.values()) > len(gains) / 2
    assert sum(own != other for own, other in gains.values()) > 5
