"""Pictures of a run while it trains: they change nothing of it, and reach what it reports to."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from paths import HELPERS
from PIL import Image
from torch import nn
from training_run import make_trainer, summary
from transformers import TrainerCallback

from modeling_vitp.images.pixels import colors_of, principal_scores
from modeling_vitp.training.callbacks import TAG, Watcher, choose, component_colors
from modeling_vitp.training.checkpointing import last_checkpoint

EVERY_STEP = {"eval_steps": 1, "save_steps": 2, "max_steps": 4, "logging_steps": 1}


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def images_in(folder: Path) -> list[tuple[int, np.ndarray]]:
    """Steps and images of all event files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    found = []
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={IMAGES: 0}).Reload()
        if TAG in events.Tags()["images"]:
            read = [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(TAG)]
            found += [(step, np.asarray(image)) for step, image in read]
    return sorted(found, key=lambda one: one[0])


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory):
    """A run that is watched, stopped between its checkpoints and gone on with; and its picture of step 3 before."""
    folder = tmp_path_factory.mktemp("watched")
    options = {**EVERY_STEP, "watch_samples": 2, "report_to": "tensorboard"}
    first = make_trainer(folder, **options)
    first.add_callback(StopAfter(3))
    with contextlib.suppress(Stopped):
        first.train()
    before = (folder / "watch" / "step-000003.png").stat().st_mtime_ns
    second = make_trainer(folder, **options)
    second.train(resume_from_checkpoint=last_checkpoint(folder))
    return folder, second, before


def test_a_run_that_is_watched_and_stopped_ends_to_the_bit_as_one_that_is_not(stopped_and_resumed, tmp_path):
    plain = make_trainer(tmp_path, **EVERY_STEP)
    plain.train()
    assert summary(stopped_and_resumed[1]) == summary(plain)
    assert not (tmp_path / "watch").exists()


def test_every_step_has_one_picture_and_tensorboard_the_same_also_where_a_run_goes_on(stopped_and_resumed):
    folder, _, before = stopped_and_resumed
    pictures = sorted((folder / "watch").glob("*.png"))
    assert [path.name for path in pictures] == [f"step-{step:06d}.png" for step in range(5)]
    assert pictures[3].stat().st_mtime_ns == before
    sent = images_in(folder)
    assert [step for step, _ in sent] == [0, 1, 2, 3, 4]
    for (_, image), path in zip(sent, pictures):
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_a_run_from_the_start_does_away_with_the_pictures_of_the_one_before(tmp_path):
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "step-000007.png").touch()
    watcher = watcher_of(tmp_path)
    watcher.on_train_begin(watcher.trainer.args, SimpleNamespace(global_step=0), None)
    assert [path.name for path in (tmp_path / "watch").iterdir()] == ["step-000000.png"]


def watcher_of(folder, draw=lambda samples, path: Image.new("RGB", (3, 2)).save(path, "PNG"), **options) -> Watcher:
    """Of a trainer that draws nothing of a model, or fails to."""
    settings = {"output_dir": str(folder), "device": torch.device("cpu"), "eval_strategy": "steps", **options}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**settings),
        accelerator=SimpleNamespace(distributed_type=options.get("distributed_type", DistributedType.NO)),
        model=nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval()),
        callback_handler=SimpleNamespace(callbacks=[]),
        watched_samples=lambda number: list(range(number)),
        draw_samples=draw,
    )
    return Watcher(trainer, 2)


def test_a_picture_that_fails_is_one_warning_and_leaves_modes_and_random_states(tmp_path, caplog):
    def draw(samples, path):
        assert not any(module.training for module in watcher.trainer.model)
        torch.rand(3), np.random.rand(3)
        raise RuntimeError("no ink\nTraceback …")

    watcher = watcher_of(tmp_path, draw)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with caplog.at_level(logging.WARNING):
        watcher.on_evaluate(watcher.trainer.args, SimpleNamespace(global_step=5), None)
    (record,) = caplog.records
    assert record.message.startswith("The picture of step 5 failed: RuntimeError: no ink")
    assert "\n" not in record.message
    assert not list((tmp_path / "watch").glob("*.png"))
    assert [module.training for module in watcher.trainer.model] == [True, False]
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


@pytest.mark.parametrize(("strategy", "steps"), [("no", [2]), ("steps", [])])
def test_without_an_evaluation_there_is_a_picture_at_each_checkpoint(tmp_path, strategy, steps):
    watcher = watcher_of(tmp_path, eval_strategy=strategy)
    watcher.on_save(watcher.trainer.args, SimpleNamespace(global_step=2), None)
    assert [path.name for path in tmp_path.rglob("*.png")] == [f"step-{step:06d}.png" for step in steps]


def test_a_model_that_is_sharded_is_not_drawn_and_the_run_says_so_once(tmp_path, caplog):
    watcher = watcher_of(tmp_path, distributed_type=DistributedType.FSDP)
    watcher.on_train_begin(watcher.trainer.args, SimpleNamespace(global_step=0), None)
    watcher.on_evaluate(watcher.trainer.args, SimpleNamespace(global_step=5), None)
    assert [record.message for record in caplog.records] == [
        "watch_samples: no pictures, since no process has the whole of a model that is sharded."
    ]
    assert not list(tmp_path.iterdir())


def test_the_samples_are_those_of_the_seed():
    samples = [chr(97 + index) for index in range(20)]
    chosen = choose(samples, 5, seed=3)
    assert chosen == choose(samples, 5, seed=3) == sorted(chosen) and len(set(chosen)) == 5
    assert chosen != choose(samples, 5, seed=4)
    assert choose(samples, 50, seed=3) == samples


def test_components_keep_their_colors_from_step_to_step(tmp_path):
    features = torch.randn(8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first,) = component_colors([features], tmp_path)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    (again,) = component_colors([torch.einsum("dc,crk->drk", turned, 3 * features)], tmp_path)
    assert np.abs(first.astype(int) - again).max() <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["components.safetensors"]


def test_components_of_every_sample_are_held_against_its_own_and_those_of_a_new_one_are_as_they_are(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(6, 3, 2 + number, generator=generator) for number in range(12)]
    first = component_colors(features[:11], tmp_path)
    turned = component_colors([-one for one in features], tmp_path)
    assert all(np.abs(one.astype(int) - again).max() <= 1 for one, again in zip(first, turned[:11], strict=True))
    assert np.abs(colors_of(principal_scores(-features[11])).astype(int) - turned[11]).max() <= 1


@pytest.mark.slow
def test_trackio_and_wandb_keep_the_same_files(tmp_path):
    """Trained by a process of its own, since both libraries read where they write to when they are imported."""
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
