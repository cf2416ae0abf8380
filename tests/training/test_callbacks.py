"""Callbacks: steps that are not finite, signals, and pictures of predictions."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from launching import launch
from paths import HELPERS, ROOT
from PIL import Image
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from torch import nn
from training_run import Send, make_trainer, run, run_ranks, summary
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import ModelConfig

from modeling_vitp.command.errors import RunStopped, TrainingDiverged
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.loading import load_start
from modeling_vitp.pretraining.trainer import ViTPTrainer
from modeling_vitp.training.callbacks import (
    TAG,
    LogPredictionsCallback,
    StopAtNotFinite,
    choose,
    ignore_signals_in_worker,
    next_command,
)
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.command_line import run as run_recipe


def poison(trainer, what: str, step: int) -> list:
    """Make the loss or gradient of a step NaN, and return a list that receives the ids of its rows."""
    compute_loss, seen = trainer.compute_loss, []

    def poisoned(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if model.training and trainer.state.global_step == step - 1:
            seen.extend(trainer._finite.samples)
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    trainer.compute_loss = poisoned
    return seen


@pytest.mark.parametrize(("stream", "what"), [(False, "loss"), (True, "gradient")])
def test_step_not_finite_names_its_samples(tmp_path, stream, what):
    trainer = make_trainer(tmp_path, stream=stream, save_steps=1, eval_strategy="no", logging_steps=1)
    seen = poison(trainer, what, 3)
    with pytest.raises(TrainingDiverged, match="Step 3 is not finite") as stop:
        trainer.train()
    assert seen
    assert all(repr(name) in str(stop.value) for name in seen)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")


def test_diverging_run_exports_nothing(data_folder, tmp_path):
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder)}
    with pytest.raises(RunStopped, match="Step 1 is not finite: weights"):
        train(tmp_path, **settings, learning_rate=1e38, warmup_steps=0, max_steps=1)
    assert not (tmp_path / "out" / "backbone").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "metrics.json").exists() and last_checkpoint(tmp_path / "out") is None


def test_step_skipped_by_scaler_is_ignored(tmp_path):
    trainer = make_trainer(tmp_path)
    finite = StopAtNotFinite(trainer)
    finite.losses, finite.samples = [torch.tensor(1.0), torch.tensor(float("nan"))], ["row-7"]

    def end_step():
        finite.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0)
    end_step()
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 0.5)
    with pytest.raises(RunStopped, match="the loss is nan. .*'row-7'"):
        end_step()


def test_nan_weights_are_refused_as_start(model_and_processor, tmp_path):
    model, processor = model_and_processor
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_start(PretrainArguments("rows"), ModelConfig(str(tmp_path)), [])


def stopped(folder, number: int, step: int, **options) -> RunStopped:
    trainer = make_trainer(folder, **options)
    trainer.add_callback(Send(number, step))
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    return stop.value


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_run_stopped_by_signal_is_exact(tmp_path, step, monkeypatch):
    """The third step has an evaluation."""
    monkeypatch.setattr(sys, "argv", ["vitp pretrain", "--config", "a b.yaml", "--hub_token", "hf_secret"])
    whole = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    stop = stopped(tmp_path / "run", signal.SIGTERM, step)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.status == 143 and "hf_secret" not in str(stop)
    assert f"stopped by SIGTERM: checkpoint-{step} of 8 steps" in str(stop)
    assert str(stop).endswith("vitp pretrain --config 'a b.yaml'")
    assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{step}")
    assert run(tmp_path / "run") == whole


def test_command_that_resumes_is_the_recipe(monkeypatch, capsys):
    """`vitp NAME` runs the file of a recipe, whose path `runpy` sets."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "pretrain.py"), "--config", "quickstart"])
    with pytest.raises(SystemExit):
        run_recipe(lambda: print(next_command(SimpleNamespace(world_size=1))))
    assert capsys.readouterr().out.endswith(": vitp pretrain --config quickstart\n")


