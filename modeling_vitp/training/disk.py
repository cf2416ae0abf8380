"""A disk that is full is said to be full, and where there is no room nothing is begun."""

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..command.errors import one_line
from .stops import RunStopped

logger = logging.getLogger(__name__)
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
