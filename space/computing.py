"""Where and in what order handlers compute: on ZeroGPU if the Space has it, one at a time."""

import html
import os
from collections.abc import Callable

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
    return gr.Error(
        html.escape(" ".join(str(text).split())[:400], quote=False), title="That did not work", print_exception=False
    )
