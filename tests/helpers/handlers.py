"""Handlers of a tab of the Space, called without a browser."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr


def start_of(build_tab: Callable, models: Any) -> list[tuple[Callable, list]]:
    """Build a tab and return each handler of `Tab.at_start` with the values of its inputs."""
    with gr.Blocks(analytics_enabled=False):
        tab = build_tab(models, gr.Dropdown(models.names, value=models.default, label="Model"))
    return [(handler, [component.value for component in inputs]) for handler, inputs, _ in tab.at_start]


def button_of(build_tab: Callable, models: Any, elem_id: str) -> Callable:
    """Build a tab and return the handler of a button."""
    with gr.Blocks(analytics_enabled=False) as app:
        build_tab(models, gr.Dropdown(models.names, value=models.default, label="Model"))
    (button,) = (key for key, block in app.blocks.items() if getattr(block, "elem_id", None) == elem_id)
    (handler,) = (event.fn for event in app.fns.values() if (button, "click") in event.targets and event.fn)
    return handler


def run(handler: Callable, values: Sequence[Any]) -> Any:
    """Call a handler and return its last result."""
    if "progress" in inspect.signature(handler).parameters:
        values = [*values, lambda *arguments, **options: None]

    async def steps() -> list:
        return [step async for step in handler(*values)]

    return asyncio.run(steps())[-1]
