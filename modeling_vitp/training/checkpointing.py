"""Output folders: atomic checkpoints, the lock of a folder, and checks of free disk space."""

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
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards.record import read_json
from ..command.errors import RunStopped, one_line
from ..command.locks import FolderLock
from ..command.settings import check_value

logger = logging.getLogger(__name__)

RECORD_NAME = "checkpoint.json"
FULL = "The disk of {} is full", "Free some space"
# Messages and remedies of failed writes, by the number of the system error.
CAUSES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: ("A file in {} exceeds the limit of `ulimit -f`", "Raise the limit"),
    errno.EROFS: ("The disk of {} is read-only", "Mount it for writing or set another output_dir,"),
}
STATE_FILES = 1 << 20  # minimum bytes of a checkpoint beside weights and optimizer state
# Fields of the record of a checkpoint and their types.
RECORD = {
    "files": dict[str, int],
    "hashes": dict[str, str],
    "settings": dict[str, dict[str, Any]],
    "data": dict[str, str | None] | None,
}


def publish_checkpoint(
    checkpoint: str | Path, settings: dict[str, Any], data: dict[str, str | None] | None = None
) -> None:
    """Make a checkpoint valid by writing its record last.

    The record contains the size of every file, which [`is_complete`] compares, and its SHA-256, which [`check_files`]
    compares (1.4 GB a second on one core of an AMD EPYC), the settings of the run, and the fingerprint of its data. All
    files are flushed to the disk before the record is written.

    Args:
        checkpoint: folder `checkpoint-<step>`.
        settings: settings of the run, see [`~modeling_vitp.training.resuming.check_resume_settings`].
        data: fingerprint of the training data, see [`~modeling_vitp.training.resuming.fingerprint_data`].
    """
    checkpoint = Path(checkpoint)
    record_file = checkpoint / RECORD_NAME
    record_file.unlink(missing_ok=True)
    sizes = {}
    hashes = {}
    folders = []
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = path.relative_to(checkpoint).as_posix()
            sizes[name] = path.stat().st_size
            hashes[name] = hash_of(path)
            flush(path)
        elif path.is_dir():
            folders.append(path)
    for folder in (*folders, checkpoint, checkpoint.parent):
        flush(folder)
    record = {"files": sizes, "hashes": hashes, "settings": settings, "data": data}
    write_whole(record_file, json.dumps(record, indent=2))
    flush(record_file)
    flush(checkpoint)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint_record(checkpoint: str | Path) -> dict[str, Any]:
    """Read the record of a checkpoint, empty if the file is missing; raise a `ValueError` if it is damaged."""
    path = Path(checkpoint) / RECORD_NAME
    record = read_json(path)
    if not record:
        return record
    has_fields = RECORD.keys() <= record.keys()
    if not has_fields or not {"fixed", "free"} <= record["settings"].keys():
        raise ValueError(f"{path} is not a valid checkpoint record. Expected {', '.join(RECORD)}, found {[*record]}.")
    for name, value in record.items():
        check_value(f"{path}: {name}", value, RECORD.get(name, Any))
    return record


