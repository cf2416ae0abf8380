"""Lock of an output, in the lowest layer, because commands, trainers and readers of large images all write outputs."""

from pathlib import Path

from filelock import FileLock, Timeout

from .errors import RunStopped

LOCK_TIMEOUT = 10.0  # seconds


class FolderLock:
    """Lock of an output folder or of a file in it, so that only one run writes to it at a time.

    The operating system releases the lock when the process ends or is killed, so that no lock is stale.

    Args:
        folder: folder to lock, created if it does not exist.
        file_name: name of the file in the folder that is locked. By default the whole folder.
    """

    def __init__(self, folder: str | Path, file_name: str = ""):
        self.folder = Path(folder)
        self.output = self.folder / file_name
        self.path = self.folder / f".{file_name or 'run'}.lock"
        self._lock = FileLock(self.path, is_singleton=True)

    @property
    def is_held(self) -> bool:
        """True if this process holds the lock."""
        return self._lock.is_locked

    def acquire(self, timeout: float | None = None) -> None:
        """Acquire the lock unless this process holds it already.

        Args:
            timeout: seconds to wait for another process. By default 10, because the loader workers of a killed run
                hold the lock until they end.

        Raises:
            RunStopped: if another process holds the lock.
        """
        if self.is_held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(LOCK_TIMEOUT if timeout is None else timeout)
        except Timeout:
            raise RunStopped(
                f"Another run writes to {self.output}. Set another output, or wait for that run or stop it."
            ) from None

    def release(self) -> None:
        self._lock.release(force=True)
