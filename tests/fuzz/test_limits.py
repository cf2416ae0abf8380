"""Limits of the fuzzer on time, memory and errors."""

import gc

import fuzzing
import numpy as np
import pytest


def test_hanging_input_fails(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    with pytest.raises(AssertionError, match="an input took more than 1 s"), fuzzing.limits():
        fuzzing.outcome(lambda: all(number == 0 for number in iter(int, 1)), "")


def test_freed_memory_does_not_hide_growth(monkeypatch):
    monkeypatch.setattr(fuzzing, "BYTES", 32 << 20)
    gc.disable()
    try:
        holder = {"pixels": np.ones(48 << 20, np.uint8)}
        holder["itself"] = holder
        del holder
        with pytest.raises(AssertionError, match="MiB were taken"), fuzzing.limits():
            fuzzing.outcome(lambda: (gc.collect(), np.ones(64 << 20, np.uint8).sum()), "")
    finally:
        gc.enable()


def test_wrong_or_unnamed_error_fails():
    with fuzzing.limits():
        assert isinstance(fuzzing.outcome(lambda: int("x"), "'x'"), ValueError)
        with pytest.raises(AssertionError, match="names none of"):
            fuzzing.outcome(lambda: int("x"), "a.json")
        with pytest.raises(AssertionError, match="UnicodeDecodeError"):
            fuzzing.outcome(lambda: b"\xff".decode(), "")
        with pytest.raises(KeyError):
            fuzzing.outcome(lambda: {}["x"], "")
