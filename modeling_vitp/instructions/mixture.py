"""Mixtures: the mixture file with sources and their rates, the rows of an epoch, and a check of the first rows.

A source with `n` rows and the rate `r` contributes `n * r` rows to an epoch, rounded half up: each row `floor(r)`
times, and a random part without repetition for the rest. The rate is interpreted as an exact decimal. The part and the
order depend on (seed, epoch) alone; with `resample: once`, the part depends on the seed alone.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import yaml
from datasets import Dataset, DatasetInfo, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from datasets.table import InMemoryTable
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..command.paths import expanded_home, looks_like_path, not_there, read_yaml
from ..command.settings import PositiveInt, check_keys, check_value, from_mapping
from ..vrl import keyed_generator
from .collator import STEP, ViTPDataCollator
from .rows import FEATURES, images_of, prepare_rows
from .schemas import schema_name
from .sources import (
    Source,
    all_rows,
    holds_rows,
    read_source,
    schema_of,
    source_of,
    stream_rows,
    with_local_annotation,
)

logger = logging.getLogger(__name__)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.yaml)(?<!\.yml)(?<!\.json)")
EMPTY_PASSES = 100  # Number of passes without a row, possible at a low rate, after which an error is raised.
LOOKED_AT = 16  # Number of rows of a source that are read to describe its images.
CHECKED = 200  # Number of rows of each source that are checked.
CHECK_SECONDS = 20.0
MOST_PROCESSES = 16
MOST_HELD = 1000  # Number of rows of a stream that are held to draw some of them.

Rows = Dataset | IterableDataset

# Keys of the released meta JSON, mapped to those of a mixture file.
META_KEYS = {
    "root": "image_root",
    "annotation": "annotation",
    "repeat_time": "rate",
    "length": "rows",
    "max_dynamic_patch": "max_patches",
    "force_image_size": "image_size",
    "data_augment": "data_augment",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Settings of a mixture beside its sources.

    Args:
        resample: "epoch" draws a new random part of a source with a fractional rate in each epoch, "once" keeps it.
        modalities: imaging modalities of the downstream tasks; each needs a source.
        detection: whether a downstream task may be detection, which needs a source of grounding.
        shuffle_buffer: size of the shuffle buffer of a stream, in rows.
        split_streams: whether each worker of each training process reads its own part, see [`MixtureStream`].
    """

    resample: Literal["epoch", "once"] = "epoch"
    modalities: tuple[str, ...] = ()
    detection: bool = True
    shuffle_buffer: PositiveInt = 1000
    split_streams: bool = False


@dataclasses.dataclass(frozen=True)
class Mixture(MixtureSettings):
    """Sources that are mixed, with the [`MixtureSettings`].

    Args:
        sources: the sources, with their rates.
    """

    sources: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class MixtureFile(MixtureSettings):
    """Content of a mixture file.

    Args:
        sources: fields of the [`Source`] of each source, or `meta`, the path of a released meta JSON.
        root: folder that paths are relative to.
        defaults: fields of the sources that do not set them.
        released_compatible: whether rates, sizes and JPEG compression are those of the released code.
    """

    sources: list[dict[str, Any]]
    root: str = ""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    released_compatible: bool = False


