"""Values of the page's sliders, and the examples that its tabs begin with."""

import asyncio

import gradio as gr
import pytest
from app import build_app
from computing import message
from url_state import example_of, slider


@pytest.mark.parametrize("value, taken", [(8, 4), (4, 4), (2, 2), (0, 1)])
def test_slider_clips_value_to_range(value, taken):
    """The page sends the old value until it knows the new maximum."""
    assert slider(1, 4, 2, step=1, label="Layer").preprocess(value) == taken


@pytest.fixture
def example():
    """Return the calls of a handler, and the handler with a kept example."""
    calls = []

    async def handler(image, progress=gr.Progress(), layer=0, bands=None):  # noqa: B008
        calls.append((image, layer, bands))
        if layer == 3:
            raise message("no such layer")
        yield "begun", 0
        yield image, len(calls)

    def with_default(layer):
        inputs = [gr.Radio(["a", "b"], value="a"), gr.Number(layer), gr.Textbox()]
        return example_of(handler, inputs, [gr.Textbox(), gr.Number()])

    return calls, with_default


def results(shown, *values):
    async def all_results():
        return [found async for found in shown(values[0], gr.Progress(), *values[1:])]

    return asyncio.run(all_results())


def test_example_is_computed_once_for_all_visitors(example):
    calls, with_default = example
    shown, compute = with_default(2)
    assert compute().result() == ("a", 1)
    assert results(shown, "a", 2.0, "") == results(shown, "a", 2, None) == [("a", 1)]
    assert calls == [("a", 2, None)]
    assert results(shown, "b", 2, "") == [("begun", 0), ("b", 2)]
    assert results(shown, "a", 1, "") == [("begun", 0), ("a", 3)]


def test_failed_example_leaves_tab_empty_and_is_tried_again(example):
    calls, with_default = example
    shown, _ = with_default(3)
    for _ in range(2):
        assert results(shown, "a", 3, "") == [(gr.skip(), gr.skip())]
    assert len(calls) == 2


def test_choosing_another_image_cancels_the_example_of_each_tab(models):
    app = build_app(models)
    (restored,) = (key for key, event in app.fns.items() if (app._id, "load") in event.targets)
    starting = {key for key, event in app.fns.items() if event.trigger_after == restored and event.fn is not None}
    radios = {key for key, block in app.blocks.items() if "examples" in (getattr(block, "elem_classes", None) or [])}
    canceled = set()
    for event in app.fns.values():
        if any(block in radios for block, name in event.targets if name == "input"):
            canceled |= set(event.cancels)
    assert starting and starting <= canceled
