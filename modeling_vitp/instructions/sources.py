"""Sources of instruction data: what says where one is, and its rows in one schema, whatever files hold them.

A row has an `id` that is unique in its source, `images` (paths or encoded bytes, never decoded), `messages` whose
content is a list of `{"type": "text" | "image", "text"}` parts, the name of its `source`, and an `error`: `None`, or
one line on what is wrong with the row. Whoever uses a row with an error decides whether to stop or to skip; reading
goes on.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    DownloadManager,
    Features,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from trl import ScriptArguments

from ..command.errors import one_line
from ..hub.failures import RETRIES, limit_waits, pause, retry, seconds_to_wait
from ..images.reading import IMAGE_SUFFIXES
from .rows import FEATURES, SourceSettings
from .schemas import (
    IMAGES,
    RENAME,
    RowReader,
    check_unmerged,
    columns_of,
    load_stored,
    parse_json,
    recognize,
    row_of,
    to_conversations,
    with_reader,
)

logger = logging.getLogger(__name__)
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}  # of single files
METADATA = "metadata.jsonl"
# Of `datasets` itself, beside rows that lie elsewhere.
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
TABLES = {".parquet", ".tar", ".arrow"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LISTS = {".json", ".jsonl", *DELIMITERS}
LOOKED_AT = 20  # rows of a file, to find its images
ENDLESS = 2**62
REMEDY = (
    "Say under `columns` which are the messages, the prompt and the completion, or the question and the answer (or "
    "give a `prompt` and an answer column)."
)
csv.field_size_limit(2**31 - 1)  # an image in a table, as text, is longer than what Python allows by itself


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture. It lives in exactly one of `dataset`, `folder` and `annotation`.

    Args:
        name: unique in the mixture; the ids of its rows start with it.
        rate: passes over the source in one epoch: above 1 repeats, below 1 takes a part.
        dataset: Hub id, with `config`, `split` and `revision`.
        folder: local folder of Parquet files, of WebDataset's tar archives, of JSON (Lines) beside images, or of images
            with a `metadata.jsonl` or a folder per class.
        annotation: InternVL's JSON Lines file (or a JSON list of the same rows), with its `image_root`.
        image_root: folder that the paths of images are relative to, and do not leave: neither by `..`, nor as absolute
            paths or over symbolic links. Without it they are taken as they are, but for JSON in a `folder`: there it is
            that of the JSON, or of `images` beside it.
        streaming: rows are read as they are needed; nothing is stored on disk.
        columns: which columns of the data set are the `id`, `images`, and `messages`, `conversations` (with `system`),
            `prompt` and `completion`, or `question` and `answer`.
        prompt: the question of every row of a source that has an answer column alone.
        rows: number of rows, where it is known before the source is read: the dry run goes by it (but counts those of
            JSON Lines that are there), and so does the share of a streaming source, which needs it (an estimate is
            enough).
        obtain: page where the data can be had.
        make: command that makes the annotation; the dry run prints it with the name of the annotation and `image_root`.
        modality: what the images were taken with: optical, sar, ct …, one or several.
        tasks: what is asked: caption, vqa, grounding …
        general: whether it is general data, against forgetting.
        max_patches, image_size, system_prompt, input_spec, jpeg_degradation: see [`SourceSettings`].
        first_rows: a rate below 1 takes the first rows instead of random ones, as the released code does.
    """

    name: str
    rate: float = 1.0
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    folder: str | None = None
    annotation: str | None = None
    image_root: str | None = None
    streaming: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    rows: int | None = None
    obtain: str | None = None
    make: str | None = None
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    general: bool = False
    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False
    first_rows: bool = False

    @property
    def settings(self) -> SourceSettings:
        return SourceSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SourceSettings)})

    @property
    def location(self) -> str:
        return self.dataset or self.folder or self.annotation

    @property
    def is_on_hub(self) -> bool:
        return self.dataset is not None and not Path(self.dataset).exists()

    def missing(self) -> str | None:
        """Return what has to be there before the source can be read and is not, with the page where it can be had."""
        for path in (self.folder, self.annotation, self.image_root):
            if path is not None and not Path(path).exists():
                return f"{path} is not there" + (f"; obtain it from {self.obtain}" if self.obtain else "")
        return None


