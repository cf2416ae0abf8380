"""Checkpoints that are whole or not there, and that know the settings of the run they belong to."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards.record import read_json
from ..command.errors import RunStopped, one_line
from .arguments import check_type

logger = logging.getLogger(__name__)

# Checkpoints are written in this folder of the output folder. The Hub's uploads leave names with an underscore out.
STAGING = "_saving"
RECORD_NAME = "checkpoint.json"
TRAINING_DATA = "training data"  # the setting that says, in short, what is trained on
# What the record of a checkpoint holds; `hashes` and `data` are not in older ones.
RECORD = {
    "files": dict[str, int],
    "hashes": dict[str, str],
    "settings": dict[str, dict[str, Any]],
    "data": dict[str, str | None] | None,
}


def publish_checkpoint(
    staged: str | Path, checkpoint: str | Path, settings: dict[str, Any], data: dict[str, str | None] | None = None
) -> None:
    """Gives a checkpoint that was written in the staging folder its place, by a rename.

    A record is added to it: every file with its size, by which [`is_complete`] tells, and its SHA-256, by which
    [`check_files`] does (1.4 GB a second on one core of an AMD EPYC); the settings of the run; and the fingerprint of
    its data.
    Everything is flushed to the disk before the rename. An older checkpoint of that name is replaced.

    Args:
        staged: the checkpoint, in a folder on the same file system.
        checkpoint: where it belongs, `checkpoint-<step>`.
        settings: the settings of the run, see [`check_settings`].
        data: the fingerprint of what it reads, see [`~modeling_vitp.training.fingerprint.fingerprint`].
    """
    staged, checkpoint = Path(staged), Path(checkpoint)
    record = staged / RECORD_NAME
    record.unlink(missing_ok=True)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    hashes = {path.relative_to(staged).as_posix(): hash_of(path) for path in files}
    contents = {"files": sizes, "hashes": hashes, "settings": settings, "data": data}
    record.write_text(json.dumps(contents, indent=2) + "\n")
    for path in [*files, record, *(path for path in staged.rglob("*") if path.is_dir()), staged]:
        flush(path)
    if checkpoint.exists():
        replaced = staged.parent / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
    staged.rename(checkpoint)
    flush(checkpoint.parent)
    shutil.rmtree(staged.parent)


def flush(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint_record(checkpoint: str | Path) -> dict[str, Any]:
    """The record of a checkpoint; empty without one. Raises a `ValueError` that names one that is damaged."""
    path = Path(checkpoint) / RECORD_NAME
    record = read_json(path)
    for name, kind in RECORD.items():
        if name in record:
            check_type(f"{path}: {name}", record[name], kind)
    missing = {"files", "settings"} - record.keys()
    if record and (missing or not {"fixed", "free"} <= record["settings"].keys()):
        raise ValueError(f"{path} is no record of a checkpoint: it needs the files, and fixed and free settings.")
    return record


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has its record and every file in it, in full size."""
    checkpoint = Path(checkpoint)
    try:
        sizes = read_checkpoint_record(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_files(checkpoint: str | Path) -> None:
    """Reads a checkpoint, and raises a `ValueError` that names the first file that is not what was written.

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


@contextmanager
def going_on_from(checkpoint: str | Path | None) -> Iterator[None]:
    """Names the checkpoint that is read in an error that does not."""
    try:
        yield
    except Exception as error:  # of many kinds, where a file holds other things than it should
        if checkpoint is None or isinstance(error, ValueError) and str(checkpoint) in str(error):
            raise
        cause = " ".join(str(error).split())
        cause = cause if isinstance(error, ValueError) else f"{type(error).__name__}: {cause}"
        raise ValueError(f"The run cannot go on from {checkpoint}: {cause}") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step that is complete; a warning names those that are not. `None` without any."""
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


def check_going_on(
    checkpoint: str | Path,
    settings: dict[str, dict[str, Any]],
    data: dict[str, str | None],
    allow_changed_data: bool = False,
) -> None:
    """Raises a `ValueError` if a run with these settings and data may not go on from a checkpoint, see
    [`check_settings`] and [`check_data`], or it has weights alone.
    """
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has weights alone, as save_only_model leaves them, so that the run cannot go on. Start a "
            "new one: give the checkpoint as model_name_or_path, and another output_dir."
        )
    check_data(checkpoint, data, allow_changed_data)
    if allow_changed_data:
        fixed = {name: value for name, value in settings["fixed"].items() if name != TRAINING_DATA}
        settings = settings | {"fixed": fixed}
    check_settings(checkpoint, settings)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises a `ValueError` if a tokenizer is another than that of a checkpoint, as that of a model from scratch is if
    the texts that it is trained on have changed: what the model has learned of a token would be told of another one.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored, given = Tokenizer.from_file(str(file)).get_vocab(), tokenizer.get_vocab()
    if stored != given:
        raise ValueError(
            f"The tokenizer of {checkpoint} has {len(stored)} tokens, and the run's {len(given)}, not the same: that "
            "of a model from_scratch is trained on the texts, which have changed. Restore them; or start a new run "
            "from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        )


def check_settings(checkpoint: str | Path, settings: dict[str, dict[str, Any]]) -> None:
    """Compares a run's settings with those that a checkpoint was made under.

    Args:
        checkpoint: a checkpoint; one without a record is only warned about.
        settings: `fixed`, which may not differ, and `free`, which may, with a warning; perhaps `model`, what trains of
            it, and `given`, what it begins with and how it reads, which may not differ either, but which older
            checkpoints do not know; of what is given a trainer in Python need not know all.

    Raises:
        ValueError: names each setting that differs and may not, with both values.
    """
    recorded = read_checkpoint_record(checkpoint).get("settings")
    if recorded is None:
        logger.warning("%s has no record of its settings: whether the run goes on exactly is not known.", checkpoint)
        return
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the record
    differences = {
        kind: [
            f"{name} was {recorded[kind].get(name)!r} and is {value!r}"
            for name, value in settings[kind].items()
            if recorded[kind].get(name) != value and (kind != "given" or name in recorded[kind])
        ]
        for kind in settings
        if kind in recorded
    }
    wrong = [item for kind in ("fixed", "model", "given") for item in differences.get(kind, [])]
    if wrong:
        start = " from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": give another output_dir."  # an adapter is no model to start from
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong)}. Restore them to go on; or "
            f"start a new run{start}"
        )
    if differences["free"]:
        logger.warning(
            "Going on from %s with changed settings, so not as a run that never stopped: %s.",
            checkpoint,
            "; ".join(differences["free"]),
        )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises a `ValueError` if a checkpoint and the model that it was loaded into have not the same keys."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration that the run was started with."
        )


