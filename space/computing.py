"""How handlers compute: beside the page, one after another, for a limited time, on ZeroGPU if the Space has it."""

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
"""Options of every event whose handler runs a model: who waits, waits in [`Line`] and not in gradio's queue."""

PRIVATE = {"api_visibility": "private"}
"""Options of events that only the page itself calls."""


class Stopped(Exception):
    """Nobody waits for this answer any more, or its time is up."""


class Task:
    """One answer: when it has to be there, and whether it is still wanted."""

    def __init__(self):
        self.ends = time.monotonic() + limits.SECONDS
        self.is_stopped = False

    @property
    def is_over(self) -> bool:
        return self.is_stopped or time.monotonic() > self.ends


class Line:
    """Visitors whose answers take a model, in the order in which they came; the first one's is computed."""

    def __init__(self):
        self._tasks: list[Task] = []
        self._changed = threading.Condition()

    def enter(self, task: Task) -> None:
        with self._changed:
            if len(self._tasks) > limits.WAITING:
                raise message(f"{len(self._tasks)} visitors are waiting, and there is no place left: try again soon.")
            self._tasks.append(task)

    def __contains__(self, task: Task) -> bool:
        with self._changed:
            return task in self._tasks

    def place(self, task: Task) -> int:
        """How many come before a task."""
        with self._changed:
            if task.is_stopped or task not in self._tasks:
                raise Stopped
            return self._tasks.index(task)

    def wait(self, seconds: float) -> None:
        """Until somebody leaves, so many seconds at most."""
        with self._changed:
            self._changed.wait(seconds)

    def leave(self, task: Task) -> None:
        with self._changed:
            if task in self._tasks:
                self._tasks.remove(task)
                self._changed.notify_all()


BUILDING = threading.RLock()
"""For whoever builds a model: while it does, transformers changes what is one for the process, such as the default
dtype and the tying of weights, and two that overlap would each put back what the other one had changed."""
TASK: ContextVar[Task | None] = ContextVar("task", default=None)
LINE = Line()


def seconds_left() -> float | None:
    """For the answer that is being computed; `None` where nobody waits for one."""
    task = TASK.get()
    return None if task is None else max(0.0, task.ends - time.monotonic())


def check_time() -> None:
    """Raises [`Stopped`] if the answer that is being computed is late, or nobody waits for it any more."""
    task = TASK.get()
    if task is not None and task.is_over:
        raise Stopped


@contextmanager
def turn(progress: gr.Progress | None = None) -> Iterator[None]:
    """Waits until it is this visitor's turn; what is inside has the models for itself. Tells the place in the line."""
    task = TASK.get()
    if task is None or task in LINE:  # nobody waits, or it is this one's turn already
        yield
        return
    left = seconds_left()
    LINE.enter(task)
    try:
        last = -1.0
        while place := LINE.place(task):
            task.ends = time.monotonic() + left + 1  # the time in the line does not count
            if progress is not None and time.monotonic() > last + 1:  # each answer tells all who wait for theirs
                progress(0.0, desc=f"Waiting: {place} before you")
                last = time.monotonic()
            LINE.wait(seconds=1.0)
        task.ends = time.monotonic() + left
        yield
    finally:
        LINE.leave(task)


def answering(handler: Callable) -> Callable:
    """Marks a handler (function or generator) that runs a model; it becomes an asynchronous generator.

    It runs in a thread of its own, on ZeroGPU with a GPU. When the visitor cancels or leaves, or the time is up, the
    page has its answer at once, and the handler ends at the next module of a model that it runs ([`check_time`]).
    """
    run = spaces.GPU(handler) if spaces is not None else handler

    @functools.wraps(handler)
    async def answer(*arguments, **named) -> AsyncIterator:
        loop, results, task = asyncio.get_running_loop(), asyncio.Queue(), Task()

        def put(*item) -> None:
            try:
                loop.call_soon_threadsafe(results.put_nowait, item)
            except RuntimeError:  # the loop has ended, and with it who waited
                task.is_stopped = True

        def work() -> None:
            TASK.set(task)
            try:
                with told():
                    given = run(*arguments, **named)
                    for value in given if inspect.isgenerator(given) else [given]:
                        put(value)
                        check_time()
                put(StopAsyncIteration(), True)
            except Stopped:
                put(too_late(), True)
            except BaseException as error:  # of the other thread; raised in this one
                put(error, True)

        threading.Thread(target=copy_context().run, args=(work,), daemon=True).start()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(results.get(), 0.5)
                except TimeoutError:
                    if time.monotonic() > task.ends + 2:  # not even between two modules was there a moment
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
    """The accelerator if there is one, otherwise the CPU."""
    if spaces is not None and os.environ.get("SPACES_ZERO_GPU"):
        return torch.device("cuda")  # emulated outside of marked handlers
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def message(text: object) -> gr.Error:
    """An error to be raised in a handler: a message in the page, in which what the user gave is text and not HTML."""
    line = " ".join(str(text).split())[:400]
    return gr.Error(html.escape(line, quote=False), print_exception=False)


def too_late() -> gr.Error:
    return message(
        f"This takes more than {limits.SECONDS:g} seconds, so it was stopped: take a smaller image, fewer patches or a "
        "smaller model."
    )


@contextmanager
def told() -> Iterator[None]:
    """A `ValueError` inside becomes a message in the page; those raised here and in the package are one line each."""
    try:
        yield
    except gr.Error:  # a ValueError too, with its message made already
        raise
    except ValueError as error:
        raise message(error) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise message("There is not enough memory for this: take a smaller image or fewer patches.") from error


def check_time_before(module: torch.nn.Module, inputs: tuple) -> None:
    if not torch.compiler.is_compiling():
        check_time()


torch.nn.modules.module.register_module_forward_pre_hook(check_time_before)
