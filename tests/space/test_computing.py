"""Answers: one after another, told their place, in time or not at all, and ended when nobody waits for them."""

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
    """A model whose forward pass does not end; it counts its layers."""

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


def test_functions_and_generators_answer_with_what_they_give():
    assert steps_of(answering(lambda a, b: a + b), 1, 2) == [3]
    assert steps_of(answering(lambda: (one for one in range(3)))) == [0, 1, 2]

    @answering
    def wrong():
        raise ValueError("no <b>image</b>")

    with pytest.raises(gr.Error, match="no &lt;b&gt;image"):
        steps_of(wrong)


def test_what_takes_too_long_is_stopped_in_the_middle_of_the_model_and_told(run, model, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(gr.Error, match="takes more than 0.5 seconds"):
        steps_of(run)
    assert time.monotonic() - start < 5 and is_still(model) and not LINE._tasks


def test_what_cannot_be_stopped_keeps_nobody_waiting(monkeypatch):
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


def test_a_cancelled_answer_ends_and_leaves_its_place(run, model):
    async def leave():
        stream = run()
        assert await anext(stream) == "begun"
        await asyncio.sleep(0.1)
        await stream.aclose()

    asyncio.run(leave())
    assert model.count > 1 and is_still(model) and not LINE._tasks


def test_answers_are_computed_in_turn_and_who_waits_is_told_the_place(monkeypatch):
    told, order, first_is_in = [], [], threading.Event()

    @answering
    def answer(name):
        with turn(lambda _, desc: told.append((name, desc))):
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
    assert ("b", "Waiting: 1 before you") in told and ("c", "Waiting: 2 before you") in told


def test_where_spaces_is_installed_its_decorator_has_every_answer_and_models_go_to_its_gpu(monkeypatch):
    """A stand-in for the package of ZeroGPU, which imports, decorates functions and generators, and says how."""
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


def test_a_full_line_is_a_line_of_text(run, monkeypatch):
    monkeypatch.setattr(limits, "WAITING", 0)
    LINE.enter(task := computing.Task())
    try:
        with pytest.raises(gr.Error, match="1 visitors are waiting"):
            steps_of(run)
    finally:
        LINE.leave(task)
