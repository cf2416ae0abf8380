"""Execution of handlers: in threads, one computation at a time, with a time limit, on ZeroGPU if available."""

import asyncio
import ctypes
import functools
import html
import inspect
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path

import gradio as gr
import limits
import torch
from gradio.utils import get_upload_folder
from PIL import Image

try:
    import spaces
except ImportError:
    spaces = None

QUEUE = {"concurrency_limit": None}
"""Options of every event whose handler runs a model. Visitors wait in [`Line`], not in Gradio's queue."""

PRIVATE = {"api_visibility": "private"}
"""Options of events that only the page itself calls."""

PROCESS = os.getpid()
SLOTS = itertools.count()
# Shared with the workers of ZeroGPU, which are forks of this process. There are far more slots than answers at a time.
ENDS = multiprocessing.RawArray("d", 4096)
STOPPED = multiprocessing.RawArray("b", 4096)


class Stopped(Exception):
    """Exception that ends a computation whose visitor has left or whose time is up."""


class Task:
    """Deadline of one answer, and whether the visitor still waits for it, in memory shared with the workers of ZeroGPU.

    Args:
        slot: index of an existing task in the shared memory, which gets the whole time again. Default: a new task.
    """

    def __init__(self, slot: int | None = None):
        if slot is None:
            self.slot = next(SLOTS) % len(ENDS)
            STOPPED[self.slot] = False
        else:
            self.slot = slot
        self.ends = time.monotonic() + limits.SECONDS

    @property
    def ends(self) -> float:
        """Deadline on the monotonic clock, which all processes share."""
        return ENDS[self.slot]

    @ends.setter
    def ends(self, when: float) -> None:
        ENDS[self.slot] = when

    @property
    def is_stopped(self) -> bool:
        return bool(STOPPED[self.slot])

    def stop(self) -> None:
        STOPPED[self.slot] = True


class Line:
    """Waiting line of visitors. The answer of the first one is computed."""

    def __init__(self):
        self.tasks: list[Task] = []
        self._changed = threading.Condition()

    def enter(self, task: Task) -> int:
        """Add a task and return the number of tasks before it."""
        with self._changed:
            if len(self.tasks) > limits.WAITING:
                raise message(f"{len(self.tasks)} visitors are waiting and the line is full. Try again soon.")
            self.tasks.append(task)
            return len(self.tasks) - 1

    def wait(self, task: Task) -> int:
        """Wait until a task is the first, at most for a second, and return the number of tasks before it."""
        with self._changed:
            self._changed.wait_for(lambda: task not in self.tasks[1:], timeout=1.0)
            if task.is_stopped or task not in self.tasks:
                raise Stopped
            return self.tasks.index(task)

    def leave(self, task: Task) -> None:
        with self._changed:
            if task in self.tasks:
                self.tasks.remove(task)
                self._changed.notify_all()


BUILDING = threading.RLock()
"""Lock for building a model. transformers changes global state meanwhile, such as the default dtype and the tying of
weights, and two overlapping builds would restore each other's changes."""
# A worker that is forked during a build would keep this state forever.
os.register_at_fork(before=BUILDING.acquire, after_in_parent=BUILDING.release, after_in_child=BUILDING.release)
TASK: ContextVar[Task | None] = ContextVar("task", default=None)
LINE = Line()


def seconds_left() -> float | None:
    """Return the seconds left for the current answer; `None` outside an answer."""
    task = TASK.get()
    if task is None:
        return None
    return max(0.0, task.ends - time.monotonic())


def check_time() -> None:
    """Raise [`Stopped`] if the current answer is late or its visitor has left."""
    task = TASK.get()
    if task is not None and (task.is_stopped or time.monotonic() > task.ends):
        raise Stopped


def is_worker() -> bool:
    """Return whether this process is a worker of ZeroGPU."""
    return os.getpid() != PROCESS


@contextmanager
def turn(progress: gr.Progress | None = None) -> Iterator[None]:
    """Wait for this visitor's turn and report the position in the line. The block computes alone.

    On ZeroGPU, visitors have waited in its own line before.
    """
    task = TASK.get()
    if task is None or is_worker() or task in LINE.tasks:  # called by a program, or inside of another turn
        yield
        return
    remaining_seconds = seconds_left()
    position = LINE.enter(task)
    try:
        while position:
            task.ends = time.monotonic() + remaining_seconds + 1  # Time in the line does not count.
            if progress is not None:
                progress(0.0, desc=f"Waiting: {position} before you")
            position = LINE.wait(task)
        task.ends = time.monotonic() + remaining_seconds
        yield
    finally:
        LINE.leave(task)


def as_steps(handler: Callable) -> Callable[..., Iterator]:
    """Convert a handler to a generator function that first takes the slot of its task and raises errors as messages."""

    @functools.wraps(handler)
    def steps(slot: int, *arguments, **named) -> Iterator:
        if is_worker():
            TASK.set(Task(slot))
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and waiting for them never ends.
        with errors_as_messages():
            result = handler(*arguments, **named)
            if inspect.isgenerator(result):
                yield from result
            else:
                yield result

    return steps