def check_data(checkpoint: str | Path, data: dict[str, str | None], may_change: bool = False) -> None:
    """Compares the fingerprint of a run's data with that of a checkpoint, which older ones lack: a warning.

    Args:
        may_change: whether other data are a warning, too.

    Raises:
        ValueError: names the parts that differ, and the way around it.
    """
    recorded = read_checkpoint_record(checkpoint).get("data")
    if recorded is None:
        logger.warning("%s has no fingerprint of its data: whether they are the same is not known.", checkpoint)
        return
    names = [name for name in {**recorded, **data} if recorded.get(name) != data.get(name)]
    unknown = [name for name in data if data[name] is None]
    if unknown:
        logger.warning("Whether %s changed since %s is not known.", ", ".join(map(repr, unknown)), checkpoint)
    names = [name for name in names if name not in unknown]
    if not names:
        return
    changed = f"{', '.join(map(repr, names))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"What is trained on is not what it was: {changed} (contents, sizes or times of files). Restore it to go "
            "on as a run that never stopped; go on all the same with --allow_changed_data; or start a new run from its "
            "weights: give the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Going on with other data, so not as a run that never stopped: %s.", changed)


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


FULL = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")
STATE_FILES = 1 << 20  # what a checkpoint has beside weights and optimizer, at least


def free_bytes(folder: str | Path) -> int:
    return shutil.disk_usage(folder).free


def weight_bytes(model: torch.nn.Module, is_adapter: bool = False) -> int:
    """What a model's weights take on the disk; with PEFT what trains. Of a sharded model, what all processes have."""
    weights = [weight for weight in model.parameters() if weight.requires_grad or not is_adapter]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """What the state of an optimizer takes, of this process."""
    states = getattr(optimizer, "state", {}).values()
    tensors = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_room(folder: str | Path, needed: int, what: str) -> None:
    """Raises [`RunStopped`] if a folder's disk has no room for what is about to be written."""
    free = free_bytes(folder)
    if free < needed + STATE_FILES:
        raise RunStopped(
            f"The disk of {folder} is full: {what} takes {size(needed + STATE_FILES)}, and {size(free)} are free. Make "
            "room (--save_total_limit 1 keeps one checkpoint) and start again: the run goes on from its last one."
        )


def warn_of_room(folder: str | Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        logger.warning("The disk of %s has %s free, and a checkpoint takes about %s.", folder, size(free), size(needed))


def size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


@contextlib.contextmanager
def told_if_full(folder: str | Path) -> Iterator[None]:
    """Makes of an error that a full disk is the cause of [`RunStopped`] in one line."""
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
    """Whether an error, or what caused it, is that there was no room."""
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
    """Carries out what a run is complete without, such as a card or a plot: 0, or 1 and one line if it fails."""
    try:
        step(*args)
    except Exception as error:  # whatever a library raises: the run is not lost for it
        cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        logger.error("The run is complete in %s, but %s failed: %s.", output_dir, what, cause)
        return 1
    return 0


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.writing")
    written.write_text(text)
    os.replace(written, path)
