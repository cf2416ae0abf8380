"""Sources of instruction data: their locations and settings, and readers that return all rows in one schema.

A row has an `id` that is unique in its source, `images` (paths or encoded bytes, never decoded), `messages` whose
content is a list of `{"type": "text" | "image", "text"}` parts, the name of its `source`, and an `error`: `None`, or
one line that describes what is wrong with the row. Reading continues after a row with an error; the user of the rows
decides whether to stop or to skip.
"""

import codecs
import csv
import dataclasses
import glob
import itertools
import json
import logging
import mmap
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

from datasets import (
    Dataset,
    DatasetBuilder,
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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from trl import ScriptArguments

from ..command.errors import one_line
from ..command.settings import Interval, PositiveInt, check_keys
from ..data.rows import folder_cache
from ..hub.failures import RETRIES, pause, retry, seconds_to_wait
from ..images.reading import IMAGE_SUFFIXES, below
from ..input_spec import InputSpec
from .rows import FEATURES, SourceSettings
from .schemas import (
    RowReader,
    columns_of,
    load_stored,
    looks_like_image,
    parse_json,
    recognize,
    row_of,
    text_columns,
    to_conversations,
    with_reader,
)

logger = logging.getLogger(__name__)
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
METADATA = "metadata.jsonl"
# Files that `datasets` writes beside the rows.
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
TABLES = {".parquet", ".tar", ".arrow"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LISTS = {".json", ".jsonl", *DELIMITERS}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LOOKED_AT = 20  # Number of rows that are read to find the image folder of a file.
ENDLESS = 2**62
# Settings of a source that only some locations have.
ALLOWED = {
    "config": ("dataset",),
    "revision": ("dataset", "annotation"),
    "split": ("dataset", "folder"),
    "hub": ("annotation",),
    "columns": ("dataset", "folder"),
    "prompt": ("dataset", "folder"),
}
csv.field_size_limit(2**31 - 1)  # Images that are stored as text exceed Python's default limit.


@dataclasses.dataclass(frozen=True)
class Source(SourceSettings):
    """Description of one source of a mixture. Exactly one of `dataset`, `folder` and `annotation` is set.

    Args:
        name: unique name in the mixture and prefix of the row ids.
        rate: number of passes over the source in one epoch. Above 1 repeats rows, below 1 takes a part of them.
        dataset: Hub id, with `config`, `split` and `revision`.
        folder: local folder of Parquet files, WebDataset tar archives, JSON, JSON Lines or CSV beside images, COCO
            captions, or images with a `metadata.jsonl`, one subfolder per class, or a text file of the same name each.
        annotation: InternVL JSON Lines file, or a JSON list of the same rows, with its `image_root`.
        hub: Hub repo from which the annotation is downloaded by its file name if it is not found on disk, such as
            GreatBird/ViTP, or datasets/ORGANIZATION/NAME for a repo of data, with `revision`.
        image_root: folder that image paths are relative to. Paths that lead out of it, by `..`, as absolute paths or
            over symbolic links, are errors. If it is not set, paths are used as they are, except for JSON in a
            `folder`: there the default is the folder of the JSON file or `images` beside it.
        streaming: whether rows are read on demand, without a copy on disk.
        columns: names of the columns for `id`, `image` or `images`, and `messages`, `conversations` (with `system`),
            `prompt` and `completion`, `caption`, or `question` and `answer`. Columns of a CSV file without a header are
            numbers from 0.
        prompt: question of every row, for a source with an answer column only or with captions.
        rows: number of rows, if it is known before the source is read. The dry run uses it, unless it can count a JSON
            Lines file. A streaming source needs it to compute its share; an estimate is enough.
        obtain: page where the data can be downloaded.
        make: command that creates the annotation. The dry run prints it with the annotation's name and `image_root`.
        modality: one or several image modalities, such as optical, sar or ct.
        tasks: tasks of the questions, such as caption, vqa or grounding.
        general: whether the source is general data, which prevents forgetting.
        first_rows: whether a rate below 1 takes the first rows, as the code released with the paper does, instead of
            random ones.
        options: fields of [`SourceSettings`].
    """

    name: str
    rate: Annotated[float, Interval("(0, 1000000]")] = 1.0
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    folder: str | None = None
    annotation: str | None = None
    hub: str | None = None
    image_root: str | None = None
    streaming: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    rows: PositiveInt | None = None
    obtain: str | None = None
    make: str | None = None
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    general: bool = False
    first_rows: bool = False

    def check(self, names: Collection[str]) -> None:
        """Raise a `ValueError` if settings contradict each other.

        Args:
            names: names of the settings that the mixture file has.
        """
        locations = [key for key in ("dataset", "folder", "annotation") if getattr(self, key)]
        if len(locations) != 1:
            raise ValueError(
                "expected exactly one of dataset (a Hub id), folder, annotation (InternVL JSON Lines) and meta (a "
                f"released meta JSON), found {locations or 'none'}."
            )
        location = locations[0]
        for name, supported_locations in ALLOWED.items():
            if name in names and location not in supported_locations:
                raise ValueError(f"{name} is not supported for a source with {location}.")
        if self.streaming and self.rows is None:
            raise ValueError("a streaming source needs `rows`, its approximate number of rows.")
        if Path(self.annotation or "").suffix.lower() in TABLES:
            raise ValueError(f"annotation must be JSON or CSV, got {self.annotation}. Set it as `dataset`.")
        if self.first_rows and self.rate > 1 and self.rate != int(self.rate):
            raise ValueError(f"with released_compatible, a rate above 1 must be an integer, got {self.rate}.")
        check_keys("columns", self.columns, ("id", "images", "image", "system", *text_columns()))
        InputSpec.from_dict(self.input_spec)

    @property
    def location(self) -> str:
        return self.dataset or self.folder or self.annotation

    @property
    def is_on_hub(self) -> bool:
        path = self.dataset
        if not path and self.hub:
            path = self.annotation
        return path is not None and not Path(path).exists()

    def missing(self) -> str | None:
        """Return a message with the first path that does not exist and its download page, or `None`."""
        paths = [self.folder, self.image_root]
        if not self.hub:
            paths.insert(1, self.annotation)
        for path in paths:
            if path is not None and not Path(path).exists():
                if self.obtain:
                    return f"{path} not found; obtain it from {self.obtain}"
                return f"{path} not found"
        return None


def read_source(source: Source, files: Mapping[Path, str | None] | None = None) -> Dataset | IterableDataset:
    """Return the rows of a source in the schema of this module: map-style, or an iterable if `streaming`.

    JSON Lines are read once and cached by `datasets` until the file changes; images are not copied. If `datasets`
    cannot read JSON Lines from the Hub because a line is damaged, they are downloaded and read line by line. Transient
    HTTP errors and broken connections are retried with increasing delays.

    Args:
        source: source of the rows.
        files: its [`line_files`], if they are known, so that its folder is not searched again.

    Raises:
        ValueError: If the source is not found, cannot be read, or lacks the columns; the message names the source.
    """
    missing = source.missing()
    if missing:
        raise ValueError(f"Source {source.name!r}: {missing}.")
    source = with_local_annotation(source)
    if source.streaming:
        return IterableDataset.from_generator(stream_rows, features=FEATURES, gen_kwargs={"source": source})
    try:
        if files is None:
            files = line_files(source)
        if not files:
            try:
                dataset = retry(partial(load_columns, source))
            except DatasetGenerationError:
                files = retry(partial(download_line_files, source))
                if not files:
                    raise
        if files:
            # The state is a part of the key of the cache, so that a changed file is read again.
            arguments = {"source": source, "files": files, "state": folder_cache(source.location)}
            dataset = Dataset.from_generator(line_rows, features=FEATURES, gen_kwargs=arguments)
            dataset.info.description = schema_of(source, files)
            return dataset
    except Exception as error:  # The readers raise many types; the user needs the name of the source.
        raise source_error(error, source) from error
    return with_reader(dataset, reader_of(source, columns_of(dataset)))


def with_local_annotation(source: Source) -> Source:
    """Return the source with an annotation on disk, downloaded from `hub` if necessary.

    Raises:
        ValueError: If the repo cannot be read, or has not exactly one file of this name.
    """
    if source.hub is None or not source.is_on_hub:
        return source
    name = Path(source.annotation).name
    repo_type = "dataset" if source.hub.startswith("datasets/") else "model"
    download = partial(
        snapshot_download,
        source.hub.removeprefix("datasets/"),
        repo_type=repo_type,
        revision=source.revision,
        allow_patterns=[name, f"*/{name}"],
    )
    try:
        snapshot = Path(retry(download))
        matching_files = sorted(snapshot.rglob(glob.escape(name)))
    except Exception as error:  # The client raises many types; the user needs the name of the source.
        raise source_error(error, source) from error
    if len(matching_files) != 1:
        raise ValueError(
            f"Source {source.name!r}: expected one file {name} in the Hub repo {source.hub}, found "
            f"{len(matching_files)}."
        )
    return dataclasses.replace(source, annotation=str(matching_files[0]))


def source_error(error: Exception, source: Source, row: int | None = None) -> ValueError:
    """Return an error on one line: name of the source, row, and the error of the Hub or else the first cause."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    reason = " ".join(str(cause).split())
    if not reason:
        reason = type(cause).__name__
    if reason.startswith(f"Source {source.name!r}"):
        return ValueError(reason)
    reason = reason.removeprefix(f"{source.location} is not valid JSON: ")
    reason = damaged_metadata(source) or reason
    location = "" if row is None else f", row {row}"
    reason = with_row_files(reason, source)
    return ValueError(f"Source {source.name!r}{location}: {source.location} cannot be read: {reason}")


def with_row_files(reason: str, source: Source) -> str:
    """Return the reason of an error with the names of the files that may hold the rows, unless it names one."""
    folder = Path(source.location)
    if source.is_on_hub or not folder.is_dir():
        return reason
    row_files = files_with_suffixes(files_by_suffix(folder), LISTS | TABLES)
    names = [str(path.relative_to(folder)) for path in row_files if path.name not in NO_ROWS]
    if not names or any(name in reason for name in names):
        return reason
    if len(names) > 3:
        names = [*names[:3], "…"]
    reason = reason.rstrip(".")
    return f"{reason}. Files that may hold the rows: {', '.join(names)}."


def damaged_metadata(source: Source) -> str | None:
    """Return the error of the first file of metadata beside images that cannot be read: `datasets` does not name it."""
    folder = Path(source.location)
    if source.is_on_hub or not folder.is_dir():
        return None
    for path in sorted(folder.rglob("metadata.*")):
        if path.suffix not in (".jsonl", ".csv"):
            continue
        try:
            for _, entry in numbered_rows(path):
                if isinstance(entry, ValueError):
                    return str(entry)
        except ValueError as error:
            return str(error)
    return None


def load_columns(source: Source) -> Dataset | IterableDataset:
    """Return the data set of a source with its columns as they are stored."""
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
    listed_suffixes = ", ".join(sorted(suffixes)) or "nothing"
    raise ValueError(f"expected Parquet files, JSON, tar archives or images in {folder}, found {listed_suffixes}")


def place_of(name: str, config: str | None) -> dict[str, object]:
    """Return the arguments of `load_dataset` for a folder, a Hub id or a file. The rows of a file are split `train`.

    Raises:
        ValueError: If the file type is not supported.
    """
    path = Path(name)
    if not path.is_file():
        return {"path": name, "name": config, "cache_dir": folder_cache(name)}
    suffix = path.suffix.lower()
    if suffix in LISTS:
        raise ValueError(f"expected {', '.join(BUILDERS)}, got {name}. Set it as `annotation`, with `image_root`.")
    if suffix not in BUILDERS:
        raise ValueError(
            f"expected a folder or a file of type {', '.join(BUILDERS)}, .json, .jsonl, .csv or .tsv, got {name}."
        )
    return {"path": BUILDERS[suffix], "data_files": {"train": name}}


def reader_of(source: Source, features: Features | dict) -> RowReader:
    """Return the row reader of a source with these columns; a `ValueError` names the source."""
    options = {"source": source.name, "prompt": source.prompt, "image_root": source.image_root}
    try:
        return RowReader.of(features, source.columns, **options)
    except ValueError as error:
        reason = with_row_files(str(error), source)
        raise ValueError(f"Source {source.name!r}, {source.location}: {reason}") from error


def line_rows(source: Source, files: dict[Path, str | None], state: str | None = None) -> Iterator[dict]:
    """Yield the rows of JSON, CSV and text files.

    The id of a row without one is the number of its line in an annotation, or else its number in all files.

    Args:
        source: source of the rows.
        files: files with their image folders, see [`line_files`].
        state: part of the cache key, which changes if the files change.

    Raises:
        ValueError: If a file cannot be read, there are no rows, no row of a folder can be read, or the columns of its
            rows match no schema.
    """
    reader = None
    if source.columns or not source.annotation:
        # All columns are read first, so that an error names wrong columns before any row is read.
        reader = reader_of(source, columns_in_lines(files))
    num_rows = 0
    for path, line_number, entry in read_lines(files):
        row_id = line_number if source.annotation else num_rows
        yield line_row(
            entry,
            source,
            str(row_id),
            files[path],
            reader,
        )
        num_rows += 1
    if num_rows == 0:
        raise ValueError("expected rows, found none.")


def columns_in_lines(files: Iterable[Path]) -> dict[str, None]:
    """Return the columns of all rows of files, in order; raise the first error if no row can be read."""
    columns = {}
    first_error = None
    for _, _, entry in read_lines(files):
        if isinstance(entry, dict):
            columns.update(dict.fromkeys(entry))
        elif first_error is None:
            first_error = entry
    if not columns and first_error is not None:
        raise first_error
    return columns


def line_row(
    entry: dict | ValueError,
    source: Source,
    row_id: str,
    image_root: str | None,
    reader: RowReader | None,
) -> dict:
    """Return a row that is read by the columns of all rows, or without a `reader` by its own fields."""
    try:
        if isinstance(entry, ValueError):
            raise entry
        fields = {name: value for name, value in entry.items() if value is not None}
        if reader is None:
            reader = reader_of_fields(tuple(fields), source.name, source.prompt)
        stored = dict.fromkeys(reader.columns.values())
        stored.update(fields)
        return reader(stored, row_id, image_root)
    except ValueError as error:
        return row_of(
            source.name,
            row_id,
            [],
            [],
            str(error),
        )


@lru_cache(maxsize=1000)
def reader_of_fields(names: tuple[str, ...], source: str, prompt: str | None) -> RowReader:
    return RowReader.of(dict.fromkeys(names), source=source, prompt=prompt)


def stream_rows(source: Source, parts: int = 1, part: int = 0) -> Iterator[dict]:
    """Yield the rows of a streaming source, or of one of several parts of it.

    After a transient error, the stream continues from the same row.
    """
    try:
        files = line_files(source)
        if files:
            yield from itertools.islice(line_rows(source, files), part, None, parts)
            return
    except (OSError, ValueError) as error:
        raise source_error(error, source) from error
    num_rows = 0
    retries = 0
    while True:
        try:
            if files:
                rows = itertools.islice(line_rows(source, files), part + num_rows * parts, None, parts)
            else:
                rows = stored_rows(source, num_rows, parts, part)
            for row in rows:
                yield row
                num_rows += 1
                retries = 0
            return
        except Exception as error:  # The readers raise many types; the user needs the name of the source.
            wait = seconds_to_wait(error, retries)
            is_damaged = wait is None and isinstance(error, (ValueError, DatasetGenerationError))
            if is_damaged and not files and parts == 1:
                files = retry(partial(download_line_files, source))
                if files:
                    continue
            described_error = source_error(error, source, num_rows)
            if wait is None or retries == RETRIES:
                raise described_error from error
            pause(described_error, wait, retries)
            retries += 1


def stored_rows(
    source: Source,
    start: int,
    parts: int,
    part: int,
) -> Iterator[dict]:
    """Yield the rows of one part of a stream, from row `start`. Row numbers are unique over all parts.

    If the number of files is a multiple of `parts`, each part reads its own files. Otherwise, each part reads all files
    and takes every `parts`-th row.
    """
    dataset, reader = columns_of_stream(source)
    if dataset.num_shards % parts == 0:
        rows = all_rows(dataset.shard(parts, part).skip(start))
    else:
        rows = itertools.islice(all_rows(dataset), part + start * parts, None, parts)
    for number, stored in enumerate(rows, start):
        yield reader(stored, part + number * parts)


def columns_of_stream(source: Source) -> tuple[IterableDataset, RowReader]:
    """Return a streaming source with the columns that are used, undecoded, and its row reader."""
    dataset = load_columns(source)
    if dataset.features is None:
        dataset = dataset._resolve_features()
    reader = reader_of(source, columns_of(dataset))
    return dataset.select_columns(reader.stored_columns(dataset.features)).decode(False), reader


def schema_of(source: Source, files: Mapping[Path, str | None] | None = None) -> str:
    """Return the name of the schema of a source, from its columns or its first row that is a conversation.

    Args:
        source: source of the rows.
        files: its [`line_files`], if they are known.
    """
    if files is None:
        files = line_files(source)
    if not files:
        _, reader = columns_of_stream(source)
        return reader.name
    for _, _, entry in itertools.islice(read_lines(files), LOOKED_AT):
        try:
            return reader_of(source, entry).name
        except (ValueError, TypeError):
            continue
    return "no conversations"


def all_rows(stream: IterableDataset) -> Iterator[dict]:
    """Yield all rows of a stream. In a data-loader worker, plain iteration would yield only the worker's share."""
    for batch in stream.iter(batch_size=8):
        for fields in zip(*batch.values()):
            yield dict(zip(batch, fields))


def line_files(source: Source) -> dict[Path, str | None]:
    """Return the JSON, CSV or text files with the rows of a source, each with its image folder or `None`.

    The files are the annotation, JSON Lines of a local data set, image metadata, or JSON, CSV or text beside images.
    The result is empty if the rows are in other files.
    """
    if source.annotation:
        return {Path(source.annotation): source.image_root}
    if source.is_on_hub:
        return {}
    folder = Path(source.location)
    if source.folder and any(folder.rglob(METADATA)):
        builder = load_dataset_builder("imagefolder", data_dir=source.folder)
        paths = map(Path, data_files(builder, source.split))
        return {path: str(path.parent) for path in paths if path.name == METADATA}
    if source.dataset and any(folder.rglob("*.jsonl")):
        builder = load_dataset_builder(source.dataset, source.config)
        paths = [Path(file) for file in data_files(builder, source.split)]
        if paths and all(path.suffix == ".jsonl" for path in paths):
            return dict.fromkeys(paths, source.image_root)
    if source.folder or has_images(folder):
        paths = annotation_files(folder, source.columns, source.prompt).get(source.split, [])
        return with_image_roots(source, paths)
    return {}


def data_files(builder: DatasetBuilder, split: str) -> list[str]:
    """Return the paths or addresses of the files of a split."""
    files_by_split = builder.config.data_files or {}
    return [str(file) for file in files_by_split.get(split, ())]


def with_image_roots(source: Source, paths: Sequence[Path]) -> dict[Path, str]:
    """Return files with the rows of a source, each with its image folder."""
    folder = Path(source.location)
    return {path: source.image_root or image_root(path, folder) for path in paths}


def download_line_files(source: Source) -> dict[Path, str | None]:
    """Download the JSON Lines of a Hub data set and return their paths like [`line_files`]."""
    if not source.is_on_hub:
        return {}
    builder = load_dataset_builder(source.dataset, source.config, revision=source.revision)
    addresses = data_files(builder, source.split)
    if not all(address.endswith(".jsonl") for address in addresses):
        return {}
    paths = DownloadManager().download(addresses)
    return dict.fromkeys(map(Path, paths), source.image_root)


def read_lines(files: Iterable[Path]) -> Iterator[tuple[Path, int, dict[str, Any] | ValueError]]:
    """Yield file, number and content of the rows of files; an error replaces the content.

    Columns of `imagefolder` metadata are renamed.
    """
    for path in files:
        for number, entry in numbered_rows(path):
            if not isinstance(entry, (dict, ValueError)):
                entry = ValueError(f"line {number} of {path}: expected a mapping, got {str(entry)[:80]!r}.")
            if path.name == METADATA and isinstance(entry, dict):
                entry = {image_column(name): value for name, value in entry.items()}
            yield path, number, entry


def image_column(name: str) -> str:
    """Convert `file_name` and `file_names` of metadata to `image` and `images`, `before_file_name` to `before`."""
    if name in ("file_name", "file_names"):
        return "image" + name[len("file_name") :]
    return name.removesuffix("_file_names").removesuffix("_file_name")


def numbered_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield number and content of the rows of a file. Lines count from 1, rows of a JSON list or CSV from 0.

    A text file is one row, the caption of the image with the same name. COCO captions have a row for each caption.

    Raises:
        ValueError: If the file contains JSON that is neither a list nor COCO captions; the message names the file.
    """
    path = Path(path)
    if path.suffix.lower() in DELIMITERS:
        yield from csv_rows(path)
        return
    if path.suffix.lower() == ".txt":
        yield 0, text_row(path)
        return
    with open(path, "rb") as file:
        if is_in_lines(path):
            yield from parsed_lines(file, path)
            return
        rows = parse_json(file.read(), str(path))
    if isinstance(rows, dict) and {"images", "annotations"} <= rows.keys():
        rows = coco_rows(rows, path)
    if not isinstance(rows, list):
        raise ValueError(f"expected a JSON list of rows in {path}, got {type(rows).__name__}")
    yield from enumerate(rows)


def text_row(path: Path) -> dict[str, str] | ValueError:
    """Return the row of a text file, the caption of the image with its name, or an error."""
    try:
        caption = below(path.parent, path.name).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        return ValueError(f"{path}: {error}. Save it as UTF-8.")
    except ValueError as error:  # a link that leads out
        return error
    return {"id": path.stem, "image": captioned_image(path).name, "caption": caption}


def coco_rows(content: dict, path: Path) -> list[dict]:
    """Return a row for each caption of a COCO file."""
    rows = []
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            # The caption of a box describes its object, not the image.
            if "caption" in annotation and "bbox" not in annotation:
                image_name = names[annotation["image_id"]]
                rows.append({"id": annotation["id"], "image": image_name, "caption": annotation["caption"]})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected images with id and file_name, and captions with id and the image_id of one of them, "
            f"found none for {error}"
        ) from None  # the error of a source is its first cause
    return rows


def parsed_lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the content of each line that is not empty; an error replaces the content."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse_json(line, f"line {number} of {path}")
            except ValueError as error:
                yield number, error


@contextmanager
def open_csv(path: Path) -> Iterator[TextIO]:
    """Open a CSV file; a `ValueError` names it if its text is not UTF-8."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}. Save it as UTF-8.") from None


def csv_names(path: Path) -> tuple[list[str], bool]:
    """Return the names of the columns of a CSV file, and whether its first line has them.

    A first line with the name of an image file is a row. The columns of two texts are then `image` and `caption`, other
    columns are numbered from 0.
    """
    with open_csv(path) as file:
        delimiter = DELIMITERS[path.suffix.lower()]
        lines = csv.reader(file, delimiter=delimiter)
        first_line = next(lines, [])
    if len(first_line) == 1 and ";" in first_line[0]:
        raise ValueError(f"{path}: expected columns separated by {delimiter!r}, got {first_line[0]!r}.")
    image_flags = [looks_like_image(cell) for cell in first_line]
    if not any(image_flags):
        return first_line, True
    if image_flags == [True, False]:
        return ["image", "caption"], False
    if image_flags == [False, True]:
        return ["caption", "image"], False
    return [str(index) for index in range(len(first_line))], False


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """Yield number and content of the rows of a CSV file; all values are texts.

    A quotation mark that is neither doubled nor at an end of its field is an error. Otherwise a field that begins with
    such a mark would contain the rows after it.
    """
    names, is_header = csv_names(path)
    with open_csv(path) as file:
        rows = csv.DictReader(
            file,
            names,
            delimiter=DELIMITERS[path.suffix.lower()],
            strict=True,
        )
        if is_header:
            next(rows.reader, None)
        for number in itertools.count():
            try:
                row = next(rows, None)
            except csv.Error as error:
                remedy = "Write a text with quotation marks in quotation marks, and those inside twice."
                yield number, ValueError(f"line {rows.reader.line_num} of {path}: {error}. {remedy}")
                continue
            if row is None:
                return
            if None in row or None in row.values():
                row = ValueError(f"line {rows.line_num} of {path}: expected as many fields as in the first line.")
            yield number, row


def captioned_image(path: Path) -> Path | None:
    """Return the image with the name of a text file, or `None`, also if the text has no words.

    UTF-16 counts as words, so that the reader of the text says how to save it.
    """
    image = image_beside(path)
    if image is None:
        return None
    content = path.read_bytes()
    has_words = re.search("[^\\W\\d]{2}", content.decode(errors="replace")) is not None
    return image if has_words or content.startswith(UTF16) else None


def image_beside(path: Path) -> Path | None:
    """Return the image whose name differs from that of a file in its suffix alone, or `None`."""
    for suffix in sorted(IMAGE_SUFFIXES):
        for spelling in (suffix, suffix.upper()):
            image = path.with_suffix(spelling)
            if image.is_file():
                return image
    return None


def is_coco_captions(path: Path) -> bool:
    """Return whether a JSON file has annotations with captions."""
    if path.suffix.lower() != ".json" or begins_with(path) != b"{":
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"annotations"') >= 0 and content.find(b'"caption"') >= 0


def files_by_suffix(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by lowercase suffix, without hidden files and checkpoints."""
    files: dict[str, list[Path]] = {}
    depth = len(folder.parts)
    for path in sorted(folder.rglob("*")):
        names = path.parts[depth:]
        is_ignored = any(name.startswith((".", "checkpoint-")) for name in names)
        if not is_ignored and path.is_file():
            files.setdefault(path.suffix.lower(), []).append(path)
    return files


def annotation_files(
    folder: Path,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> dict[str, list[Path]]:
    """Return the CSV files, or else the JSON and JSON Lines files, or text files beside images of a folder, by split.

    The result is empty if the rows are in Parquet files, archives or image metadata. A file that is not read is logged.

    Args:
        columns, prompt: column names and question for CSV files, see [`Source`].
    """
    files = files_by_suffix(folder)
    json_files = []
    for path in files.get(".json", []) + files.get(".jsonl", []):
        if path.name not in NO_ROWS and path.name != METADATA:
            json_files.append(path)
    csv_files = files_with_suffixes(files, DELIMITERS)
    csv_files_with_rows = [path for path in csv_files if has_header_of_rows(path, columns or {}, prompt)]
    tables = files_with_suffixes(files, TABLES)
    for path in files.get(".jsonl", []) + csv_files:
        if path.stem == "metadata":
            tables.append(path)

    if tables:
        row_files = []
        read_files = tables
        reason = f"the rows of the folder are in {tables[0].name}"
    else:
        row_files = csv_files_with_rows
        if not row_files:
            row_files = [path for path in json_files if path.suffix.lower() == ".jsonl" or holds_rows(path)]
        if not row_files:
            row_files = [path for path in files.get(".txt", []) if captioned_image(path)]
        # An error then names the columns of the CSV files. A folder of classes, which needs a prompt, may have others.
        if not row_files and prompt is None:
            row_files = csv_files
        read_files = row_files + csv_files_with_rows
        reason = "no list of conversations"
        if csv_files_with_rows:
            reason = f"the rows of the folder are in {csv_files_with_rows[0].name}"
    unread_files = {*json_files, *csv_files}.difference(read_files)
    if unread_files:
        warn_unread(tuple(sorted(unread_files)), reason)
    splits: dict[str, list[Path]] = {}
    for path in row_files:
        split = split_in_path(path.relative_to(folder))
        splits.setdefault(split, []).append(path)
    return splits


def files_with_suffixes(files: Mapping[str, list[Path]], suffixes: Iterable[str]) -> list[Path]:
    """Return the files with any of the suffixes, out of those of [`files_by_suffix`]."""
    selected_files = []
    for suffix in sorted(suffixes):
        selected_files += files.get(suffix, [])
    return selected_files


@cache
def warn_unread(paths: tuple[Path, ...], why: str) -> None:
    """Log once which files are not read."""
    more = f" and {len(paths) - 1} more are" if len(paths) > 1 else " is"
    logger.warning("%s%s not read: %s.", paths[0], more, why)


def has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def split_in_path(path: Path) -> str:
    """Return the split whose name or synonym is a word of a path, `train` by default."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    for split, synonyms in SPLIT_KEYWORDS.items():
        if words & set(synonyms):
            return str(split)
    return "train"


def holds_rows(path: Path) -> bool:
    """Return whether a JSON file is a list or has one row per line."""
    return begins_with(path) == b"[" or is_in_lines(path) or is_coco_captions(path)


def has_header_of_rows(path: Path, columns: Mapping[str, str], prompt: str | None) -> bool:
    """Return whether the columns of a CSV file form a known schema, with the names in `columns` that it has."""
    try:
        names, _ = csv_names(path)
        known_columns = {role: column for role, column in columns.items() if column in names}
        recognize(names, known_columns, prompt)
    except (ValueError, csv.Error):
        return False
    return True


def begins_with(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def is_in_lines(path: Path) -> bool:
    """Return whether a file has one row per line, by its suffix or, for `.json`, by its first lines."""
    if path.suffix.lower() != ".json":
        return True
    if begins_with(path) != b"{":
        return False
    with open(path, "rb") as file:
        lines = (line for line in file if line.strip())
        first_line = next(lines, b"")
        second_line = next(lines, b"")
    if not is_object(first_line):
        return False
    try:
        recognize(json.loads(first_line))
    except (ValueError, TypeError):
        return is_object(second_line)
    return True


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def image_root(file: Path, folder: Path) -> str:
    """Return the folder that image paths in a JSON or CSV file are relative to, the data set if they are absolute.

    Candidates are the folder of the file, the folder of the data set, and `images` in either, then the other folders of
    the data set. The first candidate is returned that contains an image of the first rows, or else any image, so that
    an error names a missing image in the folder of the others.
    """
    num_rows = 0
    for _, row in numbered_rows(file):
        paths = image_paths(row) if isinstance(row, dict) else []
        for path in paths:
            if "://" in path:
                continue
            if Path(path).is_absolute():
                return str(folder)
            for root in possible_image_roots(file, folder):
                if (root / path).is_file():
                    return str(root)
        num_rows += bool(paths)
        if num_rows == LOOKED_AT:
            break
    for root in possible_image_roots(file, folder):
        if root.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
            return str(root)
    return str(file.parent)


def image_paths(row: dict[str, Any]) -> list[str]:
    """Return the names of image files in the columns of a row."""
    paths = []
    for column in row.values():
        for content in column if isinstance(column, list) else [column]:
            if isinstance(content, str) and looks_like_image(content):
                paths.append(content)
    return paths


def possible_image_roots(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the folders in which the images of a file may be; the slow search of a large folder comes last."""
    for parent in (file.parent, folder):
        yield parent
        yield parent / "images"
    for pattern in ("*", "images/*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                yield path


def load_rows(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """Return all splits of the data set `dataset_name`, with their columns as they are stored.

    Transient HTTP errors and broken connections are retried with increasing delays.

    Raises:
        ValueError: If the split to train on does not exist.
    """
    name = script_args.dataset_name
    load = partial(
        load_stored,
        **place_of(name, script_args.dataset_config),
        streaming=script_args.dataset_streaming,
    )
    try:
        splits = retry(load)
    except DatasetGenerationError as error:
        files = list_files(name, script_args.dataset_train_split)
        try:
            line_error = first_line_error(files)
        except ValueError as list_error:  # The file is a JSON list, which is parsed as a whole.
            raise ValueError(f"{name} cannot be read: {list_error}. Repair the file.") from error
        if line_error is None:
            cause = one_line(str(error.__cause__ or error))
        else:
            cause = f"{line_error}. In a source of a mixture, such a row can be skipped."
        raise ValueError(f"{name} cannot be read: {cause}") from error
    train = base_of(script_args.dataset_train_split)
    if train not in splits:
        raise ValueError(f"Split {train!r} not found in {name}. Found: {sorted(splits)}. Set dataset_train_split.")
    return splits


def list_files(name: str, split: str) -> Iterable[Path]:
    """Return the JSON Lines and JSON lists of a folder, or of a split on the Hub."""
    if not Path(name).is_dir():
        return retry(partial(download_line_files, Source(name, dataset=name, split=split)))
    files = []
    for path in sorted(Path(name).rglob("*.json*")):
        if path.is_file() and (path.suffix == ".jsonl" or (path.suffix == ".json" and holds_rows(path))):
            files.append(path)
    return files


def first_line_error(files: Iterable[Path]) -> ValueError | None:
    """Return the error of the first line that cannot be read, or `None`."""
    for _, _, entry in read_lines(files):
        if isinstance(entry, ValueError):
            return entry
    return None


def open_splits(
    args: ScriptArguments,
    root: str | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> tuple[dict[str, Dataset | IterableDataset], list[str]]:
    """Open the training and the test split, as far as they exist, and return them with the names of all splits.

    The name of a split may select a part of it, such as `train[:100]`.

    Args:
        root: folder that image paths are relative to.
        columns, prompt: names of columns, and question of every row, see [`Source`].

    Raises:
        ValueError: If the split to train on does not exist, or its rows match no schema or several.
    """
    name = args.dataset_name
    sources = json_sources(
        Path(name),
        root,
        streaming=args.dataset_streaming,
        columns=columns or {},
        prompt=prompt,
    )
    splits = sources or load_rows(args)
    opened = {}
    for part in (args.dataset_train_split, args.dataset_test_split):
        split = base_of(part)
        if split not in splits:
            continue
        try:
            if sources:
                source, paths = sources[split]
                rows = read_json_source(source, paths)
            else:
                rows = to_conversations(splits[split], root, columns, prompt)
            opened[part] = take(rows, part)
        except ValueError as error:
            reason = re.sub(r"^Source '.*?: (?=the columns )", "", str(error))
            raise ValueError(f"{name}, split {part!r}: {reason}") from error
    if args.dataset_train_split not in opened:
        raise ValueError(
            f"Split {args.dataset_train_split!r} not found in {name}. Found: {sorted(splits)}. Set dataset_train_split."
        )
    return opened, sorted(splits)


def read_json_source(source: Source, paths: list[Path]) -> Dataset | IterableDataset:
    """Return the rows of one of [`json_sources`] with the name of their schema."""
    files = line_files(source) if source.annotation else with_image_roots(source, paths)
    rows = read_source(source, files)
    if source.streaming:
        rows.info.description = schema_of(source, files)
    return rows


def json_sources(place: Path, root: str | None, **settings) -> dict[str, tuple[Source, list[Path]]]:
    """Return the sources of a JSON file or a folder of JSON and images, with their files, by split.

    The result is empty for other data sets.

    `settings` are fields of [`Source`]. `datasets` reads a folder with more images than JSON files as an image folder,
    without the JSON.
    """
    if place.is_file() and place.suffix.lower() in LISTS:
        if not root:
            root = image_root(place, place.parent)
        source = Source(
            place.stem,
            annotation=str(place),
            image_root=root,
            **settings,
        )
        return {"train": (source, [place])}
    if not place.is_dir() or not (root or has_images(place)):
        return {}
    source = Source(
        place.resolve().name,
        folder=str(place),
        image_root=root,
        **settings,
    )
    sources = {}
    for split, paths in annotation_files(place, source.columns, source.prompt).items():
        sources[split] = (dataclasses.replace(source, split=split), paths)
    return sources


def source_of(name: str, split: str, config: str | None, root: str | None, **settings) -> Source:
    """Return the source for a `dataset_name`, see [`json_sources`]."""
    sources = json_sources(Path(name), root, **settings)
    if split in sources:
        source, _ = sources[split]
        return source
    return Source(
        Path(name).name,
        dataset=name,
        config=config,
        split=split,
        image_root=root,
        **settings,
    )


def base_of(part: str) -> str:
    return part.partition("[")[0]


def take(rows: Dataset | IterableDataset, part: str) -> Dataset | IterableDataset:
    """Return the rows of a part of a split, such as `train[:100]`, `train[10%:]`, or a sum of parts.

    Raises:
        ValueError: If a stream does not support the part, or the part has no rows.
    """
    split = base_of(part)
    if split == part:
        return rows
    is_stream = isinstance(rows, IterableDataset)
    if is_stream and any(mark in part for mark in "%-+"):
        raise ValueError(f"expected row numbers from the start of a stream, such as train[10:20], got {part}.")
    length = ENDLESS if is_stream else len(rows)
    ranges = []
    for instruction in ReadInstruction.from_spec(part).to_absolute({split: length}):
        end = length if instruction.to is None else min(instruction.to, length)
        ranges.append(range(instruction.from_ or 0, end))
    if is_stream:
        start = ranges[0].start
        end = ranges[0].stop
        rows = rows.skip(start)
        return rows if end == ENDLESS else rows.take(end - start)
    if not any(ranges):
        raise ValueError(f"{part} has no rows: {split} has {length}.")
    if len(ranges) == 1:
        return rows.select(ranges[0])
    return rows.select(list(itertools.chain.from_iterable(ranges)))
