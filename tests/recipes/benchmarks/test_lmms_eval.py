"""The model and the tasks in lmms-eval, through its own command, against `vitp evaluate_vlm` on the same questions."""

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
from modeling_vitp.evaluation.arguments import VLMArguments
from modeling_vitp.evaluation.vlm import evaluate_vlm
from modeling_vitp.training.from_scratch import build_model, build_tokenizer

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
STEPS = 80


def test_the_folder_of_the_tasks_is_printed_and_has_them_all():
    program = [sys.executable, "-m", "modeling_vitp.recipes.benchmarks.lmms_eval"]
    printed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    groups = {"vitp_remote_sensing", "vitp_medical"}
    assert {path.stem for path in Path(printed.strip()).glob("*.yaml")} == {*KINDS, *groups}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the benchmarks, the same as rows, and a model that has learned most of their answers."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("the extra lmms_eval is not installed")
    from lmms_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lmms_eval")
    write_benchmarks(folder / "benchmarks")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name="vitp")
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
    return folder


def learn(lines: list[dict], folder: Path) -> None:
    """Trains a tiny model on rows, not to the end, so that some answers are right, and some only by the image."""
    from modeling_vitp.instructions.row_reader import RowReader

    tokenizer = build_tokenizer([f"{line['question']} {line['answer']}" for line in lines], vocab_size=500)
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 1})
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


def run_lmms_eval(place: Path, tasks: str, *options: str, model: str = "") -> dict[str, dict[str, float]]:
    """Scores by task, as its command writes them."""
    out = place / f"out_{len(list(place.iterdir()))}"
    words = ["--model", "vitp", "--model_args", f"pretrained={place / 'model'}{model}", "--tasks", tasks]
    words += ["--include_path", str(TASKS), "--output_path", str(out), "--batch_size", "4", *options]
    environment = {**os.environ, "VITP_BENCHMARKS": str(place / "benchmarks"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words], cwd=place, env=environment, capture_output=True, text=True
    )
    written = list(out.rglob("*_results.json"))
    assert len(written) == 1, done.stdout[-5000:] + done.stderr[-5000:]
    found = json.loads(written[0].read_text())["results"]
    return {
        task: {key.partition(",")[0]: value for key, value in scores.items() if key.endswith(",none")}
        for task, scores in found.items()
    }


@pytest.mark.slow
def test_lmms_eval_scores_every_task_as_evaluate_vlm_does_with_own_and_with_other_images(place):
    own = run_lmms_eval(place, "vitp_remote_sensing,vitp_medical", "--verbosity", "ERROR")
    other = run_lmms_eval(place, ",".join(KINDS), model=",swap_images=True")
    gains = {}
    for task, kind in KINDS.items():
        options = {"dataset_name": str(place / f"{task}.jsonl"), "split": "train", "kind": kind, "pictures": 0}
        args = VLMArguments(models=[str(place / "model")], output_dir=str(place / "vlm"), batch_size=3, **options)
        scores = evaluate_vlm(args)["models"][0]["scores"][kind]
        for name, values in scores.items():
            assert own[task][name] == pytest.approx(values["own"]), (task, name)
            assert other[task][name] == pytest.approx(values["other_images"]), (task, name)
            gains[task, name] = values["own"], values["other_images"]
    # The equality above would mean nothing of a model that is always wrong, or that does not look.
    assert sum(own > 0 for own, _ in gains.values()) > len(gains) / 2
    assert sum(own != other for own, other in gains.values()) > 5


@pytest.mark.slow
def test_an_answer_ends_where_its_task_says_and_sampling_is_left_to_tasks_that_sample(place, monkeypatch):
    from lmms_eval.api.instance import Instance

    from modeling_vitp.recipes.benchmarks.lmms_eval import model

    told = []

    def answering(vlm, processor, conversations, images_kwargs, **options):
        told.append((len(conversations), options))
        return ["one. Two\n\nthree"] * len(conversations)

    monkeypatch.setattr(model, "generate_answers", answering)
    vitp = model.ViTP(str(place / "model"), batch_size="2")
    vitp.task_dict["any"] = {"test": ["first", "second", "third"]}
    asked = [{"until": ["\n\n"], "temperature": 0, "do_sample": True}] * 3 + [{"until": ".", "max_new_tokens": 3}]
    asked += [{"do_sample": True, "temperature": 0.5, "until": []}]

    def messages(text):
        return [{"role": "user", "content": [{"type": "text", "text": text}]}]

    requests = [
        Instance(
            "generate_until",
            ("", messages, options, place, "any", "test"),
            0,
            {"task": "any", "doc_id": 0, "repeats": 1},
        )
        for place, options in zip((0, 1, 2, 0, 0), asked)
    ]
    assert vitp.generate_until(requests) == ["one. Two"] * 3 + ["one", "one. Two\n\nthree"]
    most = {"max_new_tokens": 1024}
    assert told == [
        (2, most),
        (1, most),
        (1, {"max_new_tokens": 3}),
        (1, most | {"do_sample": True, "temperature": 0.5}),
    ]
    requests[0].arguments = (
        "",
        lambda text: [{"role": "user", "content": [{"type": "video", "url": text}]}],
        *requests[0].args[2:],
    )
    with pytest.raises(ValueError, match="vitp takes images, and the task shows it video"):
        vitp.generate_until(requests[:1])
