"""A batch from a worker of a data loader to its trainer, in shared memory that is used again.

As torch sends it, each tensor has new shared memory, of which the kernel finds and clears every page, and a file of its
own that is handed over. Both together take longer than copying the tiles.
"""

import dataclasses
import functools
import mmap
import os
import threading
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import get_worker_info

HEADER = ALIGNMENT = 64  # bytes
FREE, HELD, GIVEN_UP = range(3)
MOST_FREE = 4  # as many batches as a worker has under way: what more is free goes back


@dataclasses.dataclass
class ToStack:
    """Tensors of one shape and dtype that become one, in which the axes of each lie as they do in the first."""

    tensors: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return -(-len(self.tensors) * self.tensors[0].nbytes // ALIGNMENT) * ALIGNMENT

    def stacked(self, room: np.ndarray | None = None) -> torch.Tensor:
        """Stacked, in bytes that are given or in new memory."""
        first, out = self.tensors[0], None
        order = sorted(range(first.ndim), key=lambda axis: -first.stride(axis))
        tensors = [tensor.permute(order) for tensor in self.tensors]
        if room is not None:
            shape = len(tensors), *tensors[0].shape
            out = torch.from_numpy(room)[: len(tensors) * first.nbytes].view(first.dtype).view(shape)
        return torch.stack(tensors, out=out).permute([0, *(1 + order.index(axis) for axis in range(first.ndim))])


def share_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with what is [`ToStack`] stacked.

    In a worker its tensors lie in memory that the trainer sees too. They are the trainer's as long as it holds any of
    them, or a view; only then the worker writes there again. Where there are no files in memory, as on systems other
    than Linux, or torch is told to share by names, they go as torch sends them.

    It is the last that a worker does to a batch: what it gives is to be sent, once, and not to be changed or copied.

    Args:
        batch: of tensors, also in lists, tuples and dictionaries, and whatever else. One of another class than `dict`
            comes back as it is.
    """
    if type(batch) is not dict:
        return batch
    if get_worker_info() is None or get_sharing_strategy() != "file_descriptor" or not _has_memory_files():
        return recursively_apply(ToStack.stacked, batch, test_type=lambda value: isinstance(value, ToStack))
    sizes = []
    recursively_apply(lambda value: sizes.append(_as_stack(value).num_bytes), batch, test_type=_can_be_shared)
    if not sizes:
        return batch
    segment, room = _lent_segment(sum(sizes))
    rooms = iter(np.split(room, np.cumsum(sizes, dtype=np.int64)))

    def copied(value: torch.Tensor | ToStack) -> torch.Tensor:
        stacked = _as_stack(value).stacked(next(rooms))
        return stacked if isinstance(value, ToStack) else stacked[0]

    return SharedBatch(recursively_apply(copied, batch, test_type=_can_be_shared), segment, room)


@functools.cache
def _has_memory_files() -> bool:
    try:
        os.close(os.memfd_create("vitp-batch"))
    except (AttributeError, OSError):  # of another system, or forbidden
        return False
    return True


def _as_stack(value: torch.Tensor | ToStack) -> ToStack:
    return value if isinstance(value, ToStack) else ToStack([value])


def _can_be_shared(value: Any) -> bool:
    if isinstance(value, ToStack):
        return True
    is_plain = type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu"
    return is_plain and not value.requires_grad


class SharedBatch(dict):
    """A batch of a worker, which is a plain dictionary where it arrives; until it is sent it holds its memory."""

    def __init__(self, batch: dict[str, Any], segment: "_Segment", room: np.ndarray):
        super().__init__(batch)
        self.segment, self.room, self.is_sent = segment, room, False

    def __reduce__(self):
        return dict, (dict(self),)


def _sent(batch: SharedBatch) -> tuple:
    if batch.is_sent:  # to one that gives it back; again it goes as torch sends it
        return batch.__reduce__()
    batch.is_sent, batch.segment.state[0] = True, HELD
    values = recursively_apply(batch.segment.place, dict(batch), test_type=batch.segment.has)
    return _arrived, (reduction.DupFd(batch.segment.file), values)


reduction.ForkingPickler.register(SharedBatch, _sent)  # of queues between processes alone


@dataclasses.dataclass
class _Place:
    """Where a tensor lies in a segment, in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self, pages: np.ndarray) -> torch.Tensor:
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))
        part = torch.from_numpy(pages[self.start : self.start + (last + 1) * self.dtype.itemsize])
        return part.view(self.dtype).as_strided(self.shape, self.strides)