def read_source(source: Source) -> Dataset | IterableDataset:
    """Return the rows of a source: map-style, or an iterable if `streaming`. See the module's docstring for the schema.

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
        raise source_error(error, source) from error
    return with_reader(dataset, reader_of(source, columns_of(dataset)))


def source_error(error: Exception, source: Source, row: int | None = None) -> ValueError:
    """Return the error of a source on one line: its name, the row, and the error of the Hub or else the first cause."""
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
    """Return the data set as it is stored."""
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
    """Return what `load_dataset` is told of a folder or Hub id, or of a file, whose rows are the split `train`.

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
    """Return the reader of the rows of a source with these columns; raise a `ValueError` that names the source."""
    options = {"source": source.name, "prompt": source.prompt, "image_root": source.image_root}
    try:
        return RowReader.of(features, source.columns, REMEDY, **options)
    except ValueError as error:
        raise ValueError(f"Source {source.name!r}, {source.location}: {error}") from error


def annotation_rows(annotation: str, image_root: str | None, name: str, state: str | None = None) -> Iterator[dict]:
    """Return rows of an InternVL JSON Lines file, whose ids are line numbers, or of a JSON list of such rows.

    `state` is there for the cache: it changes when the file does.
    """
    for number, entry in numbered_rows(annotation):
        yield annotation_row(entry, image_root, name, str(number))


def line_rows(source: Source, files: dict[Path, str | None], state: str | None = None) -> Iterator[dict]:
    """Return rows of a source of JSON; see [`annotation_rows`] for `state`."""
    names = dict.fromkeys(name for _, entry in read_lines(files) if isinstance(entry, dict) for name in entry)
    reader = reader_of(source, names)
    for number, (path, entry) in enumerate(read_lines(files)):
        if isinstance(entry, ValueError):
            yield row_of(source.name, str(number), [], [], str(entry))
        else:
            yield reader({name: entry.get(name) for name in names}, number, files[path])


def annotation_row(entry: dict | ValueError, image_root: str | None, name: str, row_id: str) -> dict:
    """Return a row by its own fields, whatever those of the others."""
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
    """Return the rows of a streaming source, or of one of several parts of it.

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
        raise source_error(error, source) from error
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
                raise source_error(error, source, number) from error
            pause(source_error(error, source, number), wait, tries)
            tries += 1


def stored_rows(source: Source, start: int, parts: int, part: int) -> Iterator[dict]:
    """Yield the rows of a part of a stream from one on. No two parts give a row the same number.

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
    """Return the columns of a streaming source that are read, undecoded, and what reads them."""
    dataset = load_columns(source)
    if dataset.features is None:
        dataset = dataset._resolve_features()
    reader = reader_of(source, columns_of(dataset))
    return dataset.select_columns(reader.stored_columns(dataset.features)).decode(False), reader


def schema_of(source: Source) -> str:
    """Return the name of the schema of a source, by its columns or by its first row that is a conversation."""
    if source.annotation is None and not line_files(source):
        return columns_of_stream(source)[1].name
    rows = numbered_rows(source.annotation) if source.annotation else read_lines(line_files(source))
    for _, entry in itertools.islice(rows, LOOKED_AT):
        try:
            return reader_of(source, entry).name
        except (ValueError, TypeError):
            continue
    return "no conversations"


