"""The page's URL keeps what was chosen, so that a link opens the page as it is."""

import json
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr
from computing import PRIVATE, QUEUE

MAX_TEXT = 500
DEEP, MOST_LAYERS = "deep", 128
"""The class of sliders that are as long as a backbone has layers, which is not known when the page loads."""


def nearest(component: gr.Slider, value: float) -> float:
    """What a slider stands for that is beyond an end: the page may not know yet that it has been made shorter."""
    return gr.Slider.preprocess(component, min(max(value, component.minimum), component.maximum))


# Without a class statement, at which Gradio would write a `.pyi` file beside this one.
Slider = ABCMeta.__new__(type(gr.Slider), "Slider", (gr.Slider,), {"preprocess": nearest})


def slider(*arguments, **options) -> gr.Slider:
    """Without gradio's button that resets it, which makes no event of input; see [`nearest`]."""
    return Slider(*arguments, buttons=[], **options)


class Tab(NamedTuple):
    """What a tab's `build_tab` gives."""

    state: dict[str, gr.components.Component]
    """The components whose values are kept in the URL, by their keys there."""
    at_start: list[tuple] = []
    """What is shown when the page has loaded: handlers with their inputs and outputs."""


# A Space lies in a frame of the Hub's page, which copies the query into its own address when told.
REMEMBER = """(...values) => {
    if (!window.urlIsRestored) return;
    const keys = %s, defaults = %s, query = new URLSearchParams(window.location.search);
    keys.forEach((key, index) => {
        const value = Array.isArray(values[index]) ? values[index].join(",") : String(values[index] ?? "");
        if (value === "" || value === defaults[index]) query.delete(key); else query.set(key, value);
    });
    window.history.replaceState(null, "", query.size ? "?" + query : window.location.pathname);
    if (window.parent !== window) window.parent.postMessage({queryString: query.toString()}, "https://huggingface.co");
}"""


def keep_in_url(
    app: gr.Blocks, tabs: gr.Tabs, components: dict[str, gr.components.Component], at_start: list[tuple]
) -> None:
    """Restores tab and components from the URL when the page loads, and writes them there when they change.

    What the URL says is checked: numbers are kept within a slider's limits, and unknown choices are left out.

    Args:
        tabs: its tabs have ids.
        components: by their keys in the URL.
        at_start: see [`Tab`].
    """

    def restore(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        tab = gr.Tabs(selected=query["tab"]) if query.get("tab") in ids else gr.skip()
        return [tab, *(_restored(component, query.get(key)) for key, component in components.items())]

    ids = [tab.id for tab in tabs.children]
    restored = app.load(restore, None, [tabs, *components.values()], show_progress="hidden", **PRIVATE)
    restored.then(None, js="() => { window.urlIsRestored = true; }")
    for handler, inputs, outputs in at_start:
        restored.then(handler, inputs, outputs, show_progress_on=outputs[0], **QUEUE, **PRIVATE)
    defaults = [_text(component.value) for component in components.values()]
    remember = REMEMBER % (json.dumps(list(components)), json.dumps(defaults))
    gr.on([component.change for component in components.values()], None, list(components.values()), js=remember)
    remember_tab = REMEMBER % (json.dumps(["tab"]), json.dumps(ids[:1]))
    for tab in tabs.children:
        tab.select(None, js=f"() => ({remember_tab})({json.dumps(tab.id)})")


def _restored(component: gr.components.Component, text: str | None) -> Any:
    """An update of the component, none if the URL says nothing that it can take."""
    if text is None or len(text) > MAX_TEXT:
        return gr.skip()
    if DEEP in (component.elem_classes or []):
        value = _number(text, component.minimum, MOST_LAYERS, integer=True)
        return value if isinstance(value, dict) else gr.Slider(value=value, maximum=max(value, component.maximum))
    if isinstance(component, (gr.Slider, gr.Number)):
        return _number(text, component.minimum, component.maximum, integer=component.step == 1)
    if isinstance(component, gr.CheckboxGroup):
        known = [value for _, value in component.choices]
        return [value for value in text.split(",") if value in known]
    if isinstance(component, gr.Checkbox):
        return text == "true"
    if isinstance(component, (gr.Radio, gr.Dropdown)) and not getattr(component, "allow_custom_value", False):
        return text if text in [value for _, value in component.choices] else gr.skip()
    return text


def _number(text: str, minimum: float | None, maximum: float | None, integer: bool) -> Any:
    try:
        value = float(text)
    except ValueError:
        return gr.skip()
    if value != value:
        return gr.skip()
    value = max(value, minimum) if minimum is not None else value
    value = min(value, maximum) if maximum is not None else value
    return round(value) if integer else value


def _text(value: Any) -> str:
    """A component's value as JavaScript's `String` writes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    if value is None or isinstance(value, Callable):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
