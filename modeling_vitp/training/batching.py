"""Which rows make a batch: shards of processes, the batches of an optimizer step, and samples of like length together.

What is trained on in a step depends on the seed, the epoch and the size of the global batch, and on nothing else, but
where the streams of a mixture are split.
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
    """The batches of one process from a map-style data set.

    The order of an epoch is cut into global batches, one for each optimizer step, and each of these into the batches
    of the processes. The last global batch of an epoch may be smaller: it is shared out evenly, so that no row is
    seen twice or lost, every process has the same number of batches, and one may be empty.

    Args:
        num_rows: of the data set.
        batch_size: rows in a batch of one process; with "batch_rebalance" on average.
        accumulation_steps: batches of a process in an optimizer step.
        num_processes, process_index: of the processes, and which of them this is.
        seed: of the order, together with the epoch.
        strategy: "random"; "sequential"; "group_by_length", where the rows of an optimizer step are of like length;
            or "batch_rebalance", where an optimizer step has the rows that it has under "random", but those of like
            length share a batch, more short ones or fewer long ones, so that all batches cost about the same.
        lengths: called at the start of an epoch for the length of every row; for the last two strategies.
        drop_last: leaves the last global batch out if it is smaller.

    Attributes:
        is_over: whether no batch is wanted, for a run that is resumed after its last step.
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
            lengths=[],  # are measured when they are needed; a list of 10^8 takes gigabytes
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
        tail = 0 if self.drop_last else math.ceil(self.remainder / (self.effective_batch_size // self.grad_accum))
        return self.num_full_batches * self.grad_accum + tail

    def check_not_empty(self) -> None:
        """Raise a `ValueError` if there is no batch."""
        if not len(self):
            raise ValueError(
                f"{self.num_rows} sample(s) to train on are less than the {self.effective_batch_size} of one step: "
                "make batches smaller."
            )

    def __iter__(self) -> Iterator[list[int]]:
        if self.is_over:
            return
        if self.strategy in BY_LENGTH:
            self.lengths = self.measure()
        order = self._order()
        for start in range(0, len(order), self.effective_batch_size):
            rows = order[start : start + self.effective_batch_size].tolist()
            if len(rows) == self.effective_batch_size and self.strategy == "batch_rebalance":
                yield from self._yield_global_batch(rows)
            elif len(rows) == self.effective_batch_size or not self.drop_last:
                yield from self._deal(rows)

    def _order(self) -> torch.LongTensor:
        """Return the rows of the epoch; not as a list, which would take five times the memory."""
        generator = keyed_generator(self.seed, self.epoch, "order")
        if self.strategy == "sequential":
            return torch.arange(self.num_rows)
        if self.strategy != "group_by_length":
            return torch.randperm(self.num_rows, generator=generator)
        grouped = get_length_grouped_indices(self.lengths, self.effective_batch_size, generator=generator)
        # From here on a group is in one global batch; their order must not go from long to short.
        starts = self.effective_batch_size * torch.randperm(self.num_full_batches, generator=generator)
        full = [row for start in starts.tolist() for row in grouped[start : start + self.effective_batch_size]]
        return torch.tensor(full + grouped[len(full) :])

    def _deal(self, rows: list[int]) -> Iterator[list[int]]:
        """Yield this process's batches of a global batch that needs no balancing, or is too small for it."""
        if self.strategy in BY_LENGTH:
            rows = sorted(rows, key=lambda row: self.lengths[row], reverse=True)
        size = self.effective_batch_size // self.grad_accum
        for start in range(0, len(rows), size):
            yield share(rows[start : start + size], self.dp_size, self.rank)


class EpochBatchSampler(GlobalBatchSampler):
    """[`GlobalBatchSampler`] of indices that tell the epoch, for models that cannot do with an empty batch: where the
    rows that are left of an epoch are fewer than the processes, the first of it are seen again.
    """

    def _deal(self, rows: list[int]) -> Iterator[list[int]]:
        left = len(rows) % (self.effective_batch_size // self.grad_accum)
        if 0 < left < self.dp_size:
            rows = rows + list(itertools.islice(itertools.cycle(self._order().tolist()), self.dp_size - left))
        yield from super()._deal(rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in super().__iter__():
            yield [(self.epoch, row) for row in rows]


def share(rows: list, num_processes: int, process_index: int) -> list:
    """Return this process's even part of `rows`."""
    return rows[len(rows) * process_index // num_processes : len(rows) * (process_index + 1) // num_processes]


class RankStream(torch.utils.data.IterableDataset):
    """The rows of one process from a stream, for a data loader that takes `batch_size` of them at a time.

    Every process reads the stream, and takes its part of each global batch. With workers, the stream is what each of
    them reads. At the end, places without a row hold `None`, which the collator passes over: no row is seen twice or
    lost, and every process has the same number of batches, a whole number of optimizer steps.

    Args:
        dataset: the stream; its `set_epoch`, if it has one, is called in the workers too.
        batch_size, accumulation_steps, num_processes, process_index, drop_last: as for [`GlobalBatchSampler`].
        length: the length of a row. If given, rows of like length within a global batch share a batch.
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
        self.dataset, self.batch_size, self.accumulation_steps = dataset, batch_size, accumulation_steps
        self.num_processes, self.process_index = num_processes, process_index
        self.length, self.drop_last = length, drop_last
        # In shared memory, so that persistent workers see them change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skip_batches = torch.zeros((), dtype=torch.int64).share_memory_()

    def skip(self, num_batches: int) -> None:
        """Leave the first batches of the next epoch empty, so that they need not be encoded."""
        self._skip_batches.fill_(num_batches)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        self.set_epoch(self._epoch.item())
        worker = torch.utils.data.get_worker_info()
        # Batches come from the workers in turn. A worker that is at its end drops out, so others may have given more
        # of those to skip, but none that is not at its end fewer.
        num_skipped = self._skip_batches.item() // (1 if worker is None else worker.num_workers)
        for index, batch in enumerate(self._batches()):
            batch = batch if index >= num_skipped else []
            yield from batch
            yield from itertools.repeat(None, self.batch_size - len(batch))

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        size = self.batch_size * self.num_processes
        rows = iter(self.dataset)
        while group := list(itertools.islice(rows, size * self.accumulation_steps)):
            if self.drop_last and len(group) < size * self.accumulation_steps:
                return
            if self.length is not None:
                group.sort(key=self.length, reverse=True)
            for start in range(0, size * self.accumulation_steps, size):
                yield self._own(group[start : start + size])

    def _own(self, rows: list) -> list:
        return share(rows, self.num_processes, self.process_index)


class EndlessBatches(torch.utils.data.IterableDataset):
    """The batches of a stream, epoch after epoch: a data set of batches without an end.

    How many steps an epoch of a stream has is not known beforehand. To the Trainer all steps are one epoch, so that the
    number of steps alone says where a run goes on.

    Args:
        loader: makes the batches of one epoch of `stream`.
        stream: passes over batches that are not needed.
        begin: called with the number of an epoch and that of its first batch before the epoch begins.
        settle: called with a batch and its number in the run, for the batch that is trained on.
        epoch, first_batch: the epoch to go on in, and the number of its first batch in the run.
        num_trained: batches that the run has trained on. The Trainer passes over as many.
    """

    is_over = False

    def __init__(
        self,
        loader: torch.utils.data.DataLoader,
        stream: RankStream,
        begin: Callable[[int, int], None],
        settle: Callable[[dict[str, Any], int], dict[str, Any]],
        epoch: int = 0,
        first_batch: int = 0,
        num_trained: int = 0,
    ):
        self.loader, self.stream, self.begin, self.settle = loader, stream, begin, settle
        self.num_trained = num_trained
        self.starts = [(epoch, first_batch)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.is_over:
            return
        epoch, first_batch = self.starts[0]
        yield from ({} for _ in range(first_batch))
        while True:
            self.begin(epoch, first_batch)
            self.stream.skip(max(self.num_trained - first_batch, 0))
            last = first_batch
            for batch in self.loader:
                yield self.settle(batch, last)
                last += 1
            if last == first_batch:
                return  # there is no row
            epoch, first_batch = epoch + 1, last
            self.starts.append((epoch, first_batch))

    def start_of(self, num_trained: int) -> tuple[int, int]:
        """Return the epoch that a run is in after so many batches, and the number of its first batch."""
        return max(start for start in self.starts if start[1] <= num_trained)


class WholeBatchStream(RankStream):
    """For evaluation: the batches are those of one process, and at the end a process may have an empty one."""

    def _own(self, rows: list) -> list:
        return rows[self.process_index * self.batch_size : (self.process_index + 1) * self.batch_size]


class WholeBatchSampler(BatchRebalanceSampler):
    """For evaluation on several processes: the batches are those of one, in order, and each process has as many.

    accelerate fills the last ones with rows from the beginning, which then count twice; here they may be empty.
    """

    def __init__(self, num_rows: int, batch_size: int, num_processes: int, process_index: int, drop_last: bool = False):
        self.num_rows = num_rows // batch_size * batch_size if drop_last else num_rows
        self.rows_at_once, self.num_processes, self.process_index = batch_size, num_processes, process_index

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.rows_at_once * self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.process_index, len(self) * self.num_processes, self.num_processes):
            start = batch * self.rows_at_once
            yield list(range(start, min(start + self.rows_at_once, self.num_rows)))


def gather_rows(values: Any, num_rows: int, most_rows: int) -> Any:
    """Gather the rows of all processes, one process after the other, whose batches may be uneven or empty.

    Args:
        values: tensors, perhaps nested, of shape `(rows, …)`, of which the first `num_rows` count; of one without
            dimensions all are gathered.
        num_rows: of this process.
        most_rows: of any.

    Returns:
        The same with rows of all processes.
    """
    counts = gather_object([num_rows])
    is_row = torch.cat([torch.arange(most_rows) < count for count in counts])

    def of_all(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return gather(tensor)
        tensor = tensor[:most_rows]
        padded = torch.cat([tensor, tensor.new_zeros(most_rows - len(tensor), *tensor.shape[1:])])
        return gather(padded)[is_row.to(tensor.device)]

    return recursively_apply(of_all, values)


class StepSampler(GlobalBatchSampler):
    """The same batches, of pairs: a row, and the optimizer step that it is for, counted from the run's first as 0."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_step = self.epoch * self.num_global_batches
        for index, rows in enumerate(super().__iter__()):
            yield [(row, first_step + index // self.grad_accum) for row in rows]


class StepRows(torch.utils.data.Dataset):
    """The rows of a map-style data set by the pairs of a [`StepSampler`], each with its step under `STEP`."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__([row for row, _ in pairs])
        return [{**row, STEP: step} for row, (_, step) in zip(rows, pairs)]


class StepStream(RankStream):
    """The same stream, each row with its step under `STEP`.

    The batches come from the workers in turn, and a worker cannot know when another one is at its end and gives no more
    of them. So the step is the latest that the batch may be for, with the earliest beside it; see [`RowKeeper`]. Of a
    split mixture no worker has an end, and they are the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_endless = getattr(self.dataset, "is_split", False)
        self._first_step = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin(self, first_step: int) -> None:
        """Say, before an epoch, which step it begins with."""
        self._first_step.fill_(first_step)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info()
        place, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first_step = self._first_step.item()
        for index, rows in enumerate(super()._batches()):
            step = first_step + (index * num_workers + place) // self.accumulation_steps
            earliest = step if self.is_endless else first_step + index // self.accumulation_steps
            yield [{**row, STEP: step, EARLIEST_STEP: earliest} for row in rows]


class RowKeeper:
    """A collator of the rows of a [`StepStream`] whose batches keep their rows, under `rows`, as long as they may turn
    out to be for a step of the warm-up though they were encoded for a later one. The trainer, which knows the step,
    then has them encoded again.
    """

    def __init__(self, collator: ViTPDataCollator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any] | None]) -> dict[str, Any]:
        batch = self.collator(examples)
        rows = [row for row in examples if row is not None]
        if rows and rows[0][EARLIEST_STEP] < self.collator.vrl_warmup_steps <= rows[0][STEP]:
            batch[ROWS] = rows
        return batch