def answering(handler: Callable | None = None, *, gpu: bool = True) -> Callable:
    """Convert a handler (function or generator) to an asynchronous generator that runs it in a thread of its own.

    When the visitor cancels or leaves, or the time is up, the page is answered at once and the handler ends before the
    next module of a model ([`check_time`]), or soon after if it runs other Python code. The handlers of ZeroGPU
    run in a forked process, which receives their arguments and returns their results by pickle.

    Args:
        gpu: whether the handler computes with a model. Others do not ask ZeroGPU for a GPU.
    """
    if handler is None:
        return functools.partial(answering, gpu=gpu)

    steps = as_steps(handler)
    uses_zero_gpu = gpu and spaces is not None
    run = spaces.GPU(steps, duration=math.ceil(limits.SECONDS)) if uses_zero_gpu else steps

    @functools.wraps(handler)
    async def answer(*arguments, **named) -> AsyncIterator:
        loop = asyncio.get_running_loop()
        task = Task()
        results = asyncio.Queue()  # pairs of a value or an error, and whether it is the last
        if uses_zero_gpu and has_zero_gpu():
            task.ends = math.inf  # The worker sets the deadline, because time in the line of ZeroGPU does not count.

        def put(value: object, is_last: bool = False) -> None:
            try:
                loop.call_soon_threadsafe(results.put_nowait, (value, is_last))
            except RuntimeError:  # The event loop has ended, so nobody waits for the answer.
                task.stop()

        thread = start_thread(task, functools.partial(run, task.slot, *arguments, **named), put)
        try:
            while True:
                try:
                    value, is_last = await asyncio.wait_for(results.get(), 0.5)
                except TimeoutError:
                    if time.monotonic() > task.ends + limits.ENDING:  # The handler has not reached another module.
                        raise too_late() from None
                    continue
                if not is_last:
                    yield value
                elif isinstance(value, StopAsyncIteration):
                    return
                else:
                    raise value
        finally:
            task.stop()
            LINE.leave(task)
            loop.call_later(limits.ENDING, interrupt, thread)

    return answer


def start_thread(task: Task, run: Callable[[], Iterator], put: Callable) -> threading.Thread:
    """Start a thread that passes each result of `run()` to `put`, then an error or `StopAsyncIteration` as the last."""

    def work() -> None:
        TASK.set(task)
        try:
            for value in run():
                put(value)
                check_time()
            put(StopAsyncIteration(), is_last=True)
        except Stopped:
            put(too_late(), is_last=True)
        except BaseException as error:  # Raised again in the thread of the page.
            put(error, is_last=True)

    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    return thread


def interrupt(thread: threading.Thread) -> None:
    """Raise [`Stopped`] in a thread that is still running Python code, such as the loops of a chat template."""
    if thread.is_alive():
        thread_id = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(Stopped))


def has_zero_gpu() -> bool:
    return spaces is not None and bool(os.environ.get("SPACES_ZERO_GPU"))


def device() -> torch.device:
    """Return the accelerator if available, otherwise the CPU."""
    if has_zero_gpu():
        return torch.device("cuda")  # ZeroGPU emulates CUDA outside of decorated handlers.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def limit_memory() -> None:
    """Let an allocation fail if the process would exceed the memory, so that one answer fails instead of the app."""
    if device().type != "cpu" or sys.platform == "win32":
        return
    import resource

    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limits.memory() * 15 // 16
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))


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
    """Convert a `ValueError`, a lack of memory or [`Stopped`] in the block to a message in the page."""
    try:
        yield
    except gr.Error:  # It is a ValueError too, but already a message.
        raise
    except ValueError as error:
        raise message(error) from error
    except Stopped:
        raise too_late() from None
    except (MemoryError, RuntimeError) as error:
        # torch raises a RuntimeError if an allocation fails on a CPU, and a subclass of it on other devices.
        is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_out_of_memory or "DefaultCPUAllocator" in str(error):
            raise message("Not enough memory. Use a smaller image or fewer patches.") from None
        raise


def check_time_before(module: torch.nn.Module, inputs: tuple) -> None:
    if not torch.compiler.is_compiling():
        check_time()


def new_file(name: str) -> Path:
    """Return a path with this file name in a new temporary folder."""
    folder = tempfile.mkdtemp(dir=get_upload_folder())
    return Path(folder, name)


def write_png(picture: Image.Image, name: str) -> str:
    """Write a picture as PNG with fast compression: a fifth of the time for at most 10% more bytes.

    If a picture is passed in an update (`gr.Image(picture, …)`), Gradio compresses it itself and blocks the server.
    """
    file = new_file(name)
    picture.save(file, "PNG", compress_level=1)
    return str(file)


torch.nn.modules.module.register_module_forward_pre_hook(check_time_before)
