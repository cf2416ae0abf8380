"""State in which the page opens: the settings of its URL, which a link restores, and the examples of the tabs."""

import asyncio
import functools
import json
import threading
import time
from abc import ABCMeta
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, NamedTuple

import gradio as gr
from computing import PRIVATE, QUEUE
from gradio.helpers import special_args

MAX_TEXT = 500
LIFETIME = 3000
"""Time for which the result of an example is served. The app deletes files after an hour."""
DEEP = "deep"
"""CSS class of sliders over the layers of a backbone, whose number is not known when the page loads."""
MOST_LAYERS = 128
"""Maximum of these sliders when a link is restored."""


def nearest(component: gr.Slider, value: float) -> float:
    """Clip the value of a slider to its range, because the page may not know a smaller maximum yet."""
    clipped = min(max(value, component.minimum), component.maximum)
    clipped = gr.Slider.preprocess(component, clipped)
    return int(clipped) if component.step == 1 else clipped


# A class statement would make Gradio write a `.pyi` file beside this one.
Slider = ABCMeta.__new__(type(gr.Slider), "Slider", (gr.Slider,), {"preprocess": nearest})


def slider(*arguments, **options) -> gr.Slider:
    """Create a slider without Gradio's reset button, which does not trigger the input event; see also [`nearest`]."""
    return Slider(*arguments, buttons=[], **options)


class Tab(NamedTuple):
    """Result of a tab's `build_tab`.

    Args:
        state: components whose values are kept in the URL, by key.
        at_start: handlers to run when the page has loaded, with their inputs and outputs, and the events that cancel
            them.
    """

    state: dict[str, gr.components.Component]
    at_start: list[tuple] = []


# A Space is shown in a frame of the Hub's page, which copies the query to its own address on this message.
REMEMBER = """(...values) => {
    if (!window.urlIsRestored) return;
    const keys = %s, defaults = %s, query = new URLSearchParams(window.location.search);
    keys.forEach((key, index) => {
        const value = String(values[index] ?? "");
        if (value === "" || value === defaults[index]) query.delete(key); else query.set(key, value);
    });
    window.history.replaceState(null, "", query.size ? "?" + query : window.location.pathname);
    if (window.parent !== window) window.parent.postMessage({queryString: query.toString()}, "https://huggingface.co");
}"""


def keep_in_url(
    app: gr.Blocks,
    tabs: gr.Tabs,
    components: dict[str, gr.components.Component],
    at_start: list[tuple],
) -> list[Callable[[], Future]]:
    """Restore the tab and the components from the URL when the page loads, and write changes to the URL.

    Numbers of the URL are clipped to the range of a slider, and unknown choices are ignored.

    Args:
        tabs: tabs with ids.
        components, at_start: as for [`Tab`].

    Returns:
        Functions that compute the examples, see [`example_of`].
    """
    tab_ids = [tab.id for tab in tabs.children]
    all_components = list(components.values())

    def restore(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        is_known_tab = query.get("tab") in tab_ids
        updates = [gr.Tabs(selected=query["tab"]) if is_known_tab else gr.skip()]
        for key, component in components.items():
            updates.append(_restored(component, query.get(key)))
        return updates

    restored = app.load(restore, None, [tabs, *all_components], show_progress="hidden", **PRIVATE)
    restored.then(None, js="() => { window.urlIsRestored = true; }")
    examples = []
    for handler, inputs, outputs, changes in at_start:
        with_example, compute = example_of(handler, inputs, outputs)
        starting = restored.then(
            with_example,
            inputs,
            outputs,
            show_progress_on=outputs[0],
            **QUEUE,
            **PRIVATE,
        )
        gr.on(changes, None, None, None, cancels=[starting], **PRIVATE)
        examples.append(compute)
    defaults = [_text(component.value) for component in all_components]
    remember = REMEMBER % (json.dumps(list(components)), json.dumps(defaults))
    changes = [component.change for component in all_components]
    gr.on(changes, None, all_components, js=remember)
    remember_tab = REMEMBER % (json.dumps(["tab"]), json.dumps(tab_ids[:1]))
    for tab in tabs.children:
        tab.select(None, js=f"() => ({remember_tab})({json.dumps(tab.id)})")
    return examples


def example_of(handler: Callable, inputs: list, outputs: list) -> tuple[Callable, Callable[[], Future]]:
    """Return the handler with one result for all visitors whose inputs have their default values.

    The second value computes this result if no result is known. An error leaves the outputs empty.
    """
    defaults = [_text(component.value) for component in inputs]
    arguments, *_ = special_args(handler, [component.value for component in inputs])
    lock = threading.Lock()
    example = Future()
    end = 0.0

    async def last() -> Any:
        results = [result async for result in handler(*arguments)]
        return results[-1]

    def work(future: Future) -> None:
        try:
            future.set_result(asyncio.run(last()))
        except Exception as error:  # `with_example` computes the example again for the next visitor.
            future.set_exception(error)

    def compute() -> Future:
        nonlocal example, end
        with lock:
            has_failed = example.done() and example.exception()
            if time.monotonic() > end or has_failed:
                example = Future()
                end = time.monotonic() + LIFETIME
                threading.Thread(target=copy_context().run, args=(work, example), daemon=True).start()
            return example

    @functools.wraps(handler)
    async def with_example(*values) -> AsyncIterator:
        texts = [_text(value) for value in values if not isinstance(value, gr.Progress)]
        if texts != defaults:
            async for result in handler(*values):
                yield result
            return
        try:
            yield await asyncio.wrap_future(compute())
        except gr.Error:
            yield (gr.skip(),) * len(outputs)

    return with_example, compute


def _restored(component: gr.components.Component, text: str | None) -> Any:
    """Return an update of the component, or a skip if the text of the URL is missing or invalid."""
    if text is None or len(text) > MAX_TEXT:
        return gr.skip()
    if isinstance(component, (gr.Slider, gr.Number)):
        try:
            value = float(text)
        except ValueError:
            return gr.skip()
        return _restored_number(component, value)
    if isinstance(component, gr.Checkbox):
        return text == "true"
    has_fixed_choices = isinstance(component, gr.Radio) or (
        isinstance(component, gr.Dropdown) and not component.allow_custom_value
    )
    if has_fixed_choices and text not in [value for _, value in component.choices]:
        return gr.skip()
    return text


def _restored_number(component: gr.Slider | gr.Number, value: float) -> Any:
    is_deep = DEEP in (component.elem_classes or [])
    maximum = MOST_LAYERS if is_deep else component.maximum
    value = min(max(component.minimum, value), maximum)  # NaN is the minimum.
    if component.step == 1:
        value = round(value)
    if is_deep:
        return gr.Slider(value=value, maximum=max(value, component.maximum))
    return value


def _text(value: Any) -> str:
    """Return a component's value in the format of JavaScript's `String`."""
    if value is None or isinstance(value, Callable):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return str(value)
