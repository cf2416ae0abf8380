"""Where and in what order handlers compute: on ZeroGPU if the Space has it, one at a time."""

import html
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr
import torch

try:
    import spaces
except ImportError:
    spaces = None

QUEUE = {"concurrency_id": "models", "concurrency_limit": 1}
"""Options of every event whose handler runs a model: they share one place in the queue, so that memory is bounded."""

PRIVATE = {"api_visibility": "private"}
"""Options of events that only the page itself calls."""


def gpu(handler: Callable) -> Callable:
    """Marks a handler (function or generator) that runs a model: on ZeroGPU it gets a GPU for the call."""
    return spaces.GPU(handler) if spaces is not None else handler


def device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    if spaces is not None and os.environ.get("SPACES_ZERO_GPU"):
        return torch.device("cuda")  # emulated outside of marked handlers
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def message(text: object) -> gr.Error:
    """An error to be raised in a handler: a message in the page, in which what the user gave is text and not HTML."""
    line = " ".join(str(text).split())[:400]
    return gr.Error(html.escape(line, quote=False), print_exception=False)


@contextmanager
def told() -> Iterator[None]:
    """A `ValueError` inside becomes a message in the page; those raised here and in the package are one line each."""
    try:
        yield
    except gr.Error:  # a ValueError too, with its message made already
        raise
    except ValueError as error:
        raise message(error) from error
