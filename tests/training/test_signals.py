"""A scheduler's notice, or Ctrl-C, costs no more than the step that it comes in."""

import json
import os
import signal
import sys

import pytest
from launching import launch
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import Send, make_trainer, run

from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.pretraining import ViTPTrainer
from modeling_vitp.training.stops import RunStopped


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