def test_closed_terminal_saves(tmp_path):
    """The write to standard error fails, as on a closed terminal."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    reading, writing = os.pipe()
    os.close(reading)
    before = os.dup(1), os.dup(2)
    os.dup2(writing, 2)
    try:
        stop = stopped(tmp_path, signal.SIGHUP, 1)
        os.write(2, b"progress")
    finally:
        for descriptor, copy in enumerate(before, 1):
            os.dup2(copy, descriptor)
        signal.signal(signal.SIGHUP, ignored)
    assert stop.status == 129 and last_checkpoint(tmp_path).endswith("checkpoint-1")


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(tmp_path, max_steps=1, eval_strategy="no")
        trainer.add_callback(Send(signal.SIGHUP, 1))
        trainer.train()
        assert trainer.state.global_step == 1
    finally:
        signal.signal(signal.SIGHUP, before)


class SendToAll(TrainerCallback):
    """Callback that sends a signal to this process and its children from another process, like `timeout` and Slurm."""

    def __init__(self, number: int):
        self.number, self.workers = number, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.workers = [process.pid for process in multiprocessing.active_children()]
            pids = [*self.workers, os.getpid()]
            subprocess.run(["kill", f"-{self.number}", *map(str, pids)], check=True)


@pytest.mark.parametrize(
    ("number", "persistent"), [(signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)]
)
def test_signal_to_the_group_spares_workers(interruptible, tmp_path, number, persistent):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent, "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, save_on_signal=["SIGTERM", "SIGINT"], **options)
    send = SendToAll(number)
    trainer.add_callback(send)
    with pytest.raises(RunStopped, match="checkpoint-2 of 8 steps"):
        trainer.train()
    assert len(send.workers) >= 2
    # The workers end with the loader, by the signal of the training process.
    deadline = time.monotonic() + 20
    while any(process.pid in send.workers for process in multiprocessing.active_children()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_ever(names: list[str], ready) -> None:
    ignore_signals_in_worker(names, lambda worker_id: ready.put(worker_id), 7)
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_worker_is_ended_only_by_its_parent(method):
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
    """Enable SIGINT, which processes in the background of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_ctrl_c_stops_at_once(interruptible, tmp_path):
    assert stopped(tmp_path / "once", signal.SIGINT, 1).status == 130
    assert last_checkpoint(tmp_path / "once")
    for name, options, times in [("twice", {}, 2), ("not asked", {"save_on_signal": ["none"]}, 1)]:
        trainer = make_trainer(tmp_path / name, **options)
        trainer.add_callback(Send(signal.SIGINT, 1, times))
        with pytest.raises(KeyboardInterrupt, match=f"nothing is saved in {tmp_path / name}"):
            trainer.train()
        assert last_checkpoint(tmp_path / name) is None


def test_unfinished_run_is_not_exported(data_folder, tmp_path, monkeypatch):
    training_step, before = ViTPTrainer.training_step, signal.getsignal(signal.SIGTERM)

    def notified(trainer, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(ViTPTrainer, "training_step", notified)
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder), "max_steps": 3}
    with pytest.raises(RunStopped, match="checkpoint-1 of 3 steps"):
        train(tmp_path, **settings)
    out = tmp_path / "out"
    assert last_checkpoint(out) and not (out / "model.safetensors").exists() and not (out / "backbone").exists()
    assert signal.getsignal(signal.SIGTERM) == before


class CountSteps(TrainerCallback, ExportableState):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_resumed_run_restores_other_callbacks(tmp_path):
    options = {"eval_strategy": "no", "save_steps": 1, "max_steps": 3}
    for stop in (2, None):
        trainer, counters = make_trainer(tmp_path, stop_at_step=stop, **options), [CountSteps(), CountSteps()]
        for counter in counters:
            trainer.add_callback(counter)
        with pytest.raises(RunStopped) if stop else contextlib.nullcontext():
            trainer.train_or_resume()
    assert [counter.steps for counter in counters] == [3, 3]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
    options = {"max_steps": 4, "save_steps": 4}
    told = json.dumps({**options, "tell": [1, 2]})
    assert launch(2, tmp_path / "output.txt", "training_run.py", str(tmp_path / "run"), told) != [0, 0]
    assert "stopped by SIGTERM: checkpoint-2 of 4 steps" in (tmp_path / "output.txt").read_text()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    assert run_ranks(2, tmp_path / "run", **options) == run_ranks(2, tmp_path / "whole", **options) == [0, 0]
    run, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    assert run == whole


EVERY_STEP = {"eval_steps": 1, "save_steps": 2, "max_steps": 4, "logging_steps": 1}


