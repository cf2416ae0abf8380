"""JSON, by line or as a list, and CSV: what is wrong with a row is its error, and of no other.

The reader of `datasets` ends with the first line that cannot be parsed, and makes the types of all lines agree. Those
of the Hub are left to it as long as it can read them.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from datasets import DownloadManager, load_dataset_builder

from .folders import DELIMITERS, METADATA, annotations, has_images, image_root, is_in_lines
from .mixture_file import Source
from .rows import Written
from .schemas import IMAGES

LOOKED_AT = 20  # rows of a file, to find its images
csv.field_size_limit(2**31 - 1)  # an image in a table, as text, is longer than what Python allows by itself


def parse(line: bytes, where: str) -> Any:
    """What a line holds, numbers with a point as [`Written`]; a `ValueError` names the place."""
    try:
        return json.loads(line, parse_float=Written)
    except (ValueError, RecursionError) as error:
        hint = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{where} is no JSON: {error}{hint}") from None  # which all there is to say is in


def entries(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each line that is not empty; in place of the content the error, if it has none."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse(line, f"line {number} of {path}")
            except ValueError as error:
                yield number, error


def listed(path: str | Path) -> Iterator[tuple[int, Any]]:
    """As [`entries`], of a file with a row a line or of a JSON list or CSV, whose rows are counted from 0.

    Raises:
        ValueError: names the file if it is to be a list and is none.
    """
    if Path(path).suffix.lower() in DELIMITERS:
        yield from tabled(path)
        return
    with open(path, "rb") as file:
        if is_in_lines(Path(path)):
            yield from entries(file, path)
            return
        rows = parse(file.read(), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no JSON list of rows, but a {type(rows).__name__}")
    yield from enumerate(rows)


def tabled(path: str | Path) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """As [`listed`], of a CSV, all values of which are texts."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=DELIMITERS[Path(path).suffix.lower()])
        for number, row in enumerate(rows):
            if None in row or None in row.values():
                row = ValueError(f"line {rows.line_num} of {path} has not as many fields as the first line.")
            yield number, row


def line_files(source: Source) -> dict[Path, str | None]:
    """The files of a source whose rows are JSON, each with the folder that its images are below, if there is one.

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
        files = annotations(folder, source.columns, source.prompt).get(source.split, ())
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
    """What the user says, or where the images of the first rows that have some are."""
    if source.image_root is not None:
        return source.image_root
    columns = (source.columns["images"],) if "images" in source.columns else IMAGES
    return image_root(path, folder, first_with_images(path, columns), columns)


def first_with_images(path: Path, columns: Sequence[str] = IMAGES) -> Iterator[dict]:
    """The first rows of a file that name an image in one of the columns."""
    rows = (row for _, row in listed(path) if isinstance(row, dict) and any(map(row.get, columns)))
    return itertools.islice(rows, LOOKED_AT)


def read_lines(files: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any] | ValueError]]:
    """The rows of the files, with images under the names that `imagefolder` gives them, or what is wrong with one."""
    for path in files:
        for number, entry in listed(path):
            if not isinstance(entry, (dict, ValueError)):
                entry = ValueError(f"line {number} of {path} holds {str(entry)[:80]!r}, and no row.")
            if path.name == METADATA and isinstance(entry, dict):
                entry = {image_column(name): value for name, value in entry.items()}
            yield path, entry


def image_column(name: str) -> str:
    """`file_name` and `file_names` of metadata to `image` and `images`, `before_file_name` to `before`."""
    if name in ("file_name", "file_names"):
        return "image" + name[len("file_name") :]
    return name.removesuffix("_file_names").removesuffix("_file_name")


def first_bad_line(files: Iterable[Path]) -> str | None:
    """What is wrong with the first line that cannot be parsed."""
    return next((str(entry) for _, entry in read_lines(files) if isinstance(entry, ValueError)), None)
