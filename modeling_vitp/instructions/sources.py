"""Sources of instruction data: what a mixture file says about each, and its rows in one schema.

A row has an `id` that is unique in its source, `images` (paths or encoded bytes, never decoded), `messages` whose
content is a list of `{"type": "text" | "image", "text"}` parts, the name of its `source`, and an `error`: `None`, or
one line on what is wrong with the row. Whoever uses a row with an error decides whether to stop or to skip; reading
goes on.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from trl import ScriptArguments

from ..command.errors import one_line
from ..hub.failures import RETRIES, limit_waits, pause, retry, seconds_to_wait
from ..images.reading import IMAGE_SUFFIXES
from .archives import columns_of, load_stored
from .conversations import with_reader
from .folders import LISTS, holds_rows
from .json_lines import LOOKED_AT, download_line_files, first_bad_line, line_files, listed, read_lines
from .mixture_file import Source
from .row_reader import RowReader
from .rows import FEATURES, check_unmerged, row_of

logger = logging.getLogger(__name__)
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}  # of single files
REMEDY = (
    "Say under `columns` which are the messages, the prompt and the completion, or the question and the answer (or "
    "give a `prompt` and an answer column)."
)


def read_source(source: Source) -> Dataset | IterableDataset:
    """The rows of a source: map-style, or an iterable if `streaming`. See the module's docstring for the schema.

    JSON Lines are read once and kept in the cache of `datasets` until the file changes; images stay where they are.
    Those of the Hub that `datasets` cannot read, for a line that is damaged, are downloaded and read line by line.
    Transient HTTP errors and broken connections are tried again, with growing pauses.

    Raises:
        ValueError: names the source if it is not there, cannot be read, or lacks the columns.
    """
    missing = source.missing()
    if missing:
        raise ValueError(f"Source {source.name!r}: {missing}.")
    if source.streaming:
        return IterableDataset.from_generator(stream_rows, features=FEATURES, gen_kwargs={"source": source})
    try:
        if source.annotation:
            return Dataset.from_generator(
                annotation_rows,
                features=FEATURES,
                gen_kwargs={
                    "annotation": source.annotation,
                    "image_root": source.image_root,
                    "name": source.name,
                    "state": file_state(Path(source.annotation)),
                },
            )
        files, state = line_files(source), None
        if files:
            state = folder_cache(Path(source.folder or source.dataset))
        else:
            try:
                dataset = retry(partial(load_columns, source))
            except DatasetGenerationError:
                files = retry(partial(download_line_files, source))
                if not files:
                    raise
        if files:
            kwargs = {"source": source, "files": files, "state": state}
            return Dataset.from_generator(line_rows, features=FEATURES, gen_kwargs=kwargs)
    except Exception as error:  # of many readers; it is raised with the name of the source
        raise named(error, source) from error
    return with_reader(dataset, reader_of(source, columns_of(dataset)))


def named(error: Exception, source: Source, row: int | None = None) -> ValueError:
    """The error of a source on one line: its name, the row, and what the Hub, or else the first of the causes, says."""
    causes = [error]
    while causes[-1].__cause__ is not None and not isinstance(causes[-1], HfHubHTTPError):
        causes.append(causes[-1].__cause__)
    place = "" if row is None else f", row {row}"
    cause = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    if cause.startswith(f"Source {source.name!r}"):
        return ValueError(cause)
    cause = cause.removeprefix(f"{source.location} is no JSON: ")
    return ValueError(f"Source {source.name!r}{place}: {source.location} cannot be read: {cause}")


def load_columns(source: Source) -> Dataset | IterableDataset:
    """The data set as it is stored."""
    if source.dataset:
        return load_stored(
            **place_of(source.dataset, source.config),
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    folder = Path(source.folder)
    options = {"split": source.split, "streaming": source.streaming, "cache_dir": folder_cache(folder)}
    suffixes = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    if suffixes & {".parquet", ".tar"}:
        return load_stored(path=str(folder), **options)
    if suffixes & IMAGE_SUFFIXES:
        return load_dataset("imagefolder", data_dir=str(folder), **options)
    found = ", ".join(sorted(suffixes)) or "nothing"
    raise ValueError(f"{folder} holds no Parquet files, JSON, tar archives or images, only {found}")


def place_of(name: str, config: str | None) -> dict[str, object]:
    """What `load_dataset` is told of a folder or Hub id, or of a file, whose rows are the split `train`.

    Raises:
        ValueError: if the file is of no kind that is read.
    """
    path = Path(name)
    if not path.is_file():
        return {"path": name, "name": config}
    if path.suffix.lower() in LISTS:
        raise ValueError(f"{name} is no {', '.join(BUILDERS)}: give it as `annotation`, with `image_root`.")
    if path.suffix.lower() not in BUILDERS:
        raise ValueError(
            f"{name} is no {', '.join(BUILDERS)}, .json, .jsonl, .csv or .tsv: give such a file, or a folder."
        )
    return {"path": BUILDERS[path.suffix.lower()], "data_files": {"train": name}}


def reader_of(source: Source, features: Features | dict) -> RowReader:
    """What reads the rows of a source with these columns; a `ValueError` names it if that makes no conversation."""
    options = {"source": source.name, "prompt": source.prompt, "image_root": source.image_root}
    try:
        return RowReader.of(features, source.columns, REMEDY, **options)
    except ValueError as error:
        raise ValueError(f"Source {source.name!r}, {source.location}: {error}") from error


def annotation_rows(annotation: str, image_root: str | None, name: str, state: str | None = None) -> Iterator[dict]:
    """Rows of an InternVL JSON Lines file, whose ids are line numbers, or of a JSON list of such rows.

    `state` is there for the cache: it changes when the file does.
    """
    for number, entry in listed(annotation):
        yield annotation_row(entry, image_root, name, str(number))


def line_rows(source: Source, files: dict[Path, str | None], state: str | None = None) -> Iterator[dict]:
    """Rows of a source of JSON; see [`annotation_rows`] for `state`."""
    names = dict.fromkeys(name for _, entry in read_lines(files) if isinstance(entry, dict) for name in entry)
    reader = reader_of(source, names)
    for number, (path, entry) in enumerate(read_lines(files)):
        if isinstance(entry, ValueError):
            yield row_of(source.name, str(number), [], [], str(entry))
        else:
            yield reader({name: entry.get(name) for name in names}, number, files[path])


def annotation_row(entry: dict | ValueError, image_root: str | None, name: str, row_id: str) -> dict:
    """A row by its own fields, whatever those of the others."""
    try:
        if isinstance(entry, ValueError):
            raise entry
        if not isinstance(entry, dict):
            raise ValueError(f"it is {str(entry)[:80]!r}, but a mapping with `conversations` is needed.")
        fields = {field: value for field, value in entry.items() if value is not None}
        return reader_of_fields(tuple(fields), name, image_root)(fields, row_id)
    except ValueError as error:
        return row_of(name, row_id, [], [], str(error))


@lru_cache(maxsize=1000)
def reader_of_fields(names: tuple[str, ...], source: str, image_root: str | None) -> RowReader:
    return RowReader.of(dict.fromkeys(names), source=source, image_root=image_root)


def stream_rows(source: Source, parts: int = 1, part: int = 0) -> Iterator[dict]:
    """The rows of a streaming source, or of one of several parts of it.

    Broken off by a transient error, it goes on from the row where it was.
    """
    try:
        if source.annotation:
            rows = annotation_rows(source.annotation, source.image_root, source.name)
            yield from itertools.islice(rows, part, None, parts)
            return
        if files := line_files(source):
            yield from itertools.islice(line_rows(source, files), part, None, parts)
            return
    except (OSError, ValueError) as error:
        raise named(error, source) from error
    number = tries = 0
    while True:
        limit_waits()
        try:
            if files:
                rows = itertools.islice(line_rows(source, files), part + number * parts, None, parts)
            else:
                rows = stored_rows(source, number, parts, part)
            for row in rows:
                yield row
                number, tries = number + 1, 0
            return
        except Exception as error:  # as in `read_source`, if another try does not help
            wait = seconds_to_wait(error, tries)
            if wait is None and isinstance(error, (ValueError, DatasetGenerationError)) and not files and parts == 1:
                files = retry(partial(download_line_files, source))
                if files:
                    continue
            if wait is None or tries == RETRIES:
                raise named(error, source, number) from error
            pause(named(error, source, number), wait, tries)
            tries += 1


def stored_rows(source: Source, start: int, parts: int, part: int) -> Iterator[dict]:
    """The rows of a part of a stream as `datasets` reads it, from one on. No two parts give a row the same number.

    A part has files of its own if their number is a multiple of that of parts, and else every so many-th row, for which
    it reads all.
    """
    dataset, reader = columns_of_stream(source)
    if dataset.num_shards % parts == 0:
        rows = all_rows(dataset.shard(parts, part).skip(start))
    else:
        rows = itertools.islice(all_rows(dataset), part + start * parts, None, parts)
    for number, stored in enumerate(rows, start):
        yield reader(stored, part + number * parts)


def columns_of_stream(source: Source) -> tuple[IterableDataset, RowReader]:
    """The columns of a streaming source that are read, undecoded, and what reads them."""
    dataset = load_columns(source)
    if dataset.features is None:
        dataset = dataset._resolve_features()
    reader = reader_of(source, columns_of(dataset))
    return dataset.select_columns(reader.stored_columns(dataset.features)).decode(False), reader


def schema_of(source: Source) -> str:
    """What the rows of a source are that lie in JSON, by the first that is a conversation, or whose columns say so."""
    if source.annotation is None and not line_files(source):
        return columns_of_stream(source)[1].name
    rows = listed(source.annotation) if source.annotation else read_lines(line_files(source))
    for _, entry in itertools.islice(rows, LOOKED_AT):
        try:
            return reader_of(source, entry).name
        except (ValueError, TypeError):
            continue
    return "no conversations"


def all_rows(stream: IterableDataset) -> Iterator[dict]:
    """The rows of a stream, all of them also in a worker of a data loader, where plain iteration gives a share."""
    for batch in stream.iter(batch_size=8):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def file_state(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def folder_cache(folder: Path) -> str:
    """A cache for this state of a folder: `datasets` would go on using an older one if the folder has a card."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(f"{path.relative_to(folder)}\0{file_state(path)}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])


