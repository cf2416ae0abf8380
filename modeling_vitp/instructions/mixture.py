"""Sampling from a mixture: which rows of each source an epoch has, and in which order.

A source with `n` rows and the rate `r` gives `n * r` rows an epoch, rounded half up, with r read as the decimal that
was written: every row `floor(r)` times, and the rest as a random part without repetition. The part and the order are
functions of (seed, epoch) alone; with `resample: once` the part is a function of the seed.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from datasets.table import InMemoryTable
from tqdm import tqdm

from ..vrl import keyed_generator
from .mixture_file import Mixture, Source
from .rows import FEATURES
from .sources import all_rows, read_source, stream_rows

logger = logging.getLogger(__name__)
EMPTY_PASSES = 100  # after so many over a part without a row, by a low rate, it is taken to have none
EMPTY = 2**20  # rows of a mixture that share their memory: what they hold is in the sources


def effective_rows(source: Source, num_rows: int) -> int:
    """Rows that a source gives an epoch: rounded half up, or down where the released code is followed."""
    half = 0 if source.first_rows else Fraction(1, 2)
    return math.floor(num_rows * Fraction(str(source.rate)) + half)


def draw(source: Source, num_rows: int, *key: object) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The rows of a source that an epoch has, and for each the number of its copy, from 0.

    Args:
        key: what a random part depends on, beside the name of the source.

    Returns:
        Tensors of shape `(effective_rows,)`, in order of the copies: int64 and int32.
    """
    whole, part = divmod(effective_rows(source, num_rows), num_rows)
    if source.first_rows:
        rest = torch.arange(part)
    else:
        rest = torch.randperm(num_rows, generator=keyed_generator(*key, source.name, "draw"))[:part]
    rows = torch.cat([torch.arange(num_rows).repeat(whole), rest])
    return rows, torch.arange(len(rows)).div_(num_rows, rounding_mode="floor").to(torch.int32)


def draw_from_stream(rows: Iterable, source: Source, *key: object, is_part: bool = False) -> Iterator[tuple[dict, int]]:
    """The same for a stream whose length is not known: yields rows, and for each the number of its copy.

    With the fractional part of the rate `p / q` in lowest terms, p of every q rows are taken at random; no more than p
    rows are held at a time. Of the last q or fewer so many that the number of all is rounded half up, or of one part of
    a stream at random, so that all parts together have about as many as they should.
    """
    if source.first_rows and source.rate < 1:
        yield from ((row, 0) for row in itertools.islice(rows, effective_rows(source, source.rows)))
        return
    whole, part = divmod(Fraction(str(source.rate)), 1)
    generator = keyed_generator(*key, source.name, "draw")
    held, seen = [], 0
    for row in rows:
        yield from ((row, copy) for copy in range(whole))
        if not part:
            continue
        seen += 1
        place = seen - 1 if seen <= part.numerator else torch.randint(seen, (), generator=generator).item()
        if place < part.numerator:
            held[place : place + 1] = [row]
        if seen == part.denominator:
            yield from ((row, whole) for row in held)
            held, seen = [], 0
    half = torch.rand((), generator=generator).item() if is_part else Fraction(1, 2)
    num_last = math.floor(seen * part + half)
    yield from ((held[place], whole) for place in torch.randperm(len(held), generator=generator)[:num_last].tolist())


def draw_and_shuffle(
    dataset: Dataset, source: Source, generator: torch.Generator, *key: object, parts: int = 1, part: int = 0
) -> Iterator[tuple[dict, int]]:
    """What `draw` draws from a map-style source, or one of several parts of it, read in random order."""
    rows, copies = (values[part::parts] for values in draw(source, len(dataset), *key))
    for place in torch.randperm(len(rows), generator=generator).tolist():
        yield dataset[rows[place].item()], copies[place].item()


def name_row(row: dict, copy: int) -> dict:
    """Ids are unique in the mixture, and each copy of a row has its own, so that each has a VRL draw of its own."""
    suffix = f"#{copy + 1}" if copy else ""
    return {**row, "id": f"{row['source']}/{row['id']}{suffix}"}


