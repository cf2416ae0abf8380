"""What a folder on this machine holds that rows can be read from: JSON beside images, and where those images are."""

import csv
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from datasets.data_files import SPLIT_KEYWORDS

from ..images.reading import IMAGE_SUFFIXES
from .schemas import IMAGES, recognise

logger = logging.getLogger(__name__)
METADATA = "metadata.jsonl"
# Of `datasets` itself, beside rows that lie elsewhere.
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
TABLES = {".parquet", ".tar", ".arrow"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LISTS = {".json", ".jsonl", *DELIMITERS}


def files_by_suffix(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder, by their endings in small letters; hidden ones and checkpoints are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith((".", "checkpoint-")) for part in path.relative_to(folder).parts):
            found.setdefault(path.suffix.lower(), []).append(path)
    return found


def annotations(
    folder: Path, columns: Mapping[str, str] | None = None, prompt: str | None = None
) -> dict[str, list[Path]]:
    """The CSV, or else JSON and JSON Lines, of a folder that have its rows, by split: that of the path, or `train`.

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
        warn(unread, f"the rows of the folder are in {others[0].name}" if others else "no list of conversations")
    splits: dict[str, list[Path]] = {}
    for path in rows:
        splits.setdefault(split_of(path.relative_to(folder)), []).append(path)
    return splits


@cache
def warn(paths: tuple[Path, ...], why: str) -> None:
    """Says once what is not read."""
    more = f" and {len(paths) - 1} more are" if len(paths) > 1 else " is"
    logger.warning("%s%s not read: %s.", paths[0], more, why)


def has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def split_of(path: Path) -> str:
    """The split whose name, or another word for it, is a word of a path."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((str(split) for split, names in SPLIT_KEYWORDS.items() if words & set(names)), "train")


def holds_rows(path: Path) -> bool:
    """Whether a JSON is a list, or has a row a line."""
    return begins_with(path) == b"[" or is_in_lines(path)


def has_header_of_rows(path: Path, columns: Mapping[str, str], prompt: str | None) -> bool:
    """Whether the columns of a CSV make conversations, with those of `columns` that it has."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()]), [])
        recognise(names, {role: column for role, column in columns.items() if column in names}, prompt)
    except (ValueError, csv.Error):
        return False
    return True


def begins_with(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def is_in_lines(path: Path) -> bool:
    """Whether a file has a row a line, by its ending or, if that says JSON, by its first lines: one with the columns of
    a conversation, or two objects.
    """
    if path.suffix.lower() != ".json":
        return True
    if begins_with(path) != b"{":
        return False
    with open(path, "rb") as file:
        first, second, *_ = *itertools.islice((line for line in file if line.strip()), 2), b"", b""
    if not is_object(first):
        return False
    try:
        recognise(json.loads(first))
    except (ValueError, TypeError):
        return is_object(second)
    return True


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def image_root(file: Path, folder: Path, rows: Iterable[Any], columns: Iterable[str] = IMAGES) -> str | None:
    """The folder that the paths of images in a JSON are relative to: its own, the data set's, or `images` in either.

    Args:
        rows: of the file, of which an image is looked for. `None` is returned where its path is absolute.
        columns: that have the images.
    """
    own = str(file.parent)
    for row in rows:
        images = [row.get(name) for name in columns] if isinstance(row, dict) else []
        images = [path for item in images for path in (item if isinstance(item, list) else [item])]
        for path in images:
            if not isinstance(path, str) or not path or "://" in path:
                continue
            if Path(path).is_absolute():
                return None
            places = [place for root in (file.parent, folder) for place in (root, root / "images")]
            found = next((str(place) for place in places if (place / path).is_file()), None)
            if found is not None:
                return found
    return own
