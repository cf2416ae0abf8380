"""A full disk is one line, and what was saved before is whole."""

import shutil
import subprocess

import pytest
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import make_trainer, run, summary

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.training import checkpointing as disk
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.results import save_parts


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a number of kilobytes at a folder of this test."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)  # though files in it are still mapped


def checkpoint_kilobytes(folder) -> int:
    make_trainer(folder, max_steps=1, save_steps=1, eval_strategy="no").train()
    total = sum(path.stat().st_size for path in (folder / "checkpoint-1").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return total // 1024


@pytest.mark.parametrize("checked", [True, False], ids=["asked before", "found while writing"])
def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_with_room(tmp_path, small_disk, monkeypatch, checked):
    needed = checkpoint_kilobytes(tmp_path / "measured")
    if not checked:
        monkeypatch.setattr(disk, "check_room", lambda *_: None)
        monkeypatch.setattr("modeling_vitp.training.base_trainer.check_room", lambda *_: None)
    options = {"save_steps": 1, "save_total_limit": None, "max_steps": 4, "eval_strategy": "no"}
    out = small_disk(2 * needed + 1200) / "out"
    with pytest.raises(RunStopped, match=r"The disk of .*out is full: .* Make room .*start again") as stop:
        make_trainer(out, **options).train()
    assert "\n" not in str(stop.value)
    last = last_checkpoint(out)
    assert last and not (out / "_saving").exists()
    moved = tmp_path / "moved"
    shutil.copytree(last, moved / last.rsplit("/", 1)[1])
    assert run(moved, **options) == run(tmp_path / "whole", **options)


def test_a_disk_without_room_for_the_model_is_said_before_the_first_step(tmp_path, small_disk):
    out = small_disk(900) / "out"
    trainer = make_trainer(out)
    with pytest.raises(RunStopped, match="the model takes .* MB, and 0.9 MB are free"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert summary(trainer)["log"] == []


def test_a_disk_with_room_for_the_model_alone_is_warned_of(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, max_steps=1)
    weights = disk.weight_bytes(trainer.model)
    assert weights == sum(weight.numel() for weight in trainer.model.parameters()) * 4
    monkeypatch.setattr(disk, "free_bytes", lambda _: 3 * weights // 2)
    monkeypatch.setattr(disk, "STATE_FILES", 0)
    trainer.args.save_strategy = "steps"
    trainer._check_room()
    assert "a checkpoint takes about" in caplog.text


def test_a_disk_that_is_full_at_the_end_is_one_line(data_folder, tmp_path, monkeypatch):
    def full(trainer):
        save_parts(trainer)
        raise OSError(28, "No space left on device", "backbone")

    monkeypatch.setattr("modeling_vitp.training.results.save_parts", full)
    with pytest.raises(RunStopped, match="is full: .*No space left on device.*backbone"):
        train(tmp_path, from_scratch=FROM_SCRATCH, dataset_name=str(data_folder), max_steps=1)
