"""Full disks, and the lock of an output folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import locked_elsewhere
from pushed_runs import train
from safetensors import SafetensorError
from tiny_models import FROM_SCRATCH
from training_run import make_trainer, summary

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.pretraining.trainer import ViTPTrainer
from modeling_vitp.training import checkpointing
from modeling_vitp.training.checkpointing import (
    FolderLock,
    check_free,
    delete_old_checkpoints,
    last_checkpoint,
    stop_on_full_disk,
)


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of some kilobytes at a folder of the test."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)  # lazy, because files may still be mapped


def checkpoint_kilobytes(folder) -> int:
    make_trainer(folder, max_steps=1, save_steps=1, eval_strategy="no").train()
    total = sum(path.stat().st_size for path in (folder / "checkpoint-1").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return total // 1024


@pytest.mark.parametrize(
    "checked",
    [pytest.param(True, id="checked before", marks=pytest.mark.slow), pytest.param(False, id="error while writing")],
)
def test_run_resumes_after_full_disk(tmp_path, small_disk, monkeypatch, checked):
    needed = checkpoint_kilobytes(tmp_path / "measured")
    if not checked:
        monkeypatch.setattr(checkpointing, "check_disk_space", lambda *_: None)
        monkeypatch.setattr("modeling_vitp.training.base_trainer.check_disk_space", lambda *_: None)
    options = {"save_steps": 1, "save_total_limit": None, "max_steps": 4, "eval_strategy": "no"}
    out = small_disk(2 * needed + 1200) / "out"
    with pytest.raises(RunStopped, match=r"The disk of .*out is full"):
        make_trainer(out, **options).train()
    last = last_checkpoint(out)
    assert last and all((path / "checkpoint.json").is_file() for path in out.glob("checkpoint-*"))
    moved = tmp_path / "moved"
    shutil.copytree(last, moved / last.rsplit("/", 1)[1])
    summaries = []
    for folder in (moved, tmp_path / "whole"):
        trainer = make_trainer(folder, **options)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        summaries.append(summary(trainer))
    assert summaries[0] == summaries[1]


def test_failed_write_names_the_folder(tmp_path):
    for error in (
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ):
        with pytest.raises(RunStopped, match=str(tmp_path)):
            with stop_on_full_disk(tmp_path):
                raise error


def test_disk_too_small_for_model_is_refused(tmp_path, small_disk):
    out = small_disk(900) / "out"
    trainer = make_trainer(out)
    with pytest.raises(RunStopped, match="0.9 MB are free"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert summary(trainer)["log"] == []


HOLD = """
import sys
from modeling_vitp.training.checkpointing import FolderLock
lock = FolderLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
input()
"""


@pytest.mark.slow
def test_second_run_in_same_folder_is_refused(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr("modeling_vitp.command.locks.LOCK_TIMEOUT", 0)
    out, settings = tmp_path / "out", {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder)}
    command, pipes = [sys.executable, "-c", HOLD, str(out)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        for start in (make_trainer(out).train, lambda: train(tmp_path, **settings)):
            with pytest.raises(RunStopped, match=str(out)):
                start()
        assert [path.name for path in out.iterdir()] == [".run.lock"]
        monkeypatch.setenv("RANK", "1")
        check_free(out)
        monkeypatch.delenv("RANK")
        other.kill()
    check_free(out)
    make_trainer(out, max_steps=1, save_strategy="no").train()


def test_lock_is_shared_within_a_process(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    second.acquire()
    check_free(tmp_path)
    assert first.is_held and second.is_held
    second.release()
    assert not first.is_held
    with locked_elsewhere(tmp_path), pytest.raises(RunStopped):
        first.acquire(timeout=0)
    first.acquire(timeout=0)
    first.release()


@pytest.mark.slow
def test_crashed_run_keeps_record_of_finished_run(data_folder, tmp_path, monkeypatch):
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder), "max_steps": 1}
    assert train(tmp_path, **settings) == 0
    files = [tmp_path / "out" / name for name in ("run.json", "metrics.json", "README.md")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match="seed was 42 and is 7"):
        train(tmp_path, **settings, seed=7)
    assert [file.read_bytes() for file in files] == before

    with monkeypatch.context() as patch:
        patch.setattr(ViTPTrainer, "training_step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, **settings | {"max_steps": 2}, max_grad_norm=0.5)
    assert [file.read_bytes() for file in files] == before
    check_free(tmp_path / "out")

    assert train(tmp_path, **settings | {"max_steps": 2}, max_grad_norm=0.5) == 0
    assert json.loads(files[0].read_text())["settings"]["max_grad_norm"] == 0.5
    assert not (tmp_path / "out" / "_running").exists()


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "best", "kept"),
    [
        ((4, 8, 12), 12, 2, None, {8, 12}),
        ((4, 8, 12), 12, 2, 4, {4, 12}),
        ((4, 8, 12), 12, 1, 4, {4, 12}),
        ((4, 6, 8, 12), 6, 2, None, {4, 6}),
        ((4, 8, 12), 12, None, None, {4, 8, 12}),
    ],
)
def test_checkpoints_are_deleted_by_step(tmp_path, monkeypatch, steps, newest, limit, best, kept):
    monkeypatch.chdir(tmp_path)
    folder = {step: Path(f"checkpoint-{step}") for step in steps}
    for step, path in folder.items():
        path.mkdir()
        os.utime(path, (1e9, 2e9 - 1e6 * step))  # the clock was ahead and was set back
    delete_old_checkpoints(folder[newest], limit, best and f"/before/it/was/moved/{folder[best]}")
    assert {step for step, path in folder.items() if path.exists()} == kept
