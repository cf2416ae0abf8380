"""A scheduler's notice, or Ctrl-C, costs no more than the step that it comes in."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from launching import launch
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import Send, make_trainer, run
from transformers import TrainerCallback

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.training.callbacks import outlive_signals
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.vitp_trainer import ViTPTrainer


def stopped(folder, number: int, step: int, **options) -> RunStopped:
    trainer = make_trainer(folder, **options)
    trainer.add_callback(Send(number, step))
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    return stop.value


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))])
def test_a_run_that_is_stopped_and_goes_on_ends_as_the_run_that_never_stopped(tmp_path, step, monkeypatch, capfd):
    """An evaluation is due at the third step."""
    monkeypatch.setattr(sys, "argv", ["vitp pretrain", "--config", "a b.yaml", "--hub_token", "hf_secret"])
    whole = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    stop = stopped(tmp_path / "run", signal.SIGTERM, step)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.status == 143 and "hf_secret" not in str(stop)
    assert f"stopped by SIGTERM: checkpoint-{step} of 8 steps" in str(stop)
    assert str(stop).endswith("Go on with: vitp pretrain --config 'a b.yaml'")
    assert "SIGTERM: saving at the end of this step." in capfd.readouterr().err
    assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{step}")
    assert run(tmp_path / "run") == whole


class SendToAll(TrainerCallback):
    """Lets another process send a signal to this one and to all that it has started, as `timeout` and Slurm do."""

    def __init__(self, number: int):
        self.number, self.workers = number, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.workers = [process.pid for process in multiprocessing.active_children()]
            pids = [*self.workers, os.getpid()]
            subprocess.run(["kill", f"-{self.number}", *map(str, pids)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_step(interruptible, tmp_path, number, persistent):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent, "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, save_on_signal=["SIGTERM", "SIGINT"], **options)
    send = SendToAll(number)
    trainer.add_callback(send)
    with pytest.raises(RunStopped, match="checkpoint-2 of 8 steps"):
        trainer.train()
    assert len(send.workers) >= 2
    # They end with the loader, and by the signal of the process that trains.
    deadline = time.monotonic() + 20
    while any(process.pid in send.workers for process in multiprocessing.active_children()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_ever(names: list[str], ready) -> None:
    outlive_signals(names, lambda worker_id: ready.put(worker_id), 7)
    time.sleep(600)


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))]
)
def test_a_worker_is_ended_by_the_process_that_trains_and_by_no_other(method):
    context = multiprocessing.get_context(method)
    ready = context.SimpleQueue()
    worker = context.Process(target=wait_for_ever, args=(["SIGTERM", "SIGINT"], ready), daemon=True)
    worker.start()
    assert ready.get() == 7
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.fixture
def interruptible():
    """As in a shell's foreground; what a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_when_asked_and_twice_stops_at_once(interruptible, tmp_path):
    assert stopped(tmp_path / "once", signal.SIGINT, 1, save_on_signal=["SIGINT"]).status == 130
    assert last_checkpoint(tmp_path / "once")
    for name, options, times in [("twice", {"save_on_signal": ["SIGINT"]}, 2), ("not asked", {}, 1)]:
        trainer = make_trainer(tmp_path / name, **options)
        trainer.add_callback(Send(signal.SIGINT, 1, times))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert last_checkpoint(tmp_path / name) is None


def test_an_unfinished_run_is_not_exported(data_folder, tmp_path, monkeypatch):
    """Neither by our signal nor by transformers' own just-in-time checkpoint."""
    training_step = ViTPTrainer.training_step

    def notified(trainer, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(ViTPTrainer, "training_step", notified)
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder), "max_steps": 3}
    for name, more in [("ours", {}), ("theirs", {"enable_jit_checkpoint": True, "save_on_signal": ["none"]})]:
        (tmp_path / name).mkdir()
        with pytest.raises(RunStopped, match="checkpoint-1 of 3 steps"):
            train(tmp_path / name, **settings, **more)
        out = tmp_path / name / "out"
        assert last_checkpoint(out) and not (out / "model.safetensors").exists() and not (out / "backbone").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SIGTERM and SIGINT, or none; not SIGHUP"):
        make_trainer(tmp_path, save_on_signal=["SIGHUP"])


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_though_one_is_told(tmp_path):
    def start(folder, **options):
        command = (2, tmp_path / "output.txt", "training_run.py", str(tmp_path / folder))
        return launch(*command, json.dumps({"max_steps": 4, "save_steps": 4, **options})).wait(timeout=600)

    assert start("run", tell=[1, 2]) != 0
    assert "stopped by SIGTERM: checkpoint-2 of 4 steps" in (tmp_path / "output.txt").read_text()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    assert start("run") == start("whole") == 0
    run, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    assert run == whole
