"""The first rows of what is trained on: what they are, and whether they can be used, before the training begins."""

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from .collator import STEP, ViTPDataCollator
from .mixture import MixtureDataset, MixtureStream, name_row
from .rows import images_of, prepare_rows
from .schemas import schema_name
from .sources import Source, all_rows, schema_of

LOOKED_AT = 16
CHECKED = 200  # of each source
SECONDS = 20.0
MOST_PROCESSES = 16

Rows = Dataset | IterableDataset


def describe_schemas(dataset: Rows) -> list[str]:
    """Return a line of what the rows are, and of how many images they have; for a mixture one for each source.

    Raises:
        ValueError: if the rows of a stream, which is not read before, make no conversations.
    """
    if not isinstance(dataset, MixtureDataset | MixtureStream):
        return [f"reads: {describe_part(dataset, schema_name(dataset))}"]
    lines = []
    for source, part in zip(dataset.mixture.sources, dataset.parts):
        lines.append(f"reads {source.name}: {describe_part(part, schema_of_part(source, part))}")
    return lines


def schema_of_part(source: Source, part: Rows) -> str:
    """Return what the rows of a source of a mixture are; of a stream it is opened for that."""
    is_made = isinstance(part, Dataset) and part.format["type"] == "custom"
    return schema_name(part) if is_made else schema_of(source)


def describe_part(dataset: Rows, schema: str) -> str:
    is_stream = isinstance(dataset, IterableDataset)
    first = itertools.islice(prepare_rows(dataset), LOOKED_AT)  # which leaves images encoded
    counts = [len(images_of(row)) for row in first if not row.get("error")]
    least, most = min(counts, default=0), max(counts, default=0)
    number = f"{least}" if least == most else f"{least} to {most}"
    images = "no images" if most == 0 else f"{number} image{'s' if number != '1' else ''} a row"
    return f"{schema}, {'a stream' if is_stream else f'{len(dataset):,} rows'}, {images}"


def check_rows(
    dataset: Rows,
    collator: ViTPDataCollator,
    most_rows: int | None = None,
    seconds: float = SECONDS,
    in_processes: bool = False,
) -> str:
    """Encode the first 200 rows of each source, or all if that takes no longer than `seconds`; says what was done.

    Rows are encoded as for the first step, which under VRL's warm-up makes them longest. Nothing is drawn that training
    draws later.

    Args:
        most_rows: that are needed at all.
        seconds: after which it ends in any case.
        in_processes: whether other processes may encode, one for each core, at most 16; a stream is read by this one.

    Raises:
        ValueError: names the first row that cannot be used, unless the collator skips such rows.
    """
    length = number_of_rows(dataset)
    num_sources = len(dataset.parts) if isinstance(dataset, MixtureDataset | MixtureStream) else 1
    first, start = CHECKED * num_sources, time.monotonic()
    done = skipped = 0
    with drawing_nothing(), closing(errors(dataset, collator, most_rows, in_processes)) as found:
        for error in found:
            if error is not None and collator.on_error == "raise":
                raise error
            skipped += error is not None
            done += 1
            passed = time.monotonic() - start
            whole = passed / done * length if length is not None and done >= first else 0.0
            if passed > seconds or (done >= first and (length is None or whole > seconds)):
                break
    rows = f"all {done:,} rows" if done == length else f"{done:,} of {length:,} rows" if length else f"{done:,} rows"
    unfit = f"; {skipped:,} of them cannot be used and are replaced (on_error: skip)" if skipped else ""
    return f"checked: {rows} encoded in {time.monotonic() - start:.1f} s{unfit}"


def errors(
    dataset: Rows, collator: ViTPDataCollator, most_rows: int | None, in_processes: bool
) -> Iterator[ValueError | None]:
    """Yield of each row in turn, why it cannot be used, or `None`."""
    # A process that is not forked would import everything first, which takes longer than most checks.
    if in_processes and number_of_rows(dataset) is not None and multiprocessing.get_start_method() == "fork":
        rows, num_workers = RowErrors(dataset, collator), min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        places = itertools.islice(rows.places(), most_rows)
        yield from DataLoader(rows, batch_size=None, sampler=places, num_workers=num_workers)
    else:
        yield from map(partial(error_of, collator), itertools.islice(in_turn(dataset), most_rows))


def error_of(collator: ViTPDataCollator, row: dict) -> ValueError | None:
    try:
        collator.encode({**row, STEP: 0})
    except ValueError as error:
        return error
    return None


class RowErrors(torch.utils.data.Dataset):
    """By source and number, why a row cannot be used; for processes that each read some of the rows."""

    def __init__(self, dataset: Dataset, collator: ViTPDataCollator):
        self.is_mixture = isinstance(dataset, MixtureDataset)
        self.parts = dataset.parts if self.is_mixture else [dataset]
        self.collator = collator

    def places(self) -> Iterator[tuple[int, int]]:
        """In turn, see [`in_turn`]."""
        for number in range(max(map(len, self.parts))):
            yield from ((source, number) for source, part in enumerate(self.parts) if number < len(part))

    def __getitem__(self, place: tuple[int, int]) -> ValueError | None:
        source, number = place
        row = self.parts[source][number]
        return error_of(self.collator, name_row(row, copy=0) if self.is_mixture else row)


def number_of_rows(dataset: Rows) -> int | None:
    """Return the number of rows of all sources, each counted once; `None` of a stream."""
    parts = dataset.parts if isinstance(dataset, MixtureDataset | MixtureStream) else [dataset]
    return None if any(isinstance(part, IterableDataset) for part in parts) else sum(map(len, parts))


def in_turn(dataset: Rows) -> Iterator[dict]:
    """Yield the rows from the first on, those of a mixture from each source in turn."""
    if not isinstance(dataset, MixtureDataset | MixtureStream):
        yield from dataset
        return
    parts = [all_rows(part) if isinstance(part, IterableDataset) else iter(part) for part in dataset.parts]
    for rows in itertools.zip_longest(*(map(partial(name_row, copy=0), part) for part in parts)):
        yield from (row for row in rows if row is not None)


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """Leave the generators of torch, NumPy and Python as they were, which a user's transform may draw from."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def replacement_rows(dataset: Dataset | IterableDataset, num_rows: int = 64) -> Dataset | list[dict]:
    """Return rows that may take the place of those that are skipped: any, or of a stream the first."""
    return dataset if isinstance(dataset, Dataset) else list(itertools.islice(dataset, num_rows))
