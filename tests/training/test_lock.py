"""One run writes to a folder at a time, and the record of a finished run is not that of another."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import make_trainer

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.training import checkpointing as module
from modeling_vitp.training.checkpointing import LOCK, FolderLock, check_free, this_process
from modeling_vitp.training.vitp_trainer import ViTPTrainer


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def hold(folder, **changes) -> None:
    (folder / LOCK).write_text(json.dumps(this_process() | changes))


def test_a_second_run_is_refused_with_the_process_of_the_first(tmp_path, other, data_folder):
    trainer = make_trainer(tmp_path / "out")
    hold(tmp_path / "out", pid=other.pid, started=module.started(other.pid))
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder)}
    for start in (trainer.train, lambda: train(tmp_path, **settings)):
        with pytest.raises(RunStopped, match=f"process {other.pid} on {socket.gethostname()}, since 2.* Give another"):
            start()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    other.kill()
    time.sleep(0.5)  # dead, though nobody has waited for it
    make_trainer(tmp_path / "out", max_steps=1, save_strategy="no").train()
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"started": "1"}, {"host": "elsewhere"}],
    ids=["dead", "another process of that number", "silent elsewhere"],
)
def test_a_lock_that_is_stale_is_passed_over(tmp_path, changes):
    hold(tmp_path, **changes)
    os.utime(tmp_path / LOCK, (time.time() - 3600,) * 2)
    check_free(tmp_path)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_machine_that_is_touched_holds(tmp_path, monkeypatch):
    hold(tmp_path, host="elsewhere")
    with pytest.raises(RunStopped, match="on elsewhere"):
        FolderLock(tmp_path).acquire()
    monkeypatch.setenv("RANK", "1")
    check_free(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"pid": 1}'])
def test_a_lock_that_was_not_written_to_its_end_is_none(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    FolderLock(tmp_path).acquire()


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOUCHED_EVERY", 0.01)
    lock = FolderLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    time.sleep(0.5)
    assert (tmp_path / LOCK).stat().st_mtime > 1
    lock.release()


def test_a_refused_or_crashed_run_leaves_the_record_of_the_finished_one(data_folder, tmp_path, monkeypatch):
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
            train(tmp_path, **settings | {"max_steps": 2}, learning_rate=0.5)
    assert [file.read_bytes() for file in files] == before
    assert not (tmp_path / "out" / LOCK).exists()

    assert train(tmp_path, **settings | {"max_steps": 2}, learning_rate=0.5) == 0
    assert json.loads(files[0].read_text())["settings"]["learning_rate"] == 0.5
    assert not (tmp_path / "out" / "_running").exists()
