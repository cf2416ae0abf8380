"""Interrupted runs on views that are drawn while training."""

import json
import shutil

import pytest
from annotated_images import NAMES, write_coco
from training_run import kill_at_random_moments, make_trainer, summary

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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return a folder of labels and of a run that was stopped after its first of two steps, and the whole run."""
    folder = tmp_path_factory.mktemp("stopped")
    write_coco_folder(folder / "labels")
    options = {**RUN, "annotations": (str(folder / "labels"), OPTIONS), "save_total_limit": 2}
    whole = make_trainer(folder / "run", **options)
    whole.train()
    shutil.rmtree(folder / "run" / "checkpoint-2")
    return folder, whole


def test_stopped_run_resumes_exactly(stopped, tmp_path):
    folder, whole = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    resumed = make_trainer(tmp_path / "run", annotations=(str(folder / "labels"), OPTIONS), **RUN)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))
    assert summary(resumed) == summary(whole)
    assert resumed.state.global_step == 2


@pytest.mark.slow
def test_run_killed_at_any_moment_is_exact(tmp_path, labels):
    # Logged every 3 steps: the last step is one of them, because a run that is killed after its last checkpoint has no
    # rest to log when it is resumed.
    kill_at_random_moments(tmp_path, **{**RUN, "annotations": (labels, OPTIONS), "save_steps": 1, "max_steps": 21})


@pytest.mark.parametrize("changed", [{"mosaics": 0.4}, {"scale": [0.8, 1.3]}, {"kinds": ["map"]}], ids=str)
def test_changed_options_are_refused(stopped, changed):
    (name,), (folder, _) = changed, stopped
    trainer = make_trainer(folder / "run", annotations=(str(folder / "labels"), OPTIONS | changed), **RUN)
    with pytest.raises(ValueError, match=f"sample_transform.*{name}"):
        trainer.train(resume_from_checkpoint=True)


def test_changed_label_is_refused(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "copy")
    path = tmp_path / "copy" / "labels" / "annotations" / "instances_train2017.json"
    contents = json.loads(path.read_text())
    contents["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(contents))
    trainer = make_trainer(tmp_path / "copy" / "run", annotations=(str(tmp_path / "copy" / "labels"), OPTIONS), **RUN)
    with pytest.raises(ValueError, match="'rows' changed"):
        trainer.train(resume_from_checkpoint=True)
