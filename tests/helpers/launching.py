"""Processes started by tests: programs, distributed training, and models without this package."""

import contextlib
import fcntl
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import torch
from paths import HELPERS


def processes():
    """Return a context of processes forked from a server with all imports, which is faster than new processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training_run", "modeling_vitp.tasks.segmentation.trainer", "modeling_vitp.tasks.detection.trainer"]
    )
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in [str(HELPERS), *sys.path] if path)):
        forkserver.ensure_running()
    return context


def start_program(words: list, output: Path, **environment: str) -> multiprocessing.Process:
    """Start `python WORDS` in a process of [`processes`]. The output is appended to a file."""
    process = processes().Process(target=run_program, args=(list(map(str, words)), output, environment))
    process.start()
    return process


def run_program(words: list[str], output: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # Data loader workers are forks of this process, not of a second fork server.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    gc.freeze()  # A run collects garbage; going through the objects of all imports is a quarter of its time.
    sys.argv = words[1:] if words[0].startswith("-") else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def ranks_of(world: int) -> list[dict[str, str]]:
    """Return the variables that `torchrun` sets in each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def finish(running: list[multiprocessing.Process], timeout: float = 900) -> list[int]:
    """Wait for processes and return their exit codes. If one fails, the others are killed."""
    end = time.monotonic() + timeout
    while all(process.exitcode in (None, 0) for process in running) and time.monotonic() < end:
        if not (alive := [process.sentinel for process in running if process.is_alive()]):
            break
        wait(alive, 10)
    for process in running:
        process.kill()
        process.join()
    return [process.exitcode for process in running]


def launch(world: int, output: Path, script: str, *arguments: str) -> list[int]:
    """Run a script of this folder as `torchrun` does and return the exit codes."""
    words = [HELPERS / script, *arguments]
    return finish([start_program(words, output, **rank) for rank in ranks_of(world)])


def torchrun(world: int, output: Path, script: str, *arguments: str) -> int:
    """Run a script of this folder with `torchrun` and return its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    paths = os.pathsep.join(path for path in [str(HELPERS), *sys.path] if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(output, "w") as file:
        done = subprocess.run(
            [*launcher, str(HELPERS / script), *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    return done.returncode


@contextlib.contextmanager
def locked_elsewhere(folder: Path, name: str = ".run.lock") -> Iterator[None]:
    """Hold the lock of a folder, or of a file in it, with an open file, as another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


WITHOUT_PACKAGE = """
import sys
assert not any(name == "modeling_vitp" or name.startswith("modeling_vitp.") for name in sys.modules)
"""


def run_without_package(script: str, folder: Path) -> None:
    """Run a script in a folder, in a process that loads models with their own code instead of this package."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", script + WITHOUT_PACKAGE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
