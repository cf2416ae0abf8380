"""Batches of training and evaluation: shards of processes, global batches, and batches of samples of similar length.

The rows of an optimizer step depend only on the seed, the epoch and the size of the global batch, unless the streams of
a mixture are split, or worker processes read a stream.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather, gather_object, recursively_apply
from datasets import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

from ..instructions.collator import STEP, ViTPDataCollator
from ..vrl import keyed_generator

ROWS = "rows"
EARLIEST_STEP = "_earliest_step"
BY_LENGTH = ("group_by_length", "batch_rebalance")


class GlobalBatchSampler(BatchRebalanceSampler):
    """Sampler of the batches of one process from a map-style data set.

    The rows of an epoch are split into global batches, one for each optimizer step, and each global batch into batches
    of the processes. The last global batch of an epoch may be smaller. It is split evenly: each row is used once, every
    process has the same number of batches, and a batch may be empty.

    Args:
        num_rows: number of rows of the data set.
        batch_size: rows per batch of one process; with "batch_rebalance" the mean.
        accumulation_steps: batches of a process per optimizer step.
        num_processes: number of processes.
        process_index: index of this process.
        seed: seed of the order, combined with the epoch.
        strategy: "random"; "sequential"; "group_by_length", where the rows of an optimizer step have similar lengths;
            or "batch_rebalance", where an optimizer step has the same rows as under "random", but rows of similar
            length share a batch, and batches of short rows are larger, so that all batches cost about the same.
        lengths: function that returns the length of every row, called at the start of each epoch for
            "group_by_length" and "batch_rebalance".
        drop_last: whether to drop the last global batch if it is smaller.

    Attributes:
        is_over: whether to yield no batch, for a run that is resumed after its last step.
    """

    is_over = False

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        strategy: str = "random",
        lengths: Callable[[], list[int]] | None = None,
        drop_last: bool = False,
    ):
        super().__init__(
            lengths=[],  # measured when needed, because a list of 10^8 lengths takes gigabytes
            effective_batch_size=batch_size * accumulation_steps * num_processes,
            dp_size=num_processes,
            grad_accum=accumulation_steps,
            seed=seed,
            rank=process_index,
            drop_last=drop_last,
        )
        self.num_full_batches, self.remainder = divmod(num_rows, self.effective_batch_size)
        self.num_global_batches = self.num_full_batches + (not drop_last and self.remainder > 0)
        self.num_rows = num_rows
        self.strategy = strategy
        self.measure = lengths

    def __len__(self) -> int:
        num_batches = self.num_full_batches * self.grad_accum
        if not self.drop_last:
            rows_at_once = self.effective_batch_size // self.grad_accum
            num_batches += math.ceil(self.remainder / rows_at_once)
        return num_batches

    def check_not_empty(self) -> None:
        """Raise a `ValueError` if the sampler has no batch."""
        if not len(self):
            raise ValueError(
                f"Expected at least {self.effective_batch_size} training samples, one global batch, got "
                f"{self.num_rows}. Reduce the batch size or set dataloader_drop_last: false."
            )

    def __iter__(self) -> Iterator[list[int]]:
        if self.is_over:
            return
        if self.strategy in BY_LENGTH:
            self.lengths = self.measure()
        order = self._order()
        for start in range(0, len(order), self.effective_batch_size):
            rows = order[start : start + self.effective_batch_size].tolist()
            is_full = len(rows) == self.effective_batch_size
            if is_full and self.strategy == "batch_rebalance":
                yield from self._yield_global_batch(rows)
            elif is_full or not self.drop_last:
                yield from self._split_global_batch(rows)

    def _order(self) -> torch.LongTensor:
        """Return the rows of the epoch as a tensor, because a list takes five times the memory."""
        generator = keyed_generator(self.seed, self.epoch, "order")
        if self.strategy == "sequential":
            return torch.arange(self.num_rows)
        if self.strategy != "group_by_length":
            return torch.randperm(self.num_rows, generator=generator)
        grouped_rows = get_length_grouped_indices(self.lengths, self.effective_batch_size, generator=generator)
        # Each group is one global batch. The groups are shuffled, because they are sorted by length.
        order = []
        for group in torch.randperm(self.num_full_batches, generator=generator).tolist():
            start = group * self.effective_batch_size
            order += grouped_rows[start : start + self.effective_batch_size]
        order += grouped_rows[len(order) :]
        return torch.tensor(order)

    def _split_global_batch(self, rows: list[int]) -> Iterator[list[int]]:
        """Yield the batches of this process from a global batch that is not rebalanced."""
        if self.strategy in BY_LENGTH:
            rows = sorted(rows, key=lambda row: self.lengths[row], reverse=True)
        rows_at_once = self.effective_batch_size // self.grad_accum
        for start in range(0, len(rows), rows_at_once):
            yield share(rows[start : start + rows_at_once], self.dp_size, self.rank)


class EpochBatchSampler(GlobalBatchSampler):
    """Sampler like [`GlobalBatchSampler`] of pairs of epoch and row, for models that need at least one row per batch.

    If the last rows of an epoch are fewer than the processes, the first rows of the epoch are repeated.
    """

    def _split_global_batch(self, rows: list[int]) -> Iterator[list[int]]:
        rows_at_once = self.effective_batch_size // self.grad_accum
        num_last_rows = len(rows) % rows_at_once
        if 0 < num_last_rows < self.dp_size:
            first_rows = itertools.cycle(self._order().tolist())
            num_missing_rows = self.dp_size - num_last_rows
            rows = rows + list(itertools.islice(first_rows, num_missing_rows))
        yield from super()._split_global_batch(rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in super().__iter__():
            yield [(self.epoch, row) for row in rows]


def share(rows: list, num_processes: int, process_index: int) -> list:
    """Return the part of `rows` that belongs to this process; parts differ by at most one row."""
    start = len(rows) * process_index // num_processes
    end = len(rows) * (process_index + 1) // num_processes
    return rows[start:end]


class RankStream(torch.utils.data.IterableDataset):
    """Stream of the rows of one process, for a data loader with the same `batch_size`.

    Every process reads the whole stream and takes its part of each global batch. With several workers, each worker does
    so with its shards of the stream. At the end, missing rows are `None`, which the collator ignores: each row is used
    once, and every process has the same number of batches, a multiple of `accumulation_steps`.

    Args:
        dataset: the stream. If it has a method `set_epoch`, the workers call it too.
        batch_size, accumulation_steps, num_processes, process_index, drop_last: see [`GlobalBatchSampler`].
        length: function that returns the length of a row. If given, rows of similar length in a global batch share a
            batch.
    """

    def __init__(
        self,
        dataset: torch.utils.data.IterableDataset,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        length: Callable[[dict[str, Any]], int] | None = None,
        drop_last: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.length = length
        self.drop_last = drop_last
        # Shared memory, so that persistent workers see changes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skip_batches = torch.zeros((), dtype=torch.int64).share_memory_()

    def skip(self, num_batches: int) -> None:
        """Yield empty batches first in the next epoch, so that skipped batches are not encoded."""
        self._skip_batches.fill_(num_batches)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        self.set_epoch(self._epoch.item())
        worker = torch.utils.data.get_worker_info()
        num_workers = 1 if worker is None else worker.num_workers
        # The loader takes batches from its workers in turn and leaves out workers that are at their end. Each of the
        # other workers has yielded at least this number of the batches to skip.
        num_skipped = self._skip_batches.item() // num_workers
        for index, batch in enumerate(self._batches()):
            if index < num_skipped:
                batch = []
            yield from batch
            yield from itertools.repeat(None, self.batch_size - len(batch))

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        rows_at_once = self.batch_size * self.num_processes
        global_batch_size = rows_at_once * self.accumulation_steps
        rows = iter(self.dataset)
        while global_batch := list(itertools.islice(rows, global_batch_size)):
            if self.drop_last and len(global_batch) < global_batch_size:
                return
            if self.length is not None:
                global_batch.sort(key=self.length, reverse=True)
            for start in range(0, global_batch_size, rows_at_once):
                yield self._split_rows(global_batch[start : start + rows_at_once])

    def _split_rows(self, rows: list) -> list:
        return share(rows, self.num_processes, self.process_index)


class EndlessBatches(torch.utils.data.IterableDataset):
    """Endless data set of the batches of a stream, one epoch after another.

    The number of steps in an epoch of a stream is not known in advance. For the Trainer all steps are one epoch, so
    that the number of trained steps determines the position of a resumed run.

    Args:
        loader: loader of the batches of one epoch of `stream`.
        stream: the stream, which can skip batches.
        begin: function called before each epoch with the epoch and the number of its first batch in the run.
        finalize: function from a batch and its number in the run to the final batch.
        epoch: epoch in which the run resumes.
        first_batch: number of that epoch's first batch in the run.
        num_trained: number of batches that the run has trained on, which the Trainer skips.
    """

    is_over = False

    def __init__(
        self,
        loader: torch.utils.data.DataLoader,
        stream: RankStream,
        begin: Callable[[int, int], None],
        finalize: Callable[[dict[str, Any], int], dict[str, Any]],
        epoch: int = 0,
        first_batch: int = 0,
        num_trained: int = 0,
    ):
        self.loader = loader
        self.stream = stream
        self.begin = begin
        self.finalize = finalize
        self.num_trained = num_trained
        self.starts = [(epoch, first_batch)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.is_over:
            return
        epoch, first_batch = self.starts[0]
        # The Trainer skips these batches of earlier epochs without looking at them.
        for _ in range(first_batch):
            yield {}
        while True:
            self.begin(epoch, first_batch)
            self.stream.skip(max(self.num_trained - first_batch, 0))
            number = first_batch
            for batch in self.loader:
                yield self.finalize(batch, number)
                number += 1
            if number == first_batch:
                return  # the stream is empty
            epoch += 1
            first_batch = number
            self.starts.append((epoch, first_batch))

    def start_of(self, num_trained: int) -> tuple[int, int]:
        """Return the epoch of a run after `num_trained` batches, and the number of its first batch."""
        return max((epoch, first_batch) for epoch, first_batch in self.starts if first_batch <= num_trained)


class WholeBatchStream(RankStream):
    """Stream for evaluation with the same batches as on one process; the last batch of a process may be empty."""

    def _split_rows(self, rows: list) -> list:
        start = self.process_index * self.batch_size
        return rows[start : start + self.batch_size]


class WholeBatchSampler(torch.utils.data.Sampler):
    """Sampler for evaluation with the same batches as on one process, in order.

    Each process has the same number of batches. Accelerate would fill the last batches with rows from the beginning,
    which would count twice; here they may be smaller or empty.
    """

    def __init__(self, num_rows: int, batch_size: int, num_processes: int, process_index: int, drop_last: bool = False):
        self.num_rows = num_rows // batch_size * batch_size if drop_last else num_rows
        self.rows_at_once = batch_size
        self.num_processes = num_processes
        self.process_index = process_index

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.rows_at_once * self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        for round_number in range(len(self)):
            batch_number = round_number * self.num_processes + self.process_index
            start = batch_number * self.rows_at_once
            end = min(start + self.rows_at_once, self.num_rows)
            yield list(range(start, end))


def gather_rows(values: Any, num_rows: int, most_rows: int) -> Any:
    """Gather the rows of all processes in the order of the processes, for batches that may be uneven or empty.

    Args:
        values: tensor or nested tensors of shape `(rows, …)`, of which the first `num_rows` rows are gathered. A tensor
            without dimensions is gathered from all processes.
        num_rows: number of rows of this process.
        most_rows: largest number of rows of any process.

    Returns:
        The same structure with the rows of all processes.
    """
    rows_of_processes = gather_object([num_rows])
    is_row = torch.cat([torch.arange(most_rows) < count for count in rows_of_processes])

    def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return gather(tensor)
        tensor = tensor[:most_rows]
        num_missing_rows = most_rows - len(tensor)
        padding = tensor.new_zeros(num_missing_rows, *tensor.shape[1:])
        gathered = gather(torch.cat([tensor, padding]))
        return gathered[is_row.to(gathered.device)]

    return recursively_apply(gather_tensor, values)


class StepSampler(GlobalBatchSampler):
    """Sampler like [`GlobalBatchSampler`] of pairs of a row and its optimizer step, counted from 0 over the run."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_step = self.epoch * self.num_global_batches
        for index, rows in enumerate(super().__iter__()):
            yield [(row, first_step + index // self.grad_accum) for row in rows]


class StepRows(torch.utils.data.Dataset):
    """Map-style data set indexed by the pairs of a [`StepSampler`]; each row has its step under the key `STEP`."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__([index for index, _ in pairs])
        return [{**row, STEP: step} for row, (_, step) in zip(rows, pairs)]


class StepStream(RankStream):
    """Stream like [`RankStream`] in which each row has its optimizer step under the key `STEP`.

    The loader takes batches from its workers in turn, and a worker does not know when another worker is at its end.
    `STEP` is therefore the latest possible step of the batch, and `EARLIEST_STEP` the earliest, see [`RowKeeper`]. The
    workers of a split mixture have no end, so that both are equal.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_endless = getattr(self.dataset, "is_split", False)
        self._first_step = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin(self, first_step: int) -> None:
        """Set the first step of the next epoch."""
        self._first_step.fill_(first_step)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info()
        worker_index = 0 if worker is None else worker.id
        num_workers = 1 if worker is None else worker.num_workers
        first_step = self._first_step.item()
        for index, rows in enumerate(super()._batches()):
            latest = first_step + (index * num_workers + worker_index) // self.accumulation_steps
            if self.is_endless:
                earliest = latest
            else:
                earliest = first_step + index // self.accumulation_steps
            yield [{**row, STEP: latest, EARLIEST_STEP: earliest} for row in rows]


class RowKeeper:
    """Collator of the rows of a [`StepStream`] that keeps the rows of a batch whose step is uncertain.

    A batch that is encoded for a step may turn out to belong to an earlier step with other drop ratios. Such a batch
    has its rows under the key `rows`, and the trainer, which knows the step, encodes them again if necessary.
    """

    def __init__(self, collator: ViTPDataCollator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any] | None]) -> dict[str, Any]:
        batch = self.collator(examples)
        rows = [row for row in examples if row is not None]
        if not rows:
            return batch
        drop_ratios_at = self.collator.drop_ratios_at
        if drop_ratios_at(rows[0][EARLIEST_STEP]) != drop_ratios_at(rows[0][STEP]):
            batch[ROWS] = rows
        return batch
