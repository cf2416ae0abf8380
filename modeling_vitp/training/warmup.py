"""VRL's warm-up: rows that know, where they are encoded, which optimizer step they are trained in.

The batch sampler or the stream counts batches, so neither prefetching nor workers, gradient accumulation, processes or
a restart can change what a row is told.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..instructions.collator import STEP, ViTPDataCollator
from .batching import GlobalBatchSampler, RankStream
from .checkpointing import last_checkpoint, read_checkpoint_record

ROWS = "rows"
EARLIEST_STEP = "_earliest_step"


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
        """Says, before an epoch, which step it begins with."""
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


def default_warmup(args: Any, data: Dataset | IterableDataset) -> int:
    """The steps of the warm-up of a language model from scratch if they are not given: half of all.

    A run that goes on, perhaps to another number of steps, keeps those that it began with.

    Args:
        args: [`ViTPTrainingConfig`].
        data: what is trained on, of which the number of steps follows where `max_steps` does not say it.
    """
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    if checkpoint is not None:
        settings = read_checkpoint_record(checkpoint).get("settings") or {}
        return settings.get("fixed", {}).get("vrl_warmup_steps") or 0
    if args.max_steps > 0 or isinstance(data, IterableDataset):  # of a stream, max_steps is required
        return max(args.max_steps, 0) // 2
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_batches = len(data) // batch_size if args.dataloader_drop_last else math.ceil(len(data) / batch_size)
    return math.ceil(args.num_train_epochs * num_batches) // 2
