"""Interrupted runs on views that are drawn while training."""

import json
import random
import shutil
import signal
import time

import pytest
from annotated_images import NAMES, write_coco
from launching import processes
from training_run import make_trainer, run, summary, train

from modeling_vitp.training.checkpointing import last_checkpoint

OPTIONS = {"window": 100, "mosaics": 0.5, "collages": 1, "collage_grid": [2, 7], "collage_size": 112}
RUN = {"dataloader_num_workers": 2, "eval_strategy": "no", "max_length": None, "max_steps": 2, "save_steps": 1}


@pytest.fixture
def labels(tmp_path):
    write_coco_folder(tmp_path / "labels")
    return str(tmp_path / "labels")


def write_coco_folder(root):
    root.mkdir()
    write_coco(root, "train", NAMES["train"][:4])


def test_stopped_run_resumes_exactly(tmp_path, labels):
    options = {**RUN, "annotations": (labels, OPTIONS), "save_total_limit": 2}
    whole = make_trainer(tmp_path / "run", **options)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))
    assert summary(resumed) == summary(whole)
    assert resumed.state.global_step == 2


@pytest.mark.slow
def test_run_killed_at_any_moment_is_exact(tmp_path, labels):
    # Logged every 3 steps: the last step is one of them, because a run that is killed after its last checkpoint has no
    # rest to log when it is resumed.
    options = {**RUN, "annotations": (labels, OPTIONS), "save_steps": 1, "max_steps": 21}
    process = processes().Process(target=time.monotonic)  # whose imports do not count as time of a run
    process.start()
    process.join()
    started = time.monotonic()
    whole = run(tmp_path / "whole", **options)
    duration = time.monotonic() - started
    delays, codes = random.Random(0), []
    while len(codes) < 20 or codes.count(-signal.SIGKILL) < 10:
        folder = tmp_path / f"killed-{codes.count(0)}"
        process = processes().Process(target=train, args=(str(folder),), kwargs=options)
        process.start()
        process.join(delays.uniform(0, duration / 3))
        process.kill()
        process.join()
        codes.append(process.exitcode)
    folders = list(tmp_path.glob("killed-*"))
    for folder in folders:
        assert run(folder, **options) == whole
    assert folders and whole["step"] == 21


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    write_coco_folder(folder / "labels")
    trainer = make_trainer(
        folder / "run", annotations=(str(folder / "labels"), OPTIONS), **{**RUN, "max_steps": 1, "save_steps": 1}
    )
    trainer.train()
    return folder


@pytest.mark.parametrize(
    "changed",
    [{"mosaics": 0.4}, {"turn": False}, {"scale": [0.8, 1.3]}, {"turns": 4}, {"kinds": ["map"]}, {"collage_size": 98}],
    ids=str,
)
def test_changed_options_are_refused(stopped, changed):
    (name,) = changed
    trainer = make_trainer(stopped / "run", annotations=(str(stopped / "labels"), OPTIONS | changed), **RUN)
    with pytest.raises(ValueError, match=f"sample_transform.*{name}"):
        trainer.train(resume_from_checkpoint=True)


def test_changed_label_is_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy")
    path = tmp_path / "copy" / "labels" / "annotations" / "instances_train2017.json"
    contents = json.loads(path.read_text())
    contents["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(contents))
    trainer = make_trainer(tmp_path / "copy" / "run", annotations=(str(tmp_path / "copy" / "labels"), OPTIONS), **RUN)
    with pytest.raises(ValueError, match="'rows' changed"):
        trainer.train(resume_from_checkpoint=True)
