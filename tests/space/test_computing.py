"""Execution of answers: in turn, with position and time limit, and ended when the visitor leaves."""

import asyncio
import inspect
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import computing
import gradio as gr
import jinja2
import limits
import pytest
import torch
from app import build_app
from computing import LINE, answering, turn
from gradio.helpers import special_args
from loading import TINY, Models
from pictures import picture
from tiny_models import HEAD, adapter_config
from zero_gpu import ZeroGPU

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationConfig, ViTPSegmentationImageProcessor


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
    with pytest.raises(gr.Error, match="0.5 seconds"):
        steps_of(run)
    assert time.monotonic() - start < 5 and is_still(model) and not LINE.tasks


def test_uninterruptible_answer_times_out(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "ENDING", 0.3)
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
    assert model.count > 1 and is_still(model) and not LINE.tasks


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


@pytest.fixture
def zero_gpu(monkeypatch):
    zero_gpu = ZeroGPU()
    monkeypatch.setattr(computing, "spaces", zero_gpu)
    yield zero_gpu
    zero_gpu.close()


def test_handlers_run_in_workers_of_zerogpu(zero_gpu):
    @answering
    def several(value):
        yield value
        yield os.getpid()
        if value == 0:
            raise ValueError("no <b>image</b>")

    @answering(gpu=False)
    def here():
        return os.getpid()

    first, second = steps_of(several, 1), steps_of(several, 2)
    assert (first[0], second[0]) == (1, 2) and first[1] == second[1] != os.getpid()
    assert steps_of(here) == [os.getpid()] and zero_gpu.names == ["several"]
    with pytest.raises(gr.Error, match="no &lt;b&gt;image"):
        steps_of(several, 0)


def test_time_limit_reaches_zerogpu(zero_gpu, model, monkeypatch):
    """The worker is reused, and each of its answers has the whole time."""
    monkeypatch.setattr(limits, "SECONDS", 0.5)

    @answering
    def run(is_endless):
        yield os.getpid()
        if is_endless:
            model(torch.zeros(1))

    before = steps_of(run, False)
    time.sleep(0.6)
    assert steps_of(run, False) == before
    start = time.monotonic()
    with pytest.raises(gr.Error, match=r"takes more than 0\.5 seconds"):
        steps_of(run, True)
    assert time.monotonic() - start < 2


def test_cancel_reaches_zerogpu(zero_gpu, model):
    ended = multiprocessing.get_context("fork").Event()

    @answering
    def run():
        try:
            yield "begun"
            model(torch.zeros(1))
        finally:
            ended.set()

    async def leave():
        stream = run()
        assert await anext(stream) == "begun"
        await stream.aclose()

    asyncio.run(leave())
    assert ended.wait(5)


def test_worker_of_zerogpu_does_not_wait_in_line(zero_gpu):
    """Its copy of the line has visitors who never leave it."""

    @answering
    def run():
        with turn():
            return "here"

    LINE.enter(task := computing.Task())
    try:
        assert steps_of(run) == ["here"]
    finally:
        LINE.leave(task)


def test_worker_of_zerogpu_opens_models_that_are_loading(zero_gpu, monkeypatch):
    """The thread that loads a model does not exist in a worker that is forked meanwhile."""
    models, released = Models(TINY), threading.Event()
    monkeypatch.setattr(models, "_open", lambda name: released.wait(30) if os.getpid() == computing.PROCESS else name)
    loading = threading.Thread(target=models.full, daemon=True)
    loading.start()
    while not models._loading:
        time.sleep(0.01)

    @answering
    def run():
        return models.full()

    assert steps_of(run) == [TINY]
    released.set()


@pytest.mark.slow
def test_every_handler_of_the_page_runs_on_zerogpu(zero_gpu, tmp_path, monkeypatch):
    """Arguments and results are pickled, and handlers that compute nothing do not ask for a GPU."""
    monkeypatch.setattr(limits, "SECONDS", 6)  # The corruptions end before.
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)
    ViTPForSemanticSegmentation(config).save_pretrained(tmp_path / "maps")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "maps")
    picture(64, 64).save(tmp_path / "image.png")
    app = build_app(Models(TINY, fine_tuned=[str(tmp_path / "maps")]))
    assert not {"show", "show_tokens", "visual_tokens", "about", "about_model"} & set(zero_gpu.names)

    shown = next(one for one in app.blocks.values() if getattr(one, "elem_id", None) == "backbone_picture")
    click = gr.EventData(shown, {"index": [1, 1], "value": None})

    def value_of(component):
        if component.label == "Question" or component.elem_id == "ask-examples":
            return "How many trees?"
        return str(tmp_path / "image.png") if isinstance(component, gr.File) else component.value

    for function in app.fns.values():
        if inspect.isasyncgenfunction(function.fn):
            values = [value_of(component) for component in function.inputs]
            arguments = special_args(function.fn, values, event_data=click)[0]
            assert steps_of(function.fn, *arguments), function.name
    assert set(zero_gpu.called) == set(zero_gpu.names)


def test_device_of_zerogpu(monkeypatch):
    assert computing.device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    monkeypatch.setattr(computing, "spaces", ZeroGPU())
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert computing.device() == torch.device("cuda")


def test_python_code_without_model_is_interrupted(monkeypatch):
    """An endless loop, such as that of a chat template, does not keep a core busy."""
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    monkeypatch.setattr(limits, "ENDING", 0.3)
    ended = threading.Event()
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    @answering
    def run():
        try:
            jinja2.Template(template).render()
        finally:
            ended.set()

    async def wait():
        with pytest.raises(gr.Error, match="takes more than"):
            await anext(run())
        await asyncio.to_thread(ended.wait, 5)

    asyncio.run(wait())
    assert ended.is_set()


def test_allocation_above_the_memory_fails(monkeypatch):
    """Otherwise the system would end the app."""

    def allocate():
        data = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        monkeypatch.setattr(limits, "memory", lambda: 1024 * data + 2**30)
        computing.limit_memory()
        with computing.errors_as_messages():
            torch.empty(2**31, dtype=torch.uint8)

    def run():
        with pytest.raises(gr.Error, match="Not enough memory"):
            allocate()
        os._exit(3)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(10)
    assert process.exitcode == 3


def test_full_line_shows_message(run, monkeypatch):
    monkeypatch.setattr(limits, "WAITING", 0)
    LINE.enter(task := computing.Task())
    try:
        with pytest.raises(gr.Error, match="1 visitors are waiting"):
            steps_of(run)
    finally:
        LINE.leave(task)