def load_mixture(mixture: str | Path | dict, parents: tuple[Path, ...] = ()) -> Mixture:
    """Read a mixture file and check all of its keys, without access to the data.

    Args:
        mixture: YAML file with `sources`, a recipe with such a mapping (or the path of such a file) under `mixture`, a
            released meta JSON, or the mapping itself.
        parents: files that lead to this one by their `mixture`, none of which it may name.

    Raises:
        ValueError: If a key is invalid. The message names the file, the source and the key.
    """
    origin = "mixture"
    if not isinstance(mixture, dict):
        origin = str(mixture)
        path = Path(mixture)
        mixture = read_mixture_file(path, origin)
        if isinstance(mixture, str):
            return load_named_mixture(mixture, (*parents, path))
    if not isinstance(mixture, dict) or not mixture.get("sources"):
        raise ValueError(f"{origin}: a mixture needs a list of `sources`.")
    file = from_mapping(MixtureFile, mixture, origin)
    root = Path(file.root)
    check_keys(f"{origin}, defaults", file.defaults, [field.name for field in dataclasses.fields(Source)])
    entries = []
    for index, entry in enumerate(file.sources):
        if "meta" in entry:
            entries += meta_entries(entry, root, f"{origin}, source {index}")
        else:
            entries.append(entry)
    sources = []
    for index, entry in enumerate(entries):
        location = f"{origin}, source {entry.get('name', index)!r}"
        sources.append(make_source({**file.defaults, **entry}, root, file.released_compatible, location))
    if file.released_compatible or any("data_augment" in entry for entry in entries):
        warn_of_differences(entries, file.released_compatible)
    check_sources(sources, origin, file.split_streams)
    settings = {}
    for field in dataclasses.fields(MixtureSettings):
        settings[field.name] = getattr(file, field.name)
    return Mixture(tuple(sources), **settings)


def read_mixture_file(path: Path, origin: str) -> Any:
    """Return the content of a mixture file, or the `mixture` of a recipe, which may be the path of another file."""
    if not path.is_file():
        raise ValueError(f"Mixture file {path} not found.")
    if path.suffix == ".json":
        return {"sources": [{"meta": origin}]}
    try:
        content = expanded_home(read_yaml(path))
    except Exception as error:  # The parser raises several types, for example for binary files or bad dates.
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if isinstance(content, dict) and "mixture" in content:
        return content["mixture"]
    # A text that is the whole file is no path of a mixture.
    return content if isinstance(content, dict) else None


