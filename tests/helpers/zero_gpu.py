"""Stand-in for the package `spaces` on ZeroGPU: handlers run in forked workers, with pickled arguments and results."""

import inspect
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pickle import PicklingError

import gradio as gr

FORK = multiprocessing.get_context("fork")


class ZeroGPU:
    """Module with the decorator `GPU` and the names of the handlers that it decorated.

    As on ZeroGPU, a handler's worker is forked at its first call and kept for later calls, the handler runs in a thread
    of the worker, closing the generator ends it after its next step, and only a `gradio.Error` keeps its message.
    """

    def __init__(self):
        self.names, self.called, self.workers = [], [], []

    def GPU(self, handler: Callable, duration: float | None = None) -> Callable:
        assert inspect.isgeneratorfunction(handler) and duration <= 120
        self.names.append(handler.__name__)
        idle = []

        def on_gpu(*arguments, **named) -> Iterator:
            self.called.append(handler.__name__)
            worker = idle.pop() if idle else Worker(handler)
            self.workers.append(worker.process)
            worker.arguments.put((arguments, named))
            while True:
                kind, value = worker.results.get()
                if kind == "error":
                    worker.process.terminate()
                    raise value
                if kind == "end":
                    idle.append(worker)
                    return
                try:
                    yield value
                except GeneratorExit:
                    worker.stopped.set()
                    while worker.results.get()[0] == "result":
                        pass
                    idle.append(worker)
                    raise

        return on_gpu

    def close(self) -> None:
        for process in self.workers:
            process.terminate()


class Worker:
    def __init__(self, handler: Callable):
        self.handler, self.stopped = handler, FORK.Event()
        self.arguments, self.results = FORK.SimpleQueue(), FORK.SimpleQueue()
        self.process = FORK.Process(target=self._serve, daemon=True)
        self.process.start()

    def _serve(self) -> None:
        while True:
            arguments, named = self.arguments.get()
            self.stopped.clear()
            with ThreadPoolExecutor(1) as threads:
                threads.submit(copy_context().run, self._iterate, arguments, named).result()

    def _iterate(self, arguments: tuple, named: dict) -> None:
        try:
            for value in self.handler(*arguments, **named):
                if self.stopped.is_set():
                    break
                self.results.put(("result", value))
        except gr.Error as error:
            self.results.put(("error", error))
        except Exception as error:
            name = "not picklable" if isinstance(error, PicklingError) or "pickle" in str(error) else repr(error)
            self.results.put(("error", gr.Error(f"ZeroGPU worker error: {name}")))
        else:
            self.results.put(("end", None))
