"""Output folders: checkpoints that are complete or do not exist, the lock of a folder, and full disks."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards.record import read_json
from ..command.errors import RunStopped, one_line
from .arguments import check_type

logger = logging.getLogger(__name__)

RECORD_NAME = "checkpoint.json"
LOCK, LOCK_TIMEOUT = ".run.lock", 10.0  # seconds
FULL = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")
STATE_FILES = 1 << 20  # what a checkpoint has beside weights and optimizer, at least
# What the record of a checkpoint holds.
RECORD = {
    "files": dict[str, int],
    "hashes": dict[str, str],
    "settings": dict[str, dict[str, Any]],
    "data": dict[str, str | None] | None,
}


def publish_checkpoint(
    checkpoint: str | Path, settings: dict[str, Any], data: dict[str, str | None] | None = None
) -> None:
    """Make a checkpoint valid that was written in its place, by a record that is written last.

    The record holds every file with its size, by which [`is_complete`] tells, and its SHA-256, by which [`check_files`]
    does (1.4 GB a second on one core of an AMD EPYC); the settings of the run; and the fingerprint of its data.
    Everything is flushed to the disk before the record is there.

    Args:
        checkpoint: folder `checkpoint-<step>`.
        settings: settings of the run, see [`check_settings`].
        data: fingerprint of the training data, see [`~modeling_vitp.training.fingerprint.fingerprint_data`].
    """
    checkpoint = Path(checkpoint)
    record = checkpoint / RECORD_NAME
    record.unlink(missing_ok=True)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    hashes = {path.relative_to(checkpoint).as_posix(): hash_of(path) for path in files}
    for path in [*files, *(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint, checkpoint.parent]:
        flush(path)
    write_whole(record, json.dumps({"files": sizes, "hashes": hashes, "settings": settings, "data": data}, indent=2))
    flush(record)
    flush(checkpoint)


def flush(path: Path) -> None:
    """Write a file or a folder's entries through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint_record(checkpoint: str | Path) -> dict[str, Any]:
    """Read the record of a checkpoint; empty without one. Raises a `ValueError` that names a damaged file."""
    path = Path(checkpoint) / RECORD_NAME
    record = read_json(path)
    if record and not (RECORD.keys() <= record.keys() and {"fixed", "free"} <= record["settings"].keys()):
        raise ValueError(f"{path} is no record of a checkpoint. Expected {', '.join(RECORD)}, found {[*record]}.")
    for name, value in record.items():
        check_type(f"{path}: {name}", value, RECORD.get(name, Any))
    return record


