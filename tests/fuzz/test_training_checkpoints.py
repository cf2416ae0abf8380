"""A run with a damaged checkpoint resumes exactly, resumes from an earlier checkpoint, or names the file."""

import json
import random
import shutil

import pytest
from fuzzing import damage, limits, mutate, outcome
from training_run import make_trainer, summary
from transformers.utils import logging

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.training.checkpointing import RECORD_NAME

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
OPTIONS = {"max_steps": 3, "eval_strategy": "no", "logging_steps": 1}
KINDS = {"map": {}, "stream": {"stream": True}, "lora": {"lora": True}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """Return the folder of a run that was stopped after two of three steps, its options, and its final state."""
    options = OPTIONS | KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(folder, **options, save_steps=1, save_total_limit=5)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-3")
    logging.set_verbosity(logging.CRITICAL)
    yield folder, options, summary(trainer)
    logging.set_verbosity(logging.WARNING)


def files_of(checkpoint):
    """Return the files of a folder, except code."""
    return sorted(path for path in checkpoint.iterdir() if path.suffix != ".py")


def alter(rng, checkpoint):
    """Damage one file of a checkpoint: removed, a folder, truncated, empty, garbled, changed, or another file."""
    path = rng.choice(files_of(checkpoint))
    way = rng.random()
    if way < 0.1:
        path.unlink()
        if way < 0.04:
            path.mkdir()
    elif way < 0.25:
        shutil.copy(rng.choice([other for other in files_of(checkpoint) if other != path]), path)
    elif path.suffix == ".json" and way < 0.6:
        path.write_text(json.dumps(mutate(rng, json.loads(path.read_text()), rng.choice([1, 1, 2]))))
    else:
        path.write_bytes(damage(rng, path.read_bytes()))


def resumed(folder, options, checkpoint):
    trainer = make_trainer(folder, **options, save_strategy="no")
    trainer.train(resume_from_checkpoint=checkpoint)
    return summary(trainer)


def test_damaged_checkpoint_is_named_or_skipped(run, tmp_path):
    sound, options, whole = run
    counts = {"error": 0, "right": 0}
    with limits():
        for number in range(12):
            folder = tmp_path / "damaged"
            shutil.copytree(sound, folder)
            alter(random.Random(number), folder / "checkpoint-2")
            is_named = number % 3 == 0
            checkpoint = str(folder / "checkpoint-2") if is_named else True
            found = outcome(lambda: resumed(folder, options, checkpoint), f"{folder / 'checkpoint-2'}")  # noqa: B023
            if isinstance(found, ValueError):
                counts["error"] += 1
            else:
                counts["right"] += 1
                assert found == whole
            shutil.rmtree(folder)
    assert min(counts.values()) > 2, counts


def test_damaged_checkpoint_without_record_is_named(run, tmp_path):
    sound, options, _ = run
    counts = {"error": 0, "right": 0}
    with limits():
        for number in range(8):
            folder = tmp_path / "damaged"
            shutil.copytree(sound, folder)
            checkpoint = folder / "checkpoint-2"
            (checkpoint / RECORD_NAME).unlink()
            rng = random.Random(number)
            path = rng.choice(files_of(checkpoint))
            path.write_bytes(damage(rng, path.read_bytes()))
            found = outcome(
                lambda: resumed(folder, options, str(checkpoint)),  # noqa: B023 called at once
                str(checkpoint),
                "is not finite",
                kinds=(ValueError, RunStopped),
            )
            counts["error" if isinstance(found, Exception) else "right"] += 1
            shutil.rmtree(folder)
    assert min(counts.values()) > 1, counts