class _Segment:
    """Shared memory for one batch at a time; its first byte says whether another process holds that batch.

    Attributes:
        state: the byte, `FREE`, `HELD` or `GIVEN_UP`: not to be written again, since a third process may hold it.
    """

    def __init__(self, num_bytes: int):
        self.size = 1 << (HEADER + num_bytes).bit_length()  # pages that nothing is written to take no memory
        self.file = os.memfd_create("vitp-batch")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, self.size)
        self.pages = mmap.mmap(self.file, self.size)
        self.state = np.frombuffer(self.pages, np.uint8, 1)
        self.lent = lambda: None

    def is_free(self) -> bool:
        # In this order: a batch is marked as held before it goes from here.
        return self.lent() is None and self.state[0] == FREE

    def lend(self) -> np.ndarray:
        """The bytes, uint8 `(num_bytes,)`, which are in use here as long as a tensor or view of them is."""
        room = np.frombuffer(self.pages, np.uint8, offset=HEADER)
        self.lent = weakref.ref(room)
        return room

    def has(self, value: Any) -> bool:
        return _can_be_shared(value) and 0 < value.data_ptr() - self.state.ctypes.data < self.size

    def place(self, tensor: torch.Tensor) -> _Place:
        start = tensor.data_ptr() - self.state.ctypes.data
        return _Place(start, tensor.dtype, tuple(tensor.shape), tensor.stride())


_segments: list[_Segment] = []
_lending = threading.Lock()


def _lent_segment(num_bytes: int) -> tuple[_Segment, np.ndarray]:
    """A segment that nobody uses, and its bytes; those that are too many, or given up, go."""
    with _lending:
        free = sorted((segment for segment in _segments if segment.is_free()), key=lambda segment: -segment.size)
        if not free or free[0].size < HEADER + num_bytes:
            free.insert(0, _Segment(num_bytes))
        used = [segment for segment in _segments if not segment.is_free() and segment.state[0] != GIVEN_UP]
        _segments[:] = used + free[:MOST_FREE]
        return free[0], free[0].lend()


def _arrived(handle: Any, values: dict[str, Any]) -> dict[str, Any]:
    try:
        file = handle.detach()
    except (EOFError, OSError) as error:
        raise RuntimeError(
            f"A batch cannot be received: {error!r}. Its worker has ended, or too many files are open: raise "
            "`ulimit -n`, or share by names, torch.multiprocessing.set_sharing_strategy('file_system')."
        ) from error
    try:
        pages = mmap.mmap(file, 0)
    finally:
        os.close(file)
    room = np.frombuffer(pages, np.uint8)
    # Every tensor holds the array, which so goes with the last of them.
    weakref.finalize(room, _give_back, np.frombuffer(pages, np.uint8, 1), _number_of_forks).atexit = False
    return recursively_apply(lambda place: place.tensor(room), values, test_type=lambda it: isinstance(it, _Place))


def _give_back(state: np.ndarray, number_of_forks: int) -> None:
    state[0] = FREE if number_of_forks == _number_of_forks else GIVEN_UP


_number_of_forks = 0


def _count_fork() -> None:
    """What this process holds the other may hold too, and for longer."""
    global _number_of_forks
    _number_of_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_count_fork, after_in_child=_count_fork)