def is_complete(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint has its record and every file in it, in full size."""
    checkpoint = Path(checkpoint)
    try:
        sizes = read_checkpoint_record(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_files(checkpoint: str | Path) -> None:
    """Read a checkpoint, and raises a `ValueError` that names the first file that is not what was written.

    One without a record is only looked at for the state of a trainer.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it has no {TRAINER_STATE_NAME}.")
    for name, expected in read_checkpoint_record(checkpoint).get("hashes", {}).items():
        path = checkpoint / name
        if not path.is_file() or hash_of(path) != expected:
            what = "not what was written" if path.is_file() else "missing"
            raise ValueError(
                f"{path} is {what}. Delete {checkpoint} to go on from an earlier checkpoint; or, if it was changed on "
                f"purpose, its {RECORD_NAME}."
            )


def weight_names(checkpoint: str | Path) -> set[str]:
    """Return the names of the weights in a checkpoint that is not sharded over processes; empty for others."""
    names: set[str] = set()
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    return names


@contextmanager
def going_on_from(checkpoint: str | Path | None) -> Iterator[None]:
    """Name the checkpoint that is read in an error that does not."""
    try:
        yield
    except Exception as error:  # of many kinds, where a file holds other things than it should
        if checkpoint is None or isinstance(error, ValueError) and str(checkpoint) in str(error):
            raise
        cause = " ".join(str(error).split())
        cause = cause if isinstance(error, ValueError) else f"{type(error).__name__}: {cause}"
        raise ValueError(f"The run cannot go on from {checkpoint}: {cause}") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the complete checkpoint of the highest step, or `None`; warn of those that are not complete."""
    checkpoints = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    for step in sorted(checkpoints, reverse=True):
        if is_complete(checkpoints[step]):
            return str(checkpoints[step])
        logger.warning(
            "%s is not a complete checkpoint and is passed over. Name it as resume_from_checkpoint to see why, or "
            "delete it.",
            checkpoints[step],
        )
    return None


class FolderLock:
    """Lock of a folder that one process at a time writes to.

    The system releases the lock of a process that ends or is killed, so that no lock is stale.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / LOCK, is_singleton=True)

    @property
    def is_held(self) -> bool:
        """Return whether this process holds the lock."""
        return self._lock.is_locked

    def acquire(self, timeout: float | None = None) -> None:
        """Take the lock, unless this process holds it.

        Args:
            timeout: seconds to wait for another process; by default long enough for the loader's workers of a run that
                was killed to end.

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
                f"Another run writes to {self.folder}. Give another output_dir, or wait for that run or stop it."
            ) from None

    def release(self) -> None:
        self._lock.release(force=True)


def check_free(folder: str | Path) -> None:
    """Raise [`RunStopped`] if another run writes to a folder. Only the first process of a run checks."""
    if int(os.environ.get("RANK", 0)) == 0 and (Path(folder) / LOCK).is_file():
        lock = FolderLock(folder)
        if not lock.is_held:
            lock.acquire()
            lock.release()


def free_bytes(folder: str | Path) -> int:
    return shutil.disk_usage(folder).free


def weight_bytes(model: torch.nn.Module, is_adapter: bool = False) -> int:
    """What a model's weights take on the disk; with PEFT what trains. Of a sharded model, what all processes have."""
    weights = [weight for weight in model.parameters() if weight.requires_grad or not is_adapter]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of this process's optimizer state."""
    states = getattr(optimizer, "state", {}).values()
    tensors = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_room(folder: str | Path, needed: int, what: str) -> None:
    """Raise [`RunStopped`] if a folder's disk has no room for what is about to be written."""
    free = free_bytes(folder)
    if free < needed + STATE_FILES:
        raise RunStopped(
            f"The disk of {folder} is full: {what} takes {format_size(needed + STATE_FILES)}, and {format_size(free)} "
            "are free. Make room (--save_total_limit 1 keeps one checkpoint) and start again: the run goes on from its "
            "last one."
        )


def warn_of_room(folder: str | Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        logger.warning(
            "The disk of %s has %s free, and a checkpoint takes about %s.",
            folder,
            format_size(free),
            format_size(needed),
        )


def format_size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


@contextmanager
def told_if_full(folder: str | Path) -> Iterator[None]:
    """Make of an error that a full disk is the cause of [`RunStopped`] in one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunStopped) or not is_full(error, folder):
            raise
        raise RunStopped(
            f"The disk of {folder} is full: {one_line(str(error))[:200].rstrip('.')}. Make room and start again: the "
            "run goes on from its last checkpoint."
        ) from error


def is_full(error: BaseException | None, folder: str | Path) -> bool:
    """Return whether an error, or what caused it, is that there was no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in FULL):
            return True
        # torch says that writing failed, and not why.
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            return free_bytes(folder) < STATE_FILES
        error = error.__cause__ or error.__context__
    return False


def attempt(output_dir: str | Path, what: str, step: Callable[..., object], *args) -> int:
    """Carry out what a run is complete without, such as a card or a plot: 0, or 1 and one line if it fails."""
    try:
        step(*args)
    except Exception as error:  # whatever a library raises: the run is not lost for it
        cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        logger.error("The run is complete in %s, but %s failed: %s.", output_dir, what, cause)
        return 1
    return 0


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.writing")
    written.write_text(text)
    os.replace(written, path)
