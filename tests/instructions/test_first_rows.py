"""Description of the training data, and the check of its first rows before training."""

import logging
import multiprocessing
import os
import random
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from pictures import picture
from row_formats import FORMATS, write_lines
from sample_rows import turn
from training_run import FEATURES, make_rows, make_trainer

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions import mixture as mixtures
from modeling_vitp.instructions.collator import STEP
from modeling_vitp.instructions.mixture import check_rows, load_mixture, open_mixture
from modeling_vitp.instructions.rows import prepare_rows


@pytest.fixture
def mixture(tmp_path):
    """Write a JSON source whose third row is broken, a source of archives, and a Parquet source."""
    questions = ["Hi", "Hi", "<image>Hi", "Hi"]
    write_lines(
        tmp_path / "a.jsonl", [{"conversations": [turn("human", text), turn("gpt", "Ho")]} for text in questions]
    )
    for name in ("WebDataset", "questions and answers"):
        FORMATS[name][0](tmp_path / name, [picture(56, 56, seed) for seed in range(2)])

    def make(streaming=False):
        rest = {"streaming": True, "rows": 2} if streaming else {}
        sources = [
            {"name": "text", "annotation": "a.jsonl"},
            {"name": "tars", "folder": "WebDataset", "rate": 0.5},
            {"name": "asked", "folder": "questions and answers", **rest},
        ]
        return open_mixture(load_mixture({"root": str(tmp_path), "sources": sources}), seed=0)

    return make


def check_of(processor, dataset, **options):
    on_error = options.pop("on_error", "raise")
    rest = {"on_error": on_error, "replacement_rows": [0]} if on_error == "skip" else {}
    return check_rows(dataset, ViTPDataCollator(processor, **rest), **options)


@pytest.mark.parametrize("in_processes", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_row_is_named_or_counted(mixture, processor, streaming, in_processes):
    with pytest.raises(ValueError, match="Sample 'text/3': it has 0 image"):
        check_of(processor, mixture(streaming), in_processes=in_processes)
    of = "8 rows" if streaming else "all 8 rows"
    line = check_of(processor, mixture(streaming), on_error="skip", in_processes=in_processes)
    assert line.startswith(f"checked: {of} encoded in ") and "; 1 of them are invalid" in line


IN_TURN = ["text/1", "tars/0", "asked/0", "text/2", "tars/1", "asked/1", "text/3", "text/4"]


def test_sources_are_checked_in_turn(mixture):
    assert [row["id"] for row in mixtures.in_turn(mixture())] == IN_TURN


class Unusable:
    """Collator that rejects all rows with an error that names the process."""

    on_error = "skip"

    def encode(self, row):
        raise ValueError(f"{row['id']} in {os.getpid()}")


def test_processes_check_the_same_rows(mixture, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    for most_rows in (None, 5):
        found = [str(error).split(" in ") for error in mixtures.encoded_rows(mixture(), Unusable(), most_rows, True)]
        assert [name for name, _ in found] == IN_TURN[:most_rows]
        processes = {int(process) for _, process in found}
        assert len(processes) == 3 and os.getpid() not in processes
    rows = Dataset.from_dict({"id": list(range(1000)), "messages": [[]] * 1000})
    assert check_rows(rows, Unusable(), seconds=0.0, in_processes=True).startswith("checked: 1 of 1,000 rows encoded")
    assert not multiprocessing.active_children()


class Slow:
    """Collator that advances the clock by one second for each row."""

    on_error = "raise"

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.seen = 0.0, seconds, []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def encode(self, row):
        self.now += self.seconds
        self.seen.append(row["id"])
        return {}


@pytest.mark.parametrize(
    ("seconds", "num_rows", "streaming", "expected"),
    [
        (0.01, 300, False, 300),  # All rows take 3 s.
        (0.05, 1000, False, 200),  # All rows would take 50 s.
        (0.05, 1000, True, 200),  # The number of rows is unknown.
        (1.0, 1000, False, 21),  # 200 rows would take 200 s.
        (1.0, 7, False, 7),
    ],
)
def test_number_of_checked_rows(monkeypatch, seconds, num_rows, streaming, expected):
    rows = Dataset.from_dict({"id": list(range(num_rows)), "messages": [[]] * num_rows})
    slow = Slow(monkeypatch, seconds)
    line = check_rows(rows.to_iterable_dataset() if streaming else rows, slow)
    assert slow.seen == list(range(expected))
    told = f"{expected} rows" if streaming else f"all {expected} rows"
    assert (told if expected == num_rows or streaming else f"{expected} of {num_rows:,} rows") in line


def test_row_that_fits_only_without_some_patches_is_named(tmp_path):
    """The last steps, which see every patch, are the longest."""
    rows = [row for row in make_rows() if row["images"]][:4]
    options = {"patch_drop_ratio": 0.75, "vrl_drop_ratio": 0.0, "max_steps": 4, "eval_strategy": "no"}
    trainer = make_trainer(tmp_path / "run", train_rows=Dataset.from_list(rows, features=FEATURES), **options)
    length = max(len(trainer.eval_data_collator.encode(row)["input_ids"]) for row in rows)
    image_tokens = max(len(trainer.eval_data_collator.encode(row)["pixel_values"]) for row in rows) * 4
    trainer.data_collator.max_length = length - image_tokens // 2
    assert all(trainer.data_collator.encode({**row, STEP: 0}) for row in rows)
    with pytest.raises(ValueError, match="max_length"):
        trainer.train()


def test_check_keeps_random_states(processor):
    def transform(row, generator):
        torch.rand(1), np.random.rand(), random.random()
        return row

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_rows(prepare_rows(make_rows(4)), ViTPDataCollator(processor, sample_transform=transform, vrl_warmup_steps=2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_check_runs_before_output_is_written(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "run", max_steps=1, save_steps=1, eval_strategy="no")
    with caplog.at_level(logging.INFO):
        trainer.train()
        assert caplog.text.count("checked: 4 of 10 rows encoded") == 1
        assert caplog.text.count("eval_dataset checked: all 3 rows encoded") == 1
        make_trainer(tmp_path / "run", max_steps=2, eval_strategy="no").train(resume_from_checkpoint=True)
    assert caplog.text.count("checked: ") == 2

    trainer = make_trainer(tmp_path / "bad", eval_strategy="no")
    broken = make_rows().map(lambda row: {"messages": row["messages"][: 1 if row["id"] == "row-7" else 2]})
    trainer.train_dataset = prepare_rows(broken)
    with pytest.raises(ValueError, match="Sample 'row-7': no assistant message"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("bad/*")} <= {".run.lock"}