class StopAfterThird(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def images_in(folder: Path) -> list[tuple[int, np.ndarray]]:
    """Return steps and images of all event files of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    images = []
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={IMAGES: 0}).Reload()
        for event in events.Images(TAG) if TAG in events.Tags()["images"] else []:
            images.append((event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))))
    return sorted(images, key=lambda image: image[0])


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory):
    """Return the folder and trainer of a resumed run with pictures, and the time of its picture of step 3."""
    folder = tmp_path_factory.mktemp("watched")
    options = {**EVERY_STEP, "watch_samples": 2, "report_to": "tensorboard"}
    first = make_trainer(folder, **options)
    first.add_callback(StopAfterThird())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    before = (folder / "watch" / "step-000003.png").stat().st_mtime_ns
    second = make_trainer(folder, **options)
    second.train(resume_from_checkpoint=last_checkpoint(folder))
    return folder, second, before


def test_pictures_do_not_change_training(stopped_and_resumed, tmp_path):
    plain = make_trainer(tmp_path, **EVERY_STEP)
    plain.train()
    assert summary(stopped_and_resumed[1]) == summary(plain)
    assert not (tmp_path / "watch").exists()


def test_every_step_has_one_picture(stopped_and_resumed):
    folder, _, before = stopped_and_resumed
    pictures = sorted((folder / "watch").glob("*.png"))
    assert [path.name for path in pictures] == [f"step-{step:06d}.png" for step in range(5)]
    assert pictures[3].stat().st_mtime_ns == before
    sent = images_in(folder)
    assert [step for step, _ in sent] == [0, 1, 2, 3, 4]
    for (_, image), path in zip(sent, pictures):
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_pictures_are_drawn_in_the_precision_of_training(tmp_path):
    trainer, precisions = make_trainer(tmp_path, bf16=True), set()
    layer = trainer.model.model.vision_tower.encoder.layer[0].mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: precisions.add(output.dtype))
    trainer.draw_samples(trainer.watched_samples(1), tmp_path / "step.png")
    assert precisions == {torch.bfloat16} and (tmp_path / "step.png").is_file()


def watcher_of(
    folder, draw=lambda samples, path: Image.new("RGB", (3, 2)).save(path, "PNG"), **options
) -> LogPredictionsCallback:
    """Return a callback of a trainer whose `draw_samples` is replaced."""
    settings = {"output_dir": str(folder), "device": torch.device("cpu"), "eval_strategy": "steps", **options}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**settings),
        accelerator=SimpleNamespace(distributed_type=options.get("distributed_type", DistributedType.NO)),
        model=nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval()),
        callback_handler=SimpleNamespace(callbacks=[]),
        watched_samples=lambda number: list(range(number)),
        draw_samples=draw,
    )
    return LogPredictionsCallback(trainer, 2)


def test_failing_picture_changes_no_state(tmp_path, caplog):
    def draw(samples, path):
        assert not any(module.training for module in watcher.trainer.model)
        torch.rand(3), np.random.rand(3)
        raise RuntimeError("no ink")

    watcher = watcher_of(tmp_path, draw)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    watcher.on_evaluate(watcher.trainer.args, SimpleNamespace(global_step=5), None)
    assert "no ink" in caplog.text and not list((tmp_path / "watch").glob("*.png"))
    assert [module.training for module in watcher.trainer.model] == [True, False]
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


def test_sharded_model_is_not_drawn(tmp_path, caplog):
    watcher = watcher_of(tmp_path, distributed_type=DistributedType.FSDP)
    watcher.on_train_begin(watcher.trainer.args, SimpleNamespace(global_step=0), None)
    watcher.on_evaluate(watcher.trainer.args, SimpleNamespace(global_step=5), None)
    assert "watch_samples" in caplog.text and not list(tmp_path.iterdir())


def test_samples_depend_on_the_seed():
    samples = [chr(97 + index) for index in range(20)]
    chosen = choose(samples, 5, seed=3)
    assert chosen == choose(samples, 5, seed=3) == sorted(chosen) and len(set(chosen)) == 5
    assert chosen != choose(samples, 5, seed=4)
    assert choose(samples, 50, seed=3) == samples


@pytest.mark.slow
def test_trackio_and_wandb_log_all_pictures(tmp_path):
    """Training runs in a new process, because both libraries read their folders when they are imported."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_DIR": str(tmp_path)}
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}
    options = {"max_steps": 2, "eval_steps": 2, "watch_samples": 1, "report_to": ["trackio", "wandb"]}
    command = [sys.executable, str(HELPERS / "training_run.py"), str(tmp_path / "run"), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    pictures = sorted(path.read_bytes() for path in (tmp_path / "run" / "watch").glob("*.png"))
    assert len(pictures) == 2
    for folder in ("trackio/media", "wandb"):
        assert sorted(path.read_bytes() for path in (tmp_path / folder).rglob("*.png")) == pictures, folder
