"""One run in a folder at a time."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .stops import RunStopped

logger = logging.getLogger(__name__)
LOCK = ".run.lock"
# A lock is touched so often; one of another machine that was not for long is of a process that is no more.
TOUCHED_EVERY, SILENT_FOR = 30, 600


class FolderLock:
    """Says in a folder which process writes to it, and is passed over once that process is dead.

    Args:
        folder: created if it is not there.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LOCK
        self._released: threading.Event | None = None

    @property
    def is_held(self) -> bool:
        return self._released is not None

    def acquire(self) -> None:
        """Raises [`RunStopped`] with the process that has it."""
        if self.is_held:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with opened(self.path) as file:
            refuse_if_busy(self.path, file.read())
            file.seek(0)
            file.truncate()
            file.write(json.dumps(this_process()))
        self._released = threading.Event()
        threading.Thread(target=self._touch, args=(self._released,), daemon=True).start()

    def release(self) -> None:
        if not self.is_held:
            return
        self._released.set()
        self._released = None
        with contextlib.suppress(OSError), opened(self.path) as file:
            if is_mine(read(file.read())):
                self.path.unlink()

    def _touch(self, released: threading.Event) -> None:
        while not released.wait(TOUCHED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self.path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The file of a lock, for this process alone."""
    while True:
        with open(path, "a+") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                yield file
                return


def check_free(folder: str | Path) -> None:
    """Raises [`RunStopped`] if another run writes to a folder. Asks in the first process of a run only."""
    path = Path(folder) / LOCK
    if int(os.environ.get("RANK", 0)) == 0 and path.is_file():
        refuse_if_busy(path, path.read_text())


def refuse_if_busy(path: Path, text: str) -> None:
    holder = read(text)
    if not holder or is_mine(holder):
        return
    if holder["host"] == socket.gethostname():
        busy = started(holder["pid"]) == holder["started"]
    else:
        busy = time.time() - path.stat().st_mtime < SILENT_FOR
    name = f"process {holder['pid']} on {holder['host']}"
    if busy:
        raise RunStopped(
            f"Another run writes to {path.parent}: {name}, since {holder['since']}. Give another output_dir, or wait "
            f"for it or stop it. If there is no such process, delete {path}."
        )
    logger.info("%s, which wrote to %s, is no more.", name.capitalize(), path.parent)


def read(text: str) -> dict[str, Any] | None:
    """Who holds a lock; `None` if that was not written to its end."""
    with contextlib.suppress(ValueError, TypeError):
        holder = json.loads(text)
        if {"host", "pid", "started", "since"} <= set(holder):
            return holder
    return None


def this_process() -> dict[str, Any]:
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": pid, "started": started(pid), "since": since}


def is_mine(holder: dict[str, Any] | None) -> bool:
    me = this_process()
    return holder is not None and all(holder[key] == me[key] for key in ("host", "pid", "started"))


def started(pid: int) -> str | None:
    """When a process of this machine started, which tells it from later ones of its number; `None` if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # where there is no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "not known"
