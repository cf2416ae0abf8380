"""Execution of answers: in turn, with position and time limit, and ended when the visitor leaves."""

import asyncio
import importlib.util
import sys
import threading
import time
from types import SimpleNamespace

import computing
import gradio as gr
import limits
import pytest
import torch
from computing import LINE, answering, turn


def steps_of(handler, *arguments):
    async def collect():
        return [step async for step in handler(*arguments)]

    return asyncio.run(collect())


class Endless(torch.nn.Module):
    """Model with an endless forward pass, which counts its layers."""

    def __init__(self):
        super().__init__()
        self.layer, self.count = torch.nn.Identity(), 0

    def forward(self, values):
        while True:
            self.count += 1
            self.layer(values)
            time.sleep(0.01)


@pytest.fixture
def model():
    return Endless()


@pytest.fixture
def run(model):
    @answering
    def run():
        with turn():
            yield "begun"
            model(torch.zeros(1))

    return run


def is_still(model) -> bool:
    time.sleep(0.2)
    before = model.count
    time.sleep(0.2)
    return model.count == before


def test_functions_and_generators_return_their_values():
    assert steps_of(answering(lambda a, b: a + b), 1, 2) == [3]
    assert steps_of(answering(lambda: (one for one in range(3)))) == [0, 1, 2]

    @answering
    def wrong():
        raise ValueError("no <b>image</b>")

    with pytest.raises(gr.Error, match="no &lt;b&gt;image"):
        steps_of(wrong)


def test_slow_answer_is_stopped_with_message(run, model, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(gr.Error, match="takes more than 0.5 seconds"):
        steps_of(run)
    assert time.monotonic() - start < 5 and is_still(model) and not LINE._tasks


def test_uninterruptible_answer_times_out(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    released = threading.Event()

    @answering
    def stuck():
        with turn():
            released.wait(30)

    @answering
    def quick():
        with turn():
            return "here"

    with pytest.raises(gr.Error, match="takes more than"):
        steps_of(stuck)
    assert steps_of(quick) == ["here"]
    released.set()


def test_canceled_answer_leaves_the_line(run, model):
    async def leave():
        stream = run()
        assert await anext(stream) == "begun"
        await asyncio.sleep(0.1)
        await stream.aclose()

    asyncio.run(leave())
    assert model.count > 1 and is_still(model) and not LINE._tasks


def test_answers_take_turns_and_report_position(monkeypatch):
    reported, order, first_is_in = [], [], threading.Event()

    @answering
    def answer(name):
        with turn(lambda _, desc: reported.append((name, desc))):
            order.append(name)
            first_is_in.set()
            time.sleep(0.4)
            order.append(name)

    async def three():
        tasks = []
        for name in "abc":
            tasks.append(asyncio.create_task(collect(name)))
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)

    async def collect(name):
        return [step async for step in answer(name)]

    asyncio.run(three())
    assert "".join(order) == "aabbcc"
    assert ("b", "Waiting: 1 before you") in reported and ("c", "Waiting: 2 before you") in reported


def test_handlers_use_zerogpu_if_available(monkeypatch):
    """A fake of the package `spaces` records the functions and generators that it decorates."""
    decorated, computed = [], []

    def GPU(handler):
        decorated.append(handler.__name__)

        def on_gpu(*arguments):
            computed.append(handler.__name__)
            return handler(*arguments)

        return on_gpu

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=GPU))
    described = importlib.util.spec_from_file_location("computing_on_zero_gpu", computing.__file__)
    there = importlib.util.module_from_spec(described)
    described.loader.exec_module(there)

    @there.answering
    def one():
        return 1

    @there.answering
    def several():
        yield from (2, 3)

    assert decorated == ["one", "several"] and not computed
    assert steps_of(one) + steps_of(several) == [1, 2, 3] and computed == decorated
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert there.device() == torch.device("cuda")
    assert computing.device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


def test_full_line_shows_message(run, monkeypatch):
    monkeypatch.setattr(limits, "WAITING", 0)
    LINE.enter(task := computing.Task())
    try:
        with pytest.raises(gr.Error, match="1 visitors are waiting"):
            steps_of(run)
    finally:
        LINE.leave(task)
