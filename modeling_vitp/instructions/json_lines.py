"""JSON Lines, read line by line: what is wrong with one is the error of its row, and of no other.

The reader of `datasets` ends with the first line that cannot be parsed, and makes the types of all lines agree. Those
of the Hub are left to it as long as it can read them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datasets import DownloadManager, load_dataset_builder

from .mixture_file import Source
from .rows import Written

METADATA = "metadata.jsonl"


def parse(line: bytes, where: str) -> Any:
    """What a line holds, numbers with a point as [`Written`]; a `ValueError` names the place."""
    try:
        return json.loads(line, parse_float=Written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def entries(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each line that is not empty; in place of the content the error, if it has none."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse(line, f"line {number} of {path}")
            except ValueError as error:
                yield number, error


def line_files(source: Source) -> tuple[Path, ...]:
    """The files of a source that is made of JSON Lines, those of a local data set or metadata of images; or none."""
    if source.folder and any(Path(source.folder).rglob(METADATA)):
        builder = load_dataset_builder("imagefolder", data_dir=source.folder)
    elif source.dataset and not source.is_on_hub and any(Path(source.dataset).rglob("*.jsonl")):
        builder = load_dataset_builder(source.dataset, source.config)
    else:
        return ()
    files = tuple(Path(str(file)) for file in (builder.config.data_files or {}).get(source.split, ()))
    if source.folder:
        return tuple(path for path in files if path.name == METADATA)
    return files if all(path.suffix == ".jsonl" for path in files) else ()


def download_line_files(source: Source) -> tuple[Path, ...]:
    """The files of a data set of the Hub that is made of JSON Lines, in the cache of the Hub; or none."""
    if not source.is_on_hub:
        return ()
    builder = load_dataset_builder(source.dataset, source.config, revision=source.revision)
    addresses = [str(file) for file in (builder.config.data_files or {}).get(source.split, ())]
    if not all(address.endswith(".jsonl") for address in addresses):
        return ()
    return tuple(map(Path, DownloadManager().download(addresses)))


def read_lines(files: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any] | ValueError]]:
    """The rows of the files, with images under the names that `imagefolder` gives them, or what is wrong with one."""
    for path in files:
        with open(path, "rb") as file:
            for number, entry in entries(file, path):
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
