"""Processes started by tests: distributed training, and models without this package."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from paths import HELPERS


def launch(num_processes: int, output: Path, script: str, *arguments: str) -> subprocess.Popen:
    """Start `torchrun` with a script of this folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    paths = os.pathsep.join(path for path in [str(HELPERS), *sys.path] if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(output, "w") as file:
        return subprocess.Popen(
            [*launcher, str(HELPERS / script), *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )


@contextlib.contextmanager
def locked_elsewhere(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder with an open file, as another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".run.lock", "w") as file:
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