def all_rows(stream: IterableDataset) -> Iterator[dict]:
    """Yield all rows of a stream, also in a worker of a data loader, where plain iteration gives a share."""
    for batch in stream.iter(batch_size=8):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def file_state(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def folder_cache(folder: Path) -> str:
    """Return a cache for this state of a folder: `datasets` would go on using an older one if the folder has a card."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(f"{path.relative_to(folder)}\0{file_state(path)}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])


def line_files(source: Source) -> dict[Path, str | None]:
    """Return the JSON files of a source, each with the folder that its images are below, if there is one.

    They are the JSON Lines of a local data set, metadata of images, or JSON that lies beside images.
    """
    folder = None if source.is_on_hub or source.annotation else Path(source.folder or source.dataset)
    if folder is None:
        return {}
    builder = None
    if source.folder and any(folder.rglob(METADATA)):
        builder = load_dataset_builder("imagefolder", data_dir=source.folder)
    elif source.dataset and any(folder.rglob("*.jsonl")):
        builder = load_dataset_builder(source.dataset, source.config)
    files = [Path(str(file)) for file in (builder.config.data_files or {}).get(source.split, ())] if builder else []
    if source.folder and builder:
        return {path: str(path.parent) for path in files if path.name == METADATA}
    if files and all(path.suffix == ".jsonl" for path in files):
        return dict.fromkeys(files, source.image_root)
    if source.folder or has_images(folder):
        files = annotation_files(folder, source.columns, source.prompt).get(source.split, ())
        return {path: root_of(path, folder, source) for path in files}
    return {}


def download_line_files(source: Source) -> dict[Path, str | None]:
    """As [`line_files`], of a data set of the Hub that is made of JSON Lines, in the cache of the Hub."""
    if not source.is_on_hub:
        return {}
    builder = load_dataset_builder(source.dataset, source.config, revision=source.revision)
    addresses = [str(file) for file in (builder.config.data_files or {}).get(source.split, ())]
    if not all(address.endswith(".jsonl") for address in addresses):
        return {}
    return dict.fromkeys(map(Path, DownloadManager().download(addresses)), source.image_root)


def root_of(path: Path, folder: Path, source: Source) -> str | None:
    """Return what the user says, or where the images of the first rows that have some are."""
    if source.image_root is not None:
        return source.image_root
    columns = (source.columns["images"],) if "images" in source.columns else IMAGES
    return image_root(path, folder, columns)


def read_lines(files: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any] | ValueError]]:
    """Yield the rows of the files, or what is wrong with one, with images under the names of `imagefolder`."""
    for path in files:
        for number, entry in numbered_rows(path):
            if not isinstance(entry, (dict, ValueError)):
                entry = ValueError(f"line {number} of {path} holds {str(entry)[:80]!r}, and no row.")
            if path.name == METADATA and isinstance(entry, dict):
                entry = {image_column(name): value for name, value in entry.items()}
            yield path, entry


def image_column(name: str) -> str:
    """Convert `file_name` and `file_names` of metadata to `image` and `images`, `before_file_name` to `before`."""
    if name in ("file_name", "file_names"):
        return "image" + name[len("file_name") :]
    return name.removesuffix("_file_names").removesuffix("_file_name")


def first_bad_line(files: Iterable[Path]) -> str | None:
    """Return what is wrong with the first line that cannot be parsed."""
    return next((str(entry) for _, entry in read_lines(files) if isinstance(entry, ValueError)), None)


def numbered_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """As [`parsed_lines`], of a file with a row a line or of a JSON list or CSV, whose rows are counted from 0.

    Raises:
        ValueError: names the file if it is to be a list and is none.
    """
    if Path(path).suffix.lower() in DELIMITERS:
        yield from csv_rows(path)
        return
    with open(path, "rb") as file:
        if is_in_lines(Path(path)):
            yield from parsed_lines(file, path)
            return
        rows = parse_json(file.read(), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no JSON list of rows, but a {type(rows).__name__}")
    yield from enumerate(rows)


def parsed_lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and content of each line that is not empty, or the error in place of the content."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse_json(line, f"line {number} of {path}")
            except ValueError as error:
                yield number, error


def csv_rows(path: str | Path) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """As [`numbered_rows`], of a CSV, all values of which are texts."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=DELIMITERS[Path(path).suffix.lower()])
        for number, row in enumerate(rows):
            if None in row or None in row.values():
                row = ValueError(f"line {rows.line_num} of {path} has not as many fields as the first line.")
            yield number, row


def files_by_suffix(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder, by their endings in small letters; hidden ones and checkpoints are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith((".", "checkpoint-")) for part in path.relative_to(folder).parts):
            found.setdefault(path.suffix.lower(), []).append(path)
    return found


def annotation_files(
    folder: Path, columns: Mapping[str, str] | None = None, prompt: str | None = None
) -> dict[str, list[Path]]:
    """Return the CSV, or else JSON and JSON Lines, that have the rows of a folder, by split.

    There are none if tables, archives or metadata of images have the rows. A file that is not read is logged.

    Args:
        columns: which column of a CSV is what, as [`Source`] has it, and so `prompt`.
    """
    found = files_by_suffix(folder)
    files = [path for path in found.get(".json", []) + found.get(".jsonl", []) if path.name not in {*NO_ROWS, METADATA}]
    tables = [path for suffix in TABLES for path in found.get(suffix, [])]
    texts = all_texts = [path for suffix in DELIMITERS for path in found.get(suffix, [])]
    others = tables + [path for path in found.get(".jsonl", []) + texts if path.stem == "metadata"]
    texts = [path for path in texts if has_header_of_rows(path, columns or {}, prompt)]
    rows = texts or [path for path in files if path.suffix.lower() == ".jsonl" or holds_rows(path)]
    rows, others = ([], others) if others else (rows, texts)
    unread = tuple(sorted({*files, *all_texts} - {*rows, *others}))
    if unread:
        warn_unread(unread, f"the rows of the folder are in {others[0].name}" if others else "no list of conversations")
    splits: dict[str, list[Path]] = {}
    for path in rows:
        splits.setdefault(split_in_path(path.relative_to(folder)), []).append(path)
    return splits


@cache
def warn_unread(paths: tuple[Path, ...], why: str) -> None:
    """Say once what is not read."""
    more = f" and {len(paths) - 1} more are" if len(paths) > 1 else " is"
    logger.warning("%s%s not read: %s.", paths[0], more, why)


def has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def split_in_path(path: Path) -> str:
    """Return the split whose name, or another word for it, is a word of a path."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((str(split) for split, names in SPLIT_KEYWORDS.items() if words & set(names)), "train")


def holds_rows(path: Path) -> bool:
    """Return whether a JSON is a list, or has a row a line."""
    return begins_with(path) == b"[" or is_in_lines(path)


def has_header_of_rows(path: Path, columns: Mapping[str, str], prompt: str | None) -> bool:
    """Return whether the columns of a CSV make conversations, with those of `columns` that it has."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()]), [])
        recognize(names, {role: column for role, column in columns.items() if column in names}, prompt)
    except (ValueError, csv.Error):
        return False
    return True


def begins_with(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def is_in_lines(path: Path) -> bool:
    """Return whether a file has a row a line, by its ending or, if that says JSON, by its first lines."""
    if path.suffix.lower() != ".json":
        return True
    if begins_with(path) != b"{":
        return False
    with open(path, "rb") as file:
        first, second, *_ = *itertools.islice((line for line in file if line.strip()), 2), b"", b""
    if not is_object(first):
        return False
    try:
        recognize(json.loads(first))
    except (ValueError, TypeError):
        return is_object(second)
    return True


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def image_root(file: Path, folder: Path, columns: Sequence[str] = IMAGES) -> str | None:
    """Return the folder that image paths in a JSON are relative to: its own, the data set's, or `images` in either.

    It is told by the first rows with an image in one of the columns, and is `None` where the path is absolute.
    """
    rows = (row for _, row in numbered_rows(file) if isinstance(row, dict) and any(map(row.get, columns)))
    for row in itertools.islice(rows, LOOKED_AT):
        images = [
            image for name in columns for image in (row[name] if isinstance(row.get(name), list) else [row.get(name)])
        ]
        for path in images:
            if not isinstance(path, str) or not path or "://" in path:
                continue
            if Path(path).is_absolute():
                return None
            places = [place for root in (file.parent, folder) for place in (root, root / "images")]
            found = next((str(place) for place in places if (place / path).is_file()), None)
            if found is not None:
                return found
    return str(file.parent)


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


def open_splits(
    args: ScriptArguments, root: str | None = None
) -> tuple[dict[str, Dataset | IterableDataset], list[str]]:
    """Open the splits to train and to evaluate on, as far as they exist, and return the names of all splits too.

    A name may be that of a part, as `train[:100]`.

    Args:
        root: folder that the paths of images are relative to.

    Raises:
        ValueError: if there is no split to train on, or its rows are in no known schema, or in several.
    """
    name = args.dataset_name
    splits = json_sources(Path(name), root, args.dataset_streaming) or load_rows(args)
    opened = {}
    for part in (args.dataset_train_split, args.dataset_test_split):
        if base_of(part) in splits:
            try:
                opened[part] = take(open_split(splits[base_of(part)], root), part)
            except ValueError as error:
                said = re.sub(r"^Source '.*?: (?=the columns )", "", str(error)).replace(REMEDY, RENAME)
                raise ValueError(f"{name}, split {part!r}: {said}") from error
    if args.dataset_train_split not in opened:
        raise ValueError(
            f"{name} has no split {args.dataset_train_split!r}, only {sorted(splits)}: give dataset_train_split."
        )
    return opened, sorted(splits)


def open_split(split: Source | Dataset | IterableDataset, root: str | None) -> Dataset | IterableDataset:
    if not isinstance(split, Source):
        return to_conversations(split, root)
    rows = read_source(split)
    rows.info.description = schema_of(split)
    return rows


def json_sources(place: Path, root: str | None, streaming: bool) -> dict[str, Source]:
    """Return the sources, by split, that a file or a folder of JSON is read by; none where `datasets` reads it.

    `datasets` takes a folder for one of images where these are more, and leaves out the JSON beside them.
    """
    if place.is_file() and place.suffix.lower() in LISTS:
        root = root or image_root(place, place.parent)
        return {"train": Source(place.stem, annotation=str(place), image_root=root, streaming=streaming)}
    if not place.is_dir() or not (root or has_images(place)):
        return {}
    source = Source(place.resolve().name, folder=str(place), image_root=root, streaming=streaming)
    return {split: dataclasses.replace(source, split=split) for split in annotation_files(place)}


def source_of(name: str, split: str, config: str | None, root: str | None) -> Source:
    """Return the source that reads what a `dataset_name` names; see [`json_sources`]."""
    stored = Source(Path(name).name, dataset=name, config=config, split=split, image_root=root)
    return json_sources(Path(name), root, False).get(split, stored)


def base_of(part: str) -> str:
    return part.partition("[")[0]


def take(rows: Dataset | IterableDataset, part: str) -> Dataset | IterableDataset:
    """Return the rows of a part of a split, such as `train[:100]`, `train[10%:]`, or a sum of parts.

    Raises:
        ValueError: if a part is none of a stream, or has no row.
    """
    if base_of(part) == part:
        return rows
    is_stream = isinstance(rows, IterableDataset)
    if is_stream and any(mark in part for mark in "%-+"):
        raise ValueError("of a stream, whose length is not known, a part is given by two numbers from its start.")
    length = ENDLESS if is_stream else len(rows)
    wanted = ReadInstruction.from_spec(part).to_absolute({base_of(part): length})
    ranges = [range(each.from_ or 0, length if each.to is None else min(each.to, length)) for each in wanted]
    if is_stream:
        first, last = ranges[0].start, ranges[0].stop
        return rows.skip(first) if last == ENDLESS else rows.skip(first).take(last - first)
    if not any(ranges):
        raise ValueError(f"{part} has no row, since {base_of(part)} has {length}.")
    return rows.select(ranges[0] if len(ranges) == 1 else list(itertools.chain(*ranges)))
