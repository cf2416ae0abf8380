"""A run with a damaged checkpoint resumes exactly, resumes from an earlier checkpoint, or names the file."""

import random
import shutil

import pytest
from fuzzing import alter_file, check_outcomes, damage, limits, outcome
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
    else:
        alter_file(rng, path)


def resumed(folder, options, checkpoint):
    trainer = make_trainer(folder, **options, save_strategy="no")
    trainer.train(resume_from_checkpoint=checkpoint)
    return summary(trainer)


def test_damaged_checkpoint_is_named_or_skipped(run, tmp_path):
    sound, options, whole = run
    results = []
    with limits():
        for number in range(12):
            folder = tmp_path / "damaged"
            shutil.copytree(sound, folder)
            alter(random.Random(number), folder / "checkpoint-2")
            is_named = number % 3 == 0
            checkpoint = str(folder / "checkpoint-2") if is_named else True
            found = outcome(lambda: resumed(folder, options, checkpoint), f"{folder / 'checkpoint-2'}")  # noqa: B023
            assert isinstance(found, ValueError) or found == whole
            results.append(found)
            shutil.rmtree(folder)
    check_outcomes(results, 2)


def test_damaged_checkpoint_without_record_is_named(run, tmp_path):
    sound, options, _ = run
    results = []
    with limits():
        for number in range(10):
            folder = tmp_path / "damaged"
            shutil.copytree(sound, folder)
            checkpoint = folder / "checkpoint-2"
            (checkpoint / RECORD_NAME).unlink()
            rng = random.Random(number)
            path = rng.choice(files_of(checkpoint))
            path.write_bytes(damage(rng, path.read_bytes()))
            names = str(checkpoint), "is not finite"
            action = lambda: resumed(folder, options, str(checkpoint))  # noqa: B023, E731 called at once
            results.append(outcome(action, *names, kinds=(ValueError, RunStopped)))
            shutil.rmtree(folder)
    check_outcomes(results, 1)