def is_complete(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint has its record and every recorded file in full size."""
    checkpoint = Path(checkpoint)
    try:
        sizes = read_checkpoint_record(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_files(checkpoint: str | Path) -> None:
    """Raise a `ValueError` that names the first missing or changed file of a checkpoint.

    In a checkpoint without a record, only the state of the trainer is required.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: {TRAINER_STATE_NAME} not found.")
    hashes = read_checkpoint_record(checkpoint).get("hashes", {})
    for name, recorded_hash in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            problem = "is missing"
        elif hash_of(path) != recorded_hash:
            problem = "has changed since it was written"
        else:
            continue
        raise ValueError(
            f"{path} {problem}. Delete {checkpoint} to resume from an earlier checkpoint. If the change is intended, "
            f"delete its {RECORD_NAME}."
        )


def weight_names(checkpoint: str | Path) -> set[str]:
    """Return the names of the weights in a checkpoint, empty if it is sharded over processes."""
    names: set[str] = set()
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    return names


@contextmanager
def name_checkpoint_in_errors(checkpoint: str | Path | None) -> Iterator[None]:
    """Add the name of the checkpoint to errors that do not contain it."""
    try:
        yield
    except Exception as error:  # damaged files cause errors of many types
        is_value_error = isinstance(error, ValueError)
        if checkpoint is None or (is_value_error and str(checkpoint) in str(error)):
            raise
        cause = " ".join(str(error).split())
        if not is_value_error:
            cause = f"{type(error).__name__}: {cause}"
        raise ValueError(f"The run cannot resume from {checkpoint}: {cause}") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the complete checkpoint of the highest step, or `None`; warn about later incomplete checkpoints."""
    steps = checkpoint_steps(folder)
    for path in sorted(steps, key=steps.get, reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning(
            "%s is not a complete checkpoint and is skipped. Set it as resume_from_checkpoint to see the reason, or "
            "delete it.",
            path,
        )
    return None


def checkpoint_steps(folder: str | Path) -> dict[Path, int]:
    """Return the step of each checkpoint in a folder."""
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            steps[path] = int(match[1])
    return steps


def delete_old_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints beside the newest one, so that at most `limit` are left with it and the best one.

    The order is that of the steps, because the clock may have been ahead. Checkpoints of later steps are deleted first:
    the run resumed from an earlier one.

    Args:
        newest: checkpoint that was just written.
        limit: number of checkpoints to keep. `None` or 0 keeps all.
        best: checkpoint of the best score, which is kept.
    """
    if not limit:
        return
    steps = checkpoint_steps(newest.parent)
    newest_step = steps.pop(newest)
    later_checkpoints = []
    earlier_checkpoints = []
    for path in sorted(steps, key=steps.get):
        if steps[path] < newest_step:
            earlier_checkpoints.append(path)
        else:
            later_checkpoints.append(path)
    num_surplus = max(len(steps) + 1 - limit, 0)
    # By its name, because output_dir may be relative now and absolute in the state of the run, or be moved.
    best_name = None if best is None else Path(best).name
    deletable = [path for path in later_checkpoints + earlier_checkpoints if path.name != best_name]
    for path in deletable[:num_surplus]:
        shutil.rmtree(path, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Raise [`RunStopped`] if another run writes to a folder. Only the first process of a run checks."""
    rank = int(os.environ.get("RANK", 0))
    lock = FolderLock(folder)
    if rank == 0 and lock.path.is_file() and not lock.is_held:
        lock.acquire()
        lock.release()


def check_no_model(output_dir: str | Path) -> None:
    """Raise a `ValueError` if a folder has a model, whose `metrics.json` a later evaluation would replace."""
    if any(Path(output_dir).glob("*.safetensors")):
        raise ValueError(f"{output_dir} has a model, whose metrics.json would be replaced. Set another --output_dir.")


def free_bytes(folder: str | Path) -> int:
    return shutil.disk_usage(folder).free


def weight_bytes(model: torch.nn.Module, is_adapter: bool = False) -> int:
    """Return the bytes of a model's weights on disk, or of its trainable weights if `is_adapter` is true."""
    num_bytes = 0
    for weight in model.parameters():
        if weight.requires_grad or not is_adapter:
            num_bytes += weight.numel() * weight.element_size()
    return num_bytes


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of the optimizer state in this process."""
    num_bytes = 0
    for weight_state in getattr(optimizer, "state", {}).values():
        for value in weight_state.values():
            if isinstance(value, torch.Tensor):
                num_bytes += value.numel() * value.element_size()
    return num_bytes


def check_disk_space(folder: str | Path, num_bytes: int, purpose: str) -> None:
    """Raise [`RunStopped`] if the disk of a folder has less free bytes than a checkpoint or a model takes.

    Args:
        num_bytes: bytes of the weights and of the optimizer state.
        purpose: what is written, in the error.
    """
    free = free_bytes(folder)
    required = num_bytes + STATE_FILES
    if free < required:
        raise RunStopped(
            f"The disk of {folder} is full: {purpose} needs {format_size(required)}, and {format_size(free)} are free. "
            "Free some space (--save_total_limit 1 keeps one checkpoint) and start the run again: it resumes from its "
            "last checkpoint."
        )


def warn_about_disk_space(folder: str | Path, num_bytes: int) -> None:
    free = free_bytes(folder)
    if free < num_bytes:
        logger.warning(
            "The disk of %s has %s free, and a checkpoint needs about %s.",
            folder,
            format_size(free),
            format_size(num_bytes),
        )


def format_size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


@contextmanager
def stop_on_full_disk(folder: str | Path) -> Iterator[None]:
    """Convert errors of a disk that is full, limited or read-only to [`RunStopped`] with a message in one line."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        number = cause_of_failed_write(error, folder)
        if number is None:
            raise
        problem, remedy = CAUSES[number]
        details = one_line(str(error))[:200].rstrip(".")
        raise RunStopped(
            f"{problem.format(folder)}: {details}. {remedy} and start the run again: it resumes from its last "
            "checkpoint."
        ) from error


def cause_of_failed_write(error: BaseException | None, folder: str | Path) -> int | None:
    """Return the number of the system error in `CAUSES` that caused an error, or `None`."""
    while error is not None:
        message = str(error)
        for number in CAUSES:
            if getattr(error, "errno", None) == number:
                return number
            # Libraries in Rust raise errors of other types with the text of the system error.
            if os.strerror(number) in message or f"os error {number})" in message:
                return number
        # The error of torch does not contain the reason why writing failed.
        if "PytorchStreamWriter" in message or "unexpected pos" in message:
            if free_bytes(folder) < STATE_FILES:
                return errno.ENOSPC
            import resource  # not on Windows

            size_limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            return errno.EFBIG if size_limit >= 0 else None
        error = error.__cause__ or error.__context__
    return None


def attempt(output_dir: str | Path, purpose: str, step: Callable[..., object], *args) -> int:
    """Run an optional last step, such as a card or a plot; return 0, or log the error and return 1."""
    try:
        step(*args)
    except Exception as error:  # a failed optional step must not lose the run
        cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        logger.error("The run is complete in %s, but %s failed: %s.", output_dir, purpose, cause)
        return 1
    return 0


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to write, which replaces `folder` at the end. A killed run leaves no incomplete `folder`."""
    unfinished_folder = folder.with_suffix(".writing")
    shutil.rmtree(unfinished_folder, ignore_errors=True)
    with stop_on_full_disk(folder.parent):
        yield unfinished_folder
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished_folder, folder)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished_path = path.with_name(f".{path.name}.writing")
    unfinished_path.write_text(text)
    os.replace(unfinished_path, path)