def load_rows(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """All splits of the data set that a recipe names instead of a mixture, as they are stored.

    Transient HTTP errors and broken connections are tried again, with growing pauses.

    Raises:
        ValueError: if it lacks the split to train on.
    """
    name = script_args.dataset_name
    load = partial(
        load_stored,
        **place_of(name, script_args.dataset_config),
        streaming=script_args.dataset_streaming,
        cache_dir=folder_cache(Path(name)) if Path(name).is_dir() else None,
    )
    try:
        splits = retry(load)
    except datasets.exceptions.DatasetGenerationError as error:
        if Path(name).is_dir():
            found = sorted(path for path in Path(name).rglob("*.json*") if path.is_file())
            files = [path for path in found if path.suffix == ".jsonl" or (path.suffix == ".json" and holds_rows(path))]
        else:
            split = script_args.dataset_train_split
            files = retry(partial(download_line_files, Source(name, dataset=name, split=split)))
        try:
            line = first_bad_line(files)
        except ValueError as whole:  # a list, which has no lines
            raise ValueError(f"{name} cannot be read: {whole}. Mend the file.") from error
        hint = "As a source of a mixture it is one row, which can be skipped."
        cause = f"{line}. {hint}" if line else one_line(str(error.__cause__ or error))
        raise ValueError(f"{name} cannot be read: {cause}") from error
    train, test = (part.partition("[")[0] for part in (script_args.dataset_train_split, script_args.dataset_test_split))
    if train not in splits:
        raise ValueError(f"{name} has no split {train!r}, only {sorted(splits)}: give dataset_train_split.")
    for split in (train, test):
        if split in splits:
            columns = {key: value for key, value in (splits[split].features or {}).items() if key in ("id", "messages")}
            try:
                check_unmerged(columns)
            except ValueError as error:
                raise ValueError(f"{name}, split {split!r}: {error}") from error
    return splits
