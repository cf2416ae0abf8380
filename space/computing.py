"""Execution of handlers: in threads, one computation at a time, with a time limit, on ZeroGPU if available."""

import asyncio
import functools
import html
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

import gradio as gr
import limits
import torch

try:
    import spaces
except ImportError:
    spaces = None

QUEUE = {"concurrency_limit": None}
"""Options of every event whose handler runs a model. Visitors wait in [`Line`], not in Gradio's queue."""

PRIVATE = {"api_visibility": "private"}
"""Options of events that only the page itself calls."""


class Stopped(Exception):
    """Exception that ends a computation whose visitor has left or whose time is up."""


class Task:
    """Deadline of one answer, and whether the visitor still waits for it."""

    def __init__(self):
        self.ends = time.monotonic() + limits.SECONDS
        self.is_stopped = False

    @property
    def is_over(self) -> bool:
        return self.is_stopped or time.monotonic() > self.ends


class Line:
    """Waiting line of visitors. The answer of the first one is computed."""

    def __init__(self):
        self._tasks: list[Task] = []
        self._changed = threading.Condition()

    def enter(self, task: Task) -> None:
        with self._changed:
            if len(self._tasks) > limits.WAITING:
                raise message(f"{len(self._tasks)} visitors are waiting and the line is full. Try again soon.")
            self._tasks.append(task)

    def __contains__(self, task: Task) -> bool:
        with self._changed:
            return task in self._tasks

    def position(self, task: Task) -> int:
        """Return the number of tasks before this one."""
        with self._changed:
            if task.is_stopped or task not in self._tasks:
                raise Stopped
            return self._tasks.index(task)

    def wait(self, seconds: float) -> None:
        """Wait until a task leaves the line, at most for a number of seconds."""
        with self._changed:
            self._changed.wait(seconds)

    def leave(self, task: Task) -> None:
        with self._changed:
            if task in self._tasks:
                self._tasks.remove(task)
                self._changed.notify_all()


BUILDING = threading.RLock()
"""Lock for building a model. transformers changes global state meanwhile, such as the default dtype and the tying of
weights, and two overlapping builds would restore each other's changes."""
TASK: ContextVar[Task | None] = ContextVar("task", default=None)
LINE = Line()


def seconds_left() -> float | None:
    """Return the seconds left for the current answer; `None` outside an answer."""
    task = TASK.get()
    return None if task is None else max(0.0, task.ends - time.monotonic())


def check_time() -> None:
    """Raise [`Stopped`] if the current answer is late or its visitor has left."""
    task = TASK.get()
    if task is not None and task.is_over:
        raise Stopped


@contextmanager
def turn(progress: gr.Progress | None = None) -> Iterator[None]:
    """Wait for this visitor's turn and report the position in the line. The block computes alone."""
    task = TASK.get()
    if task is None or task in LINE:  # called by a program, or inside of another turn
        yield
        return
    left = seconds_left()
    LINE.enter(task)
    try:
        last = -1.0
        while position := LINE.position(task):
            task.ends = time.monotonic() + left + 1  # Time in the line does not count.
            if progress is not None and time.monotonic() > last + 1:  # Waiters wake up after each answer of others.
                progress(0.0, desc=f"Waiting: {position} before you")
                last = time.monotonic()
            LINE.wait(seconds=1.0)
        task.ends = time.monotonic() + left
        yield
    finally:
        LINE.leave(task)


def answering(handler: Callable) -> Callable:
    """Convert a handler (function or generator) that runs a model to an asynchronous generator.

    The handler runs in a thread of its own, on ZeroGPU with a GPU. When the visitor cancels or leaves, or the time is
    up, the page is answered at once and the handler ends before the next module of a model ([`check_time`]).
    """
    run = spaces.GPU(handler) if spaces is not None else handler

    @functools.wraps(handler)
    async def answer(*arguments, **named) -> AsyncIterator:
        loop, results, task = asyncio.get_running_loop(), asyncio.Queue(), Task()

        def put(*item) -> None:
            try:
                loop.call_soon_threadsafe(results.put_nowait, item)
            except RuntimeError:  # The event loop has ended, so nobody waits for the answer.
                task.is_stopped = True

        def work() -> None:
            TASK.set(task)
            try:
                with errors_as_messages():
                    result = run(*arguments, **named)
                    for value in result if inspect.isgenerator(result) else [result]:
                        put(value)
                        check_time()
                put(StopAsyncIteration(), True)
            except Stopped:
                put(too_late(), True)
            except BaseException as error:  # Raised again in the thread of the page.
                put(error, True)

        threading.Thread(target=copy_context().run, args=(work,), daemon=True).start()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(results.get(), 0.5)
                except TimeoutError:
                    if time.monotonic() > task.ends + 2:  # The handler has not reached another module in time.
                        raise too_late() from None
                    continue
                if len(item) == 1:
                    yield item[0]
                elif isinstance(item[0], StopAsyncIteration):
                    return
                else:
                    raise item[0]
        finally:
            task.is_stopped = True
            LINE.leave(task)

    return answer


def device() -> torch.device:
    """Return the accelerator if available, otherwise the CPU."""
    if spaces is not None and os.environ.get("SPACES_ZERO_GPU"):
        return torch.device("cuda")  # ZeroGPU emulates CUDA outside of decorated handlers.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def message(text: object) -> gr.Error:
    """Return an error that a handler raises to show a message in the page, with HTML escaped."""
    line = " ".join(str(text).split())[:400]
    return gr.Error(html.escape(line, quote=False), print_exception=False)


def too_late() -> gr.Error:
    return message(
        f"This takes more than {limits.SECONDS:g} seconds and was stopped. Use a smaller image, fewer patches or a "
        "smaller model."
    )


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Convert a `ValueError` or a lack of memory in the block to a message in the page."""
    try:
        yield
    except gr.Error:  # It is a ValueError too, but already a message.
        raise
    except ValueError as error:
        raise message(error) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise message("Not enough memory. Use a smaller image or fewer patches.") from error


def check_time_before(module: torch.nn.Module, inputs: tuple) -> None:
    if not torch.compiler.is_compiling():
        check_time()


torch.nn.modules.module.register_module_forward_pre_hook(check_time_before)