def load_named_mixture(name: str, parents: tuple[Path, ...]) -> Mixture:
    """Load the mixture file that the last of the parents names."""
    path = parents[-1]
    if Path(name).exists() and any(map(Path(name).samefile, parents)):
        raise ValueError(f"`mixture` of {path} must be another file, got {name}.")
    try:
        return load_mixture(name, parents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_sources(sources: list[Source], origin: str, split_streams: bool) -> None:
    """Raise a `ValueError` if sources have the same name, or one of them cannot be split."""
    counts = Counter(source.name for source in sources)
    repeated_names = sorted(name for name, count in counts.items() if count > 1)
    if repeated_names:
        raise ValueError(f"{origin}: source names must be unique, got {repeated_names} more than once.")
    if not split_streams:
        return
    for source in sources:
        if source.streaming and source.first_rows and source.rate < 1:
            raise ValueError(
                f"{origin}: split_streams cannot be combined with released_compatible and a rate below 1, as in "
                f"{source.name!r}. Remove one of them."
            )


def make_source(
    entry: dict,
    root: Path,
    released_compatible: bool,
    where: str,
) -> Source:
    """Return the source of an entry of a mixture; raise a `ValueError` that names an invalid key."""
    entry = dict(entry)
    data_augment = entry.pop("data_augment", False)
    check_value(f"{where}: data_augment", data_augment, bool)
    if isinstance(entry.get("modality"), str):
        entry["modality"] = [entry["modality"]]
    for key in ("folder", "annotation", "image_root"):
        if entry.get(key) and isinstance(entry[key], str):
            entry[key] = str(root / entry[key])
    source = from_mapping(Source, entry, where)
    if released_compatible:
        source = dataclasses.replace(
            source,
            image_size=None,
            jpeg_degradation=data_augment,
            first_rows=True,
        )
    try:
        source.check(entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return source


def meta_entries(entry: dict, root: Path, origin: str) -> list[dict]:
    """Return the entries of a released meta JSON with the keys of a mixture file, and the other keys of `entry`."""
    if not isinstance(entry["meta"], str):
        raise ValueError(f"{origin}: meta must be the path of a file, got {entry['meta']!r}.")
    path = root / entry["meta"]
    common_fields = dict(entry)
    del common_fields["meta"]
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: the meta JSON {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{origin}: the meta JSON {path} must map names to sources, got {type(meta).__name__}.")
    entries = []
    for name, meta_fields in meta.items():
        if not isinstance(meta_fields, dict):
            raise ValueError(f"{origin}: {name!r} in {path} must be a mapping, got {str(meta_fields)[:80]!r}.")
        unknown = set(meta_fields) - set(META_KEYS)
        missing = {"root", "annotation"} - set(meta_fields)
        if unknown or missing:
            raise ValueError(
                f"{origin}: {name!r} in {path} has unknown keys {sorted(unknown)} and missing keys {sorted(missing)}."
            )
        fields = {**common_fields, "data_augment": False}
        for key, value in meta_fields.items():
            if value is not None:
                fields[META_KEYS[key]] = value
        fields["name"] = name
        entries.append(fields)
    return entries


def warn_of_differences(entries: list[dict], released_compatible: bool) -> None:
    """Log a warning for each setting that the released code handles differently."""
    warn_of_difference(
        "a rate below 1 takes {} rows",
        "random",
        "the first",
        [entry for entry in entries if entry.get("rate", 1) < 1],
        released_compatible,
    )
    warn_of_difference(
        "image_size is {}",
        "applied",
        "not read",
        [entry for entry in entries if entry.get("image_size")],
        released_compatible,
    )
    warn_of_difference(
        "data_augment {}",
        "is not applied, because the file does not specify it",
        "degrades images by JPEG compression of random quality",
        [entry for entry in entries if entry.get("data_augment")],
        released_compatible,
    )


def warn_of_difference(
    text: str,
    ours: str,
    theirs: str,
    entries: list[dict],
    released_compatible: bool,
) -> None:
    """Log what this package and the released code do for these entries, if there are any."""
    if not entries:
        return
    names = ", ".join(str(entry.get("name")) for entry in entries)
    if released_compatible:
        logger.warning("released_compatible: %s, not %s, in %s.", text.format(theirs), ours, names)
    else:
        logger.warning(
            "The released code differs: here %s, there %s, in %s. Set released_compatible: true to follow it.",
            text.format(ours),
            theirs,
            names,
        )


def load_sources(name: str) -> Mixture:
    """Load a mixture from a mixture file, a recipe with a mixture or `dataset_name`, or a `dataset_name`.

    Raises:
        ValueError: If the name is not found, or the mixture is invalid, see [`load_mixture`].
    """
    path = Path(name)
    fields = {}
    dataset_name = name
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            fields = recipe_without_mixture(path)
        dataset_name = fields.get("dataset_name")
    elif path.is_file():
        if path.suffix == ".json" and not holds_rows(path):
            dataset_name = None
    elif not path.is_dir() and (looks_like_path(name) or not HUB_ID.fullmatch(name)):
        raise ValueError(not_there(name))
    if not isinstance(dataset_name, str):
        return load_mixture(path)
    source = source_of(
        dataset_name,
        fields.get("dataset_train_split", "train"),
        fields.get("dataset_config"),
        fields.get("image_root"),
        columns=fields.get("columns") or {},
        prompt=fields.get("prompt"),
    )
    return Mixture((source,))


def recipe_without_mixture(path: Path) -> dict[str, Any]:
    """Return the fields of a recipe, or none if it has a mixture or cannot be read."""
    fields = None
    with contextlib.suppress(yaml.YAMLError):  # `load_mixture` raises an error for such files.
        fields = read_yaml(path)
    if isinstance(fields, dict) and "mixture" not in fields:
        return fields
    return {}


class MixtureDataset(Dataset):
    """Data set of the rows of one epoch of a mixture of map-style sources, in random order.

    Its length is the same in every epoch. `set_epoch` sets the epoch. Rows are read from their sources on access.

    Args:
        mixture: sources and settings of the mixture.
        parts: rows of each source, in the order of the mixture.
        seed: seed of the draws and the order.
    """

    def __init__(
        self,
        mixture: Mixture,
        parts: list[Dataset],
        seed: int,
    ):
        self.mixture = mixture
        self.parts = parts
        self.seed = seed
        num_rows = 0
        for source, source_rows in zip(mixture.sources, parts):
            num_rows += effective_rows(source, len(source_rows))
        # The rows are stored in the sources. Columns of the type null need no memory.
        empty_columns = {name: pa.nulls(num_rows) for name in FEATURES}
        super().__init__(InMemoryTable.from_pydict(empty_columns))
        self.info.features = FEATURES
        # Persistent workers see changes of the epoch because it is in shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._order = None
        self._lengths = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return source (int16), row (int64) and copy (int32) of each row of this epoch, each `(num_rows,)`."""
        epoch = self._epoch.item()
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._draw_order(epoch)
        return self._order[1]

    def _draw_order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw_key = epoch if self.mixture.resample == "epoch" else "once"
        source_parts = []
        row_parts = []
        copy_parts = []
        for index, (source, source_rows) in enumerate(zip(self.mixture.sources, self.parts)):
            rows, copies = draw_rows(source, len(source_rows), self.seed, draw_key)
            source_parts.append(torch.full_like(rows, index, dtype=torch.int16))
            row_parts.append(rows)
            copy_parts.append(copies)
        sources = torch.cat(source_parts)
        rows = torch.cat(row_parts)
        copies = torch.cat(copy_parts)
        # The parts are freed before the permutation, because a large mixture has gigabytes of indices.
        del source_parts, row_parts, copy_parts
        order = torch.randperm(len(rows), generator=keyed_generator(self.seed, epoch, "order"))
        return sources[order], rows[order], copies[order]

    def lengths(self, measure: Callable[[Dataset], list[int]]) -> list[int]:
        """Return the length of each row of this epoch; `measure` returns the lengths of all rows of a source."""
        if self._lengths is None:
            self._lengths = list(map(measure, self.parts))
        sources, rows, _ = self.order()
        return [self._lengths[source][row] for source, row in zip(sources.tolist(), rows.tolist())]

    def __getitem__(self, key):
        """Return the row of an index, the columns of a slice or several indices, or the column of a name."""
        if isinstance(key, str):
            return [row[key] for row in self]
        if not isinstance(key, int):
            indices = range(len(self))[key] if isinstance(key, slice) else key
            rows = self.__getitems__(indices)
            columns = {}
            for name in self.column_names:
                columns[name] = [row[name] for row in rows]
            return columns
        if not -len(self) <= key < len(self):
            raise IndexError(f"row {key} is out of range for a mixture of {len(self)} rows")
        sources, rows, copies = self.order()
        source_rows = self.parts[sources[key].item()]
        row = source_rows[rows[key].item()]
        return name_row(row, copies[key].item())

    def __getitems__(self, keys: Iterable[int]) -> list[dict]:
        return [self[int(key)] for key in keys]

    def __iter__(self) -> Iterator[dict]:
        for index in range(len(self)):
            yield self[index]


class MixtureStream(IterableDataset):
    """Stream of the rows of a mixture with at least one streaming source; `set_epoch` sets the epoch.

    Rows are drawn from the sources at random, in proportion to the remaining rows of each source, and then shuffled in
    a buffer. Each worker of a data loader reads the whole stream and keeps its share of it, so that the rows of an
    epoch depend on neither the number of workers nor the number of processes.

    With `split_streams`, each worker of each training process reads its own part of each source, see
    [`~modeling_vitp.instructions.sources.stored_rows`]. Parts differ in length and no process may wait for another.
    Therefore a part is endless: after its last row it starts again, with new draws as in another epoch. The rows of a
    training step then depend on the numbers of processes and workers.

    Args:
        mixture: sources and settings of the mixture.
        parts: rows of each source, in the order of the mixture.
        seed: seed of the draws and the order.
    """

    _process: tuple[int, int] | None = None

    def __init__(
        self,
        mixture: Mixture,
        parts: list[Dataset | IterableDataset],
        seed: int,
    ):
        self.mixture = mixture
        self.parts = parts
        self.seed = seed
        no_rows = ExamplesIterable(lambda: iter(()), {})  # The class yields its own rows.
        super().__init__(no_rows, info=DatasetInfo(features=FEATURES))

    @property
    def is_split(self) -> bool:
        """True if a training process uses [`of_process`] instead of its share of all rows."""
        return self.mixture.split_streams

    def of_process(self, num_processes: int, process_index: int) -> "MixtureStream":
        """Return the part of a process, which is shared by its workers."""
        stream = MixtureStream(self.mixture, self.parts, self.seed)
        stream._process = num_processes, process_index
        return stream

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        num_workers = 1 if worker is None else worker.num_workers
        if self._process is None:
            return itertools.islice(self._shuffled(self.epoch), worker_id, None, num_workers)
        num_processes, process_index = self._process
        return self._endless(num_processes * num_workers, process_index * num_workers + worker_id)

    def _endless(self, parts: int, part: int) -> Iterator[dict]:
        num_empty_passes = 0
        for passes in itertools.count():
            num_empty_passes += 1
            for row in self._shuffled(self.epoch + passes, parts, part, passes):
                yield row
                num_empty_passes = 0
            if num_empty_passes == EMPTY_PASSES:
                raise ValueError(
                    f"split_streams: one of {parts} workers has no rows. Use fewer processes or workers, or disable "
                    "split_streams."
                )

    def _shuffled(self, epoch: int, *part: int) -> Iterator[dict]:
        generator = keyed_generator(self.seed, epoch, "buffer", *part)
        return shuffle_in_buffer(self._mixed(epoch, *part), self.mixture.shuffle_buffer, generator)

    def _mixed(
        self,
        epoch: int,
        parts: int = 1,
        part: int = 0,
        passes: int = 0,
    ) -> Iterator[dict]:
        """Yield the rows of an epoch or of one of its parts; ids are numbered on from `passes` earlier passes."""
        part_key = (parts, part) if parts > 1 else ()
        generator = keyed_generator(self.seed, epoch, "order", *part_key)
        streams = []
        num_remaining = []
        for source, rows in zip(self.mixture.sources, self.parts):
            stream, num_rows = self._drawn(
                source,
                rows,
                epoch,
                parts,
                part,
                generator,
            )
            streams.append(stream)
            num_remaining.append(num_rows)
        num_remaining = torch.tensor(num_remaining, dtype=torch.float64).clamp(min=1)
        while num_remaining.any():
            index = torch.multinomial(num_remaining, 1, generator=generator).item()
            row, copy = next(streams[index], (None, None))
            if row is None:
                num_remaining[index] = 0
            else:
                copies_before = passes * math.ceil(self.mixture.sources[index].rate)
                yield name_row(row, copies_before + copy)
                num_remaining[index] = max(num_remaining[index] - 1, 1)

    def _drawn(
        self,
        source: Source,
        rows: Dataset | IterableDataset,
        epoch: int,
        parts: int,
        part: int,
        generator: torch.Generator,
    ) -> tuple[Iterator[tuple[dict, int]], float]:
        """Return the rows of a source that an epoch or one of its parts has, with copy numbers, and their number."""
        draw_key = (self.seed, epoch if self.mixture.resample == "epoch" else "once")
        if isinstance(rows, Dataset):
            stream = draw_and_shuffle(
                rows,
                source,
                generator,
                *draw_key,
                parts=parts,
                part=part,
            )
            return stream, effective_rows(source, len(rows)) / parts
        if parts == 1:
            stream = draw_from_stream(all_rows(rows), source, *draw_key)
            return stream, effective_rows(source, source.rows)
        source = dataclasses.replace(source, rows=math.ceil(source.rows / parts))
        rows_of_part = stream_rows(source, parts, part)
        stream = draw_from_stream(
            rows_of_part,
            source,
            *draw_key,
            parts,
            part,
            is_part=True,
        )
        return stream, effective_rows(source, source.rows)


def effective_rows(source: Source, num_rows: int) -> int:
    """Return the number of rows of a source in an epoch, rounded half up, or down in compatibility mode."""
    half = 0 if source.first_rows else Fraction(1, 2)
    return math.floor(num_rows * Fraction(str(source.rate)) + half)


def draw_rows(source: Source, num_rows: int, *key: object) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Return the row numbers of a source in an epoch, and the copy number of each row, from 0.

    Args:
        key: seed of the random part, in addition to the name of the source.

    Returns:
        Row numbers, int64 `(effective_rows,)`, in order of the copies, and copy numbers, int32 of the same shape.
    """
    num_passes, num_remaining = divmod(effective_rows(source, num_rows), num_rows)
    if source.first_rows:
        remaining_rows = torch.arange(num_remaining)
    else:
        generator = keyed_generator(*key, source.name, "draw")
        remaining_rows = torch.randperm(num_rows, generator=generator)[:num_remaining]
    rows = torch.cat([torch.arange(num_rows).repeat(num_passes), remaining_rows])
    copies = torch.arange(len(rows)).div_(num_rows, rounding_mode="floor")
    return rows, copies.to(torch.int32)


def draw_from_stream(
    rows: Iterable,
    source: Source,
    *key: object,
    is_part: bool = False,
) -> Iterator[tuple[dict, int]]:
    """Yield the rows of a stream of unknown length with the copy number of each row, from 0.

    If the fractional part of the rate is `p / q` in lowest terms, p of every q rows are drawn at random; at most p rows
    are kept in memory. If p is above `MOST_HELD`, the nearest fraction with a smaller p is used. For the last rows,
    fewer than q, the number is rounded half up. If `is_part`, it is rounded at random, so that the total over all parts
    is correct on average.
    """
    if source.first_rows and source.rate < 1:
        for row in itertools.islice(rows, effective_rows(source, source.rows)):
            yield row, 0
        return
    num_copies, fraction = divmod(Fraction(str(source.rate)), 1)
    if fraction.numerator > MOST_HELD:
        fraction = fraction.limit_denominator(math.floor(MOST_HELD / fraction))
    generator = keyed_generator(*key, source.name, "draw")
    # Reservoir sampling: each of the rows so far is in the reservoir with the same probability.
    reservoir = []
    num_candidates = 0
    for row in rows:
        for copy in range(num_copies):
            yield row, copy
        if not fraction:
            continue
        num_candidates += 1
        if num_candidates <= fraction.numerator:
            reservoir.append(row)
        else:
            index = torch.randint(num_candidates, (), generator=generator).item()
            if index < fraction.numerator:
                reservoir[index] = row
        if num_candidates == fraction.denominator:
            for drawn_row in reservoir:
                yield drawn_row, num_copies
            reservoir = []
            num_candidates = 0
    rounding = torch.rand((), generator=generator).item() if is_part else Fraction(1, 2)
    num_last = math.floor(num_candidates * fraction + rounding)
    for index in torch.randperm(len(reservoir), generator=generator)[:num_last].tolist():
        yield reservoir[index], num_copies


def draw_and_shuffle(
    dataset: Dataset,
    source: Source,
    generator: torch.Generator,
    *key: object,
    parts: int = 1,
    part: int = 0,
) -> Iterator[tuple[dict, int]]:
    """Yield the rows of [`draw_rows`] and their copy numbers, or one of several parts, in random order."""
    rows, copies = draw_rows(source, len(dataset), *key)
    rows = rows[part::parts]
    copies = copies[part::parts]
    for index in torch.randperm(len(rows), generator=generator).tolist():
        yield dataset[rows[index].item()], copies[index].item()


def name_row(row: dict, copy: int) -> dict:
    """Return a row with an id that is unique in the mixture, so that each copy of a row has its own VRL draw."""
    suffix = f"#{copy + 1}" if copy else ""
    return {**row, "id": f"{row['source']}/{row['id']}{suffix}"}


def shuffle_in_buffer(rows: Iterable, size: int, generator: torch.Generator) -> Iterator:
    """Yield rows in random order, shuffled in a buffer of `size` rows."""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        index = torch.randint(size, (), generator=generator).item()
        yield buffer[index]
        buffer[index] = row
    for index in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[index]


def open_mixture(mixture: Mixture, seed: int) -> MixtureDataset | MixtureStream:
    """Open all sources of a mixture and return the data set of their mixed rows.

    Raises:
        ValueError: If a source is not found, cannot be read, or is empty; the message names the source.
    """
    parts = []
    sources = []
    for source in tqdm(mixture.sources, desc="Opening sources", disable=None):
        source = with_local_annotation(source)
        sources.append(source)
        source_rows = read_source(source)
        if isinstance(source_rows, Dataset):
            num_rows = len(source_rows)
            if num_rows == 0:
                raise ValueError(f"Source {source.name!r}: {source.location} has no rows.")
            if source.rows is not None and source.rows != num_rows:
                logger.warning("Source %r has %d rows, but `rows` is %d.", source.name, num_rows, source.rows)
        parts.append(source_rows)
    mixture = dataclasses.replace(mixture, sources=tuple(sources))
    if has_stream(parts):
        return MixtureStream(mixture, parts, seed)
    if mixture.split_streams:
        logger.warning("split_streams has no effect because no source is streaming.")
    return MixtureDataset(mixture, parts, seed)


def sources_of(dataset: Rows) -> list[Rows]:
    """Return the sources of a mixture, or a list of the data set itself."""
    return dataset.parts if isinstance(dataset, MixtureDataset | MixtureStream) else [dataset]


def describe_schemas(dataset: Rows) -> list[str]:
    """Return a line with the schema, the number of rows and of images per row; one for each source of a mixture.

    Raises:
        ValueError: If the rows of a stream, which are read here for the first time, match no schema.
    """
    if not isinstance(dataset, MixtureDataset | MixtureStream):
        return [f"reads: {describe_part(dataset, schema_name(dataset))}"]
    lines = []
    for source, source_rows in zip(dataset.mixture.sources, dataset.parts):
        schema = schema_of_part(source, source_rows)
        lines.append(f"reads {source.name}: {describe_part(source_rows, schema)}")
    return lines


def schema_of_part(source: Source, part: Rows) -> str:
    """Return the name of the schema of a source of a mixture; a stream is opened to find it."""
    return part.info.description if isinstance(part, Dataset) else schema_of(source)


def describe_part(dataset: Rows, schema: str) -> str:
    num_rows = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} rows"
    image_counts = []
    for row in itertools.islice(prepare_rows(dataset), LOOKED_AT):  # Images stay encoded.
        if not row.get("error"):
            image_counts.append(len(images_of(row)))
    least = min(image_counts, default=0)
    most = max(image_counts, default=0)
    if most == 0:
        images = "no images"
    elif least == most:
        images = f"{most} image{'s' if most > 1 else ''} a row"
    else:
        images = f"{least} to {most} images a row"
    return f"{schema}, {num_rows}, {images}"


def check_rows(
    dataset: Rows,
    collator: ViTPDataCollator,
    most_rows: int | None = None,
    seconds: float = CHECK_SECONDS,
    in_processes: bool = False,
    allow_text_only: bool = True,
) -> str:
    """Encode the first 200 rows of each source, or all rows if that takes at most `seconds`, and return a summary.

    Rows are encoded for step 0, in which they are longest under VRL's warm-up. Random states are restored afterwards.

    Args:
        dataset: mixture or other data set.
        collator: collator that encodes the rows.
        most_rows: maximum number of rows; all by default.
        seconds: time limit in seconds.
        in_processes: whether worker processes encode the rows, one per core and at most 16. A stream is read by this
            process.
        allow_text_only: whether all of these rows may have no image.

    Raises:
        ValueError: If a row is invalid, unless the collator skips invalid rows; the message names the first one. Or if
            no row has an image.
    """
    length = number_of_rows(dataset)
    num_first = CHECKED * len(sources_of(dataset))
    start = time.monotonic()
    num_checked = 0
    num_invalid = 0
    num_with_images = 0
    with preserve_random_states(), closing(encoded_rows(dataset, collator, most_rows, in_processes)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, ValueError):
                if collator.on_error == "raise":
                    raise outcome
                num_invalid += 1
            elif outcome:
                num_with_images += 1
            num_checked += 1
            elapsed = time.monotonic() - start
            if elapsed > seconds:
                break
            # After the first rows, the check continues only if all rows can be checked in time.
            if num_checked >= num_first and (length is None or elapsed / num_checked * length > seconds):
                break
    if num_with_images == 0 and not allow_text_only:
        raise ValueError(
            f"Expected rows with images, but none of the first {num_checked:,} has one, so the ViT would learn "
            "nothing. Put images into a column `image` or `images`, name it in `columns`, or set allow_text_only."
        )
    summary = f"checked: {describe_checked(num_checked, length)} encoded in {time.monotonic() - start:.1f} s"
    if num_invalid:
        summary += f"; {num_invalid:,} of them are invalid and will be replaced (on_error: skip)"
    return summary


def describe_checked(num_checked: int, length: int | None) -> str:
    """Return the number of checked rows, out of those of a data set of known length."""
    if num_checked == length:
        return f"all {num_checked:,} rows"
    if length:
        return f"{num_checked:,} of {length:,} rows"
    return f"{num_checked:,} rows"


def encoded_rows(
    dataset: Rows,
    collator: ViTPDataCollator,
    most_rows: int | None,
    in_processes: bool,
) -> Iterator[ValueError | bool]:
    """Yield the error of each row, or whether it has images."""
    # A process that is not forked imports all modules first, which takes longer than most checks.
    can_fork = in_processes and multiprocessing.get_start_method() == "fork"
    if can_fork and number_of_rows(dataset) is not None:
        rows = EncodedRows(dataset, collator)
        num_workers = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        keys = itertools.islice(rows.keys(), most_rows)
        yield from DataLoader(
            rows,
            batch_size=None,
            sampler=keys,
            num_workers=num_workers,
        )
    else:
        for row in itertools.islice(in_turn(dataset), most_rows):
            yield try_to_encode(collator, row)


def try_to_encode(collator: ViTPDataCollator, row: dict) -> ValueError | bool:
    """Return the error of a row, or whether it has images."""
    try:
        return "pixel_values" in collator.encode({**row, STEP: 0})
    except ValueError as error:
        return error


class EncodedRows(torch.utils.data.Dataset):
    """Data set of the results of [`try_to_encode`], by source and row number; for worker processes."""

    def __init__(self, dataset: Dataset, collator: ViTPDataCollator):
        self.is_mixture = isinstance(dataset, MixtureDataset)
        self.parts = sources_of(dataset)
        self.collator = collator

    def keys(self) -> Iterator[tuple[int, int]]:
        """Yield source and row number of each row, in the order of [`in_turn`]."""
        for number in range(max(map(len, self.parts))):
            for source, source_rows in enumerate(self.parts):
                if number < len(source_rows):
                    yield source, number

    def __getitem__(self, key: tuple[int, int]) -> ValueError | bool:
        source, number = key
        row = self.parts[source][number]
        if self.is_mixture:
            row = name_row(row, copy=0)
        return try_to_encode(self.collator, row)


def number_of_rows(dataset: Rows) -> int | None:
    """Return the number of rows of all sources, each counted once, or `None` for a stream."""
    parts = sources_of(dataset)
    if has_stream(parts):
        return None
    return sum(map(len, parts))


def has_stream(parts: list[Rows]) -> bool:
    """Return whether any of these data sets is a stream."""
    return any(isinstance(source_rows, IterableDataset) for source_rows in parts)


def in_turn(dataset: Rows) -> Iterator[dict]:
    """Yield the rows of a data set, or of a mixture alternately from each source."""
    if not isinstance(dataset, MixtureDataset | MixtureStream):
        yield from dataset
        return
    iterators = []
    for source_rows in dataset.parts:
        if isinstance(source_rows, IterableDataset):
            iterators.append(all_rows(source_rows))
        else:
            iterators.append(iter(source_rows))
    for rows in itertools.zip_longest(*iterators):
        for row in rows:
            if row is not None:
                yield name_row(row, copy=0)


@contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python, which a user's transform may change."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def replacement_rows(dataset: Dataset | IterableDataset, num_rows: int = 64) -> Dataset | list[dict]:
    """Return the rows that replace skipped ones: all rows, or the first `num_rows` of a stream."""
    return dataset if isinstance(dataset, Dataset) else list(itertools.islice(dataset, num_rows))
