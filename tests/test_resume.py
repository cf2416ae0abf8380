"""Runs that are killed, and go on."""

import shutil
from pathlib import Path

import pytest
from training_run import run

from modeling_vitp.checkpointing import last_checkpoint

STAGES = ["model", "optimizer", "state", "before the rename", "rotation"]
PERSISTENT = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
WORKERS = {"0": {}, "2": {"dataloader_num_workers": 2}, "2 persistent": PERSISTENT}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_run_that_is_killed_again_and_again_ends_as_the_run_that_never_stopped(tmp_path, stream):
    options = {"stream": stream, **(PERSISTENT if stream else {})}
    whole = run(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    left = []
    for kill in [("model", 2), ("optimizer", 2), ("step", 3), ("state", 4), ("before the rename", 6), ("rotation", 8)]:
        run(folder, kill, **options)
        last = last_checkpoint(folder)
        left.append(last and Path(last).name)
    assert left == [None, None, "checkpoint-2", "checkpoint-2", "checkpoint-4", "checkpoint-8"]
    assert run(folder, **options) == whole
    assert whole["step"] == 8
    assert [entry["step"] for entry in whole["log"] if "loss" in entry] == [3, 6]
    assert all(0 < entry["padding_share"] < 1 for entry in whole["log"] if "loss" in entry)


def test_the_end_of_an_epoch_is_a_place_to_stop_as_any_other(tmp_path):
    """Three steps make an epoch; a stream has epochs too, though the trainer cannot know their length."""
    for stream in (False, True):
        options = {"stream": stream, "save_steps": 1, "save_total_limit": 20}
        folder = tmp_path / str(stream)
        whole = run(folder, **options)
        for step in (3, 4, 8):
            for path in folder.glob("checkpoint-*"):
                if int(path.name.removeprefix("checkpoint-")) > step:
                    shutil.rmtree(path)
            assert run(folder, **options) == whole, (stream, step)