class MixtureDataset(Dataset):
    """The rows of one epoch of a mixture of map-style sources, in random order; `set_epoch` chooses the epoch.

    Its length is the same in every epoch. Rows are read from their sources when they are asked for.

    Args:
        mixture: what is mixed, and how.
        parts: the rows of each source, in the order of the mixture.
        seed: of the draws and the order.
    """

    def __init__(self, mixture: Mixture, parts: list[Dataset], seed: int):
        self.mixture, self.parts, self.seed = mixture, parts, seed
        num_rows = sum(effective_rows(source, len(part)) for source, part in zip(mixture.sources, parts))
        super().__init__(InMemoryTable(no_content(num_rows)), info=DatasetInfo(features=FEATURES))
        # In shared memory, so that persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._order = None
        self._lengths = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Source (int16), row (int64) and copy (int32) at each place of this epoch, of shape `(num_rows,)` each."""
        epoch = self._epoch.item()
        if self._order is None or self._order[0] != epoch:
            key = (self.seed, epoch if self.mixture.resample == "epoch" else "once")
            drawn = [draw(source, len(part), *key) for source, part in zip(self.mixture.sources, self.parts)]
            sources = [torch.full_like(rows, index, dtype=torch.int16) for index, (rows, _) in enumerate(drawn)]
            sources, (rows, copies) = torch.cat(sources), (torch.cat(columns) for columns in zip(*drawn))
            del drawn
            places = torch.randperm(len(rows), generator=keyed_generator(self.seed, epoch, "order"))
            self._order = epoch, (sources[places], rows[places], copies[places])
        return self._order[1]

    def lengths(self, measure: Callable[[Dataset], list[int]]) -> list[int]:
        """The length of each row of this epoch; `measure` gives those of all rows of a source."""
        if self._lengths is None:
            self._lengths = [measure(part) for part in self.parts]
        sources, rows, _ = (values.tolist() for values in self.order())
        return [self._lengths[source][row] for source, row in zip(sources, rows)]

    def __getitem__(self, key):
        """A row for a number; for a slice or several numbers a dictionary of columns, for a name a column."""
        if isinstance(key, str):
            return [row[key] for row in self]
        if not isinstance(key, int):
            rows = self.__getitems__(range(len(self))[key] if isinstance(key, slice) else key)
            return {name: [row[name] for row in rows] for name in self.column_names}
        if not -len(self) <= key < len(self):
            raise IndexError(f"row {key} of a mixture of {len(self)} rows")
        source, row, copy = (values[key].item() for values in self.order())
        return name_row(self.parts[source][row], copy)

    def __getitems__(self, keys: Iterable[int]) -> list[dict]:
        return [self[int(key)] for key in keys]

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def no_content(num_rows: int) -> pa.Table:
    """A table of so many empty rows, which all lie in the same memory."""
    whole, rest = divmod(num_rows, EMPTY)
    columns = []
    for field in FEATURES.arrow_schema:
        empty = pa.nulls(min(EMPTY, num_rows), field.type)
        columns.append(pa.chunked_array([empty] * whole + [empty[:rest]] * (rest > 0), field.type))
    return pa.table(columns, FEATURES.arrow_schema)


class MixtureStream(IterableDataset):
    """The rows of a mixture of which some source is streamed; `set_epoch` chooses the epoch.

    Sources are drawn from at random, in proportion to the rows that each has still to give, and the result is shuffled
    in a buffer. Every worker of a data loader reads the whole stream and keeps its share of it, so that what an epoch
    has depends on neither their number nor the number of processes.

    With `split_streams` every worker of every process that trains has a part of each source, see
    [`~modeling_vitp.instructions.sources.stored_rows`] for what it reads. Such a part has no end, since parts are not
    equally long and no process may wait for another: after its last row it begins again, and draws afresh as in another
    epoch. What a step trains on then depends on the number of processes and workers, too.

    Args:
        mixture: what is mixed, and how.
        parts: the rows of each source, in the order of the mixture.
        seed: of the draws and the order.
    """

    _process: tuple[int, int] | None = None

    def __init__(self, mixture: Mixture, parts: list[Dataset | IterableDataset], seed: int):
        self.mixture, self.parts, self.seed = mixture, parts, seed
        super().__init__(ExamplesIterable(lambda: iter(()), {}), info=DatasetInfo(features=FEATURES))

    @property
    def is_split(self) -> bool:
        """Whether a process that trains takes [`of_process`], and not its share of all rows."""
        return self.mixture.split_streams

    def of_process(self, num_processes: int, process_index: int) -> "MixtureStream":
        """The part of a process, which its workers share."""
        stream = MixtureStream(self.mixture, self.parts, self.seed)
        stream._process = num_processes, process_index
        return stream

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self._process is None:
            return itertools.islice(self._shuffled(self.epoch), first, None, step)
        num_processes, process_index = self._process
        return self._endless(num_processes * step, process_index * step + first)

    def _endless(self, parts: int, part: int) -> Iterator[dict]:
        empty = 0
        for passes in itertools.count():
            empty += 1
            for row in self._shuffled(self.epoch + passes, parts, part, passes):
                yield row
                empty = 0
            if empty == EMPTY_PASSES:
                raise ValueError(
                    f"split_streams: there are no rows for one of {parts} workers. Start fewer processes or workers, "
                    "or leave split_streams out."
                )

    def _shuffled(self, epoch: int, *part: int) -> Iterator[dict]:
        generator = keyed_generator(self.seed, epoch, "buffer", *part)
        return shuffle_in_buffer(self._mixed(epoch, *part), self.mixture.shuffle_buffer, generator)

    def _mixed(self, epoch: int, parts: int = 1, part: int = 0, passes: int = 0) -> Iterator[dict]:
        """The rows of an epoch, or of one of so many parts of them, after so many passes over it with the same ids."""
        split = (parts, part) if parts > 1 else ()
        key = (self.seed, epoch if self.mixture.resample == "epoch" else "once")
        generator = keyed_generator(self.seed, epoch, "order", *split)
        streams, left = [], []
        for source, rows in zip(self.mixture.sources, self.parts):
            if isinstance(rows, Dataset):
                stream = draw_and_shuffle(rows, source, generator, *key, parts=parts, part=part)
                number = effective_rows(source, len(rows)) / parts
            elif parts == 1:
                stream, number = draw_from_stream(all_rows(rows), source, *key), effective_rows(source, source.rows)
            else:
                source = dataclasses.replace(source, rows=math.ceil(source.rows / parts))
                stream = draw_from_stream(stream_rows(source, parts, part), source, *key, *split, is_part=True)
                number = effective_rows(source, source.rows)
            streams.append((stream, passes * math.ceil(source.rate)))
            left.append(number)
        left = torch.tensor(left, dtype=torch.float64).clamp(min=1)
        while left.any():
            index = torch.multinomial(left, 1, generator=generator).item()
            stream, copies_before = streams[index]
            drawn = next(stream, None)
            if drawn is None:
                left[index] = 0
            else:
                row, number = drawn
                yield name_row(row, copies_before + number)
                left[index] = max(left[index] - 1, 1)


def shuffle_in_buffer(rows: Iterable, size: int, generator: torch.Generator) -> Iterator:
    """Each row waits in a buffer of `size` rows until its place is drawn."""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = torch.randint(size, (), generator=generator).item()
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[place] for place in torch.randperm(len(buffer), generator=generator).tolist())


def open_mixture(mixture: Mixture, seed: int) -> MixtureDataset | MixtureStream:
    """Opens every source of a mixture, and mixes them.

    Raises:
        ValueError: names the source that is not there, cannot be read, or is empty.
    """
    parts = []
    for source in tqdm(mixture.sources, desc="Opening sources", disable=None):
        part = read_source(source)
        if isinstance(part, Dataset):
            if len(part) == 0:
                raise ValueError(f"Source {source.name!r}: {source.location} has no rows.")
            if source.rows not in (None, len(part)):
                logger.warning("Source %r has %d rows; the mixture says %d.", source.name, len(part), source.rows)
        parts.append(part)
    is_streamed = any(isinstance(part, IterableDataset) for part in parts)
    if mixture.split_streams and not is_streamed:
        logger.warning("split_streams changes nothing: no source is streamed.")
    return (MixtureStream if is_streamed else MixtureDataset)(mixture, parts, seed)
