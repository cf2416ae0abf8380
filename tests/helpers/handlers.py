"""The Space in tests: handlers called without a browser, the app in a process, and the oracles of several tabs."""

import asyncio
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import psutil
import torch
from paths import ROOT


def start_of(build_tab: Callable, models: Any) -> list[tuple[Callable, list]]:
    """Build a tab and return each handler of `Tab.at_start` with the values of its inputs."""
    with gr.Blocks(analytics_enabled=False):
        tab = build_tab(models, gr.Dropdown(models.names, value=models.default, label="Model"))
    return [(handler, [component.value for component in inputs]) for handler, inputs, _, _ in tab.at_start]


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


@contextmanager
def running_app(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, psutil.Popen]]:
    """Run the app in a folder, where it writes the file `log`, and return its address and process."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("VITP_MODEL", "GRADIO_SERVER_PORT")}
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GRADIO_SERVER_NAME": "127.0.0.1"}
    own |= {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    command, log = [sys.executable, ROOT / "space" / "app.py"], folder / "log"
    with log.open("w") as output:
        process = psutil.Popen(command, cwd=folder, env=inherited | own | environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found.group(), process
    finally:
        process.terminate()
        process.wait(30)


def normalized(image: np.ndarray) -> torch.Tensor:
    """Return 8-bit RGB as the input of a ViT, of shape `(1, 3, height, width)`."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((image / 255 - mean) / std).movedim(-1, 0)[None].float()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of two arrays along their first axis."""
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0)) / np.sqrt((b**2).sum(0))
