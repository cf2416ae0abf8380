"""Rows of a `datasets` data set as labeled images: their columns, cases and encoded images."""

import hashlib
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from datasets import Dataset, Features, Image, List, Video
from datasets.utils.file_utils import xopen

from ..command.settings import check_keys
from ..image_decoding import open_file
from ..image_processing_vitp import ViTPImageProcessor
from ..images.reading import fetch, is_url, picture_size, said
from .files import CASES

# Streamed data sets refer to files on the Hub, or in an archive there, by such paths.
OF_THE_HUB = re.compile(r"((zip|gzip|bz2|xz|zstd|lz4)://((?!::).)*::)*hf://((?!::).)+")


def content_of(image: dict) -> bytes:
    """Return the encoded bytes of an image, from the row, its file or, if fetching is enabled, its URL."""
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return content
    if not isinstance(path, str):
        raise ValueError(f"an image needs bytes or a path, got {str(path)[:80]!r}.")
    if OF_THE_HUB.fullmatch(path):
        with xopen(path, "rb") as file:
            return file.read()
    if is_url(path):
        return fetch(path)
    with open_file(Path(path)) as file:
        return file.read()


def image_size(image: Any) -> tuple[int, int]:
    """Return height and width of an image after EXIF rotation. Of an encoded image, only the header is read."""
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    if isinstance(image, dict):
        is_file = image.get("bytes") is None and os.path.isfile(image.get("path") or "")
        try:
            with open(image["path"], "rb") if is_file else io.BytesIO(content_of(image)) as file:
                return picture_size(file)
        except Exception as error:  # Pillow raises many kinds, see `load_images`.
            origin = f" ({image['path']})" if image.get("path") else ""
            raise ValueError(f"an image{origin} cannot be read: {said(error)}") from error
    if isinstance(image, PIL.Image.Image):
        return image.size[::-1]
    return tuple(ViTPImageProcessor._bands_first(torch.as_tensor(image), None).shape[1:])


def undecoded(features: Features) -> Features:
    """Return the same features with images and videos left encoded."""

    def leave(feature):
        if isinstance(feature, (Image, Video)):
            return type(feature)(decode=False)
        if isinstance(feature, List) and isinstance(feature.feature, (Image, Video)):
            return List(leave(feature.feature))
        return feature

    return Features({name: leave(feature) for name, feature in features.items()})


def encoded_rows(rows: Dataset) -> Dataset:
    """Return rows whose images stay encoded, because `datasets` decodes 16-bit images and TIFF to 8 bits.

    `Dataset.cast` is not used, because it writes a copy of all images.
    """
    rows = rows.select_columns(rows.column_names)
    rows.info.features = undecoded(rows.features)
    return rows


def find_columns(
    known: Collection[str], usual: Mapping[str, Sequence[str]], settings: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Return the column of each role: that of the settings, or the first one with a usual name that exists.

    Args:
        known: names of the columns of the rows.
        usual: usual names of the column of each role.
        settings: column of some roles, or a list of columns.
        name: name of the split in errors.

    Raises:
        ValueError: if a role or a column of the settings does not exist.
    """
    check_keys("columns", settings, usual)
    columns = {}
    for role, names in usual.items():
        chosen = settings.get(role)
        if chosen is None:
            found = [column for column in names if column in known]
            columns |= {role: found[0]} if found else {}
            continue
        for column in [chosen] if isinstance(chosen, str) else chosen:
            if column not in known:
                raise missing_column(known, column, name)
        columns[role] = chosen
    return columns


def missing_column(known: Collection[str], column: str, name: str) -> ValueError:
    """Return the error for a column that does not exist."""
    found = ", ".join(sorted(known))
    return ValueError(f"Split {name!r} has no column {column!r}. Found: {found}. Set `columns` in `data`.")


def check_image_columns(rows: Dataset, columns: Iterable[str], name: str) -> None:
    """Raise a `ValueError` if a column of the split `name` does not store images."""
    for column in columns:
        feature = rows.features.get(column)
        if not isinstance(feature, Image):
            raise ValueError(f"Split {name!r}: expected the column {column!r} to be an `Image` feature, got {feature}.")


def cases_of_rows(rows: Dataset) -> list[str] | None:
    """Return the patient or the case of each row, or `None` without such a column.

    A row whose patient is missing is a case of its own.
    """
    column = next((name for name in CASES if name in rows.column_names), None)
    if column is None:
        return None
    own = f"row {{}} of {rows.split}".format
    return [own(index) if case is None else str(case) for index, case in enumerate(rows[column])]


def folder_cache(name: str | Path) -> str | None:
    """Return a cache folder for this state of a folder or file, or `None` for a Hub id.

    If the folder has a card, `datasets` alone would use an outdated cache after the files have changed, or the cache of
    another folder with the same name and the same file names.
    """
    place = Path(name)
    if not place.exists():
        return None
    state = hashlib.sha256(str(place.resolve()).encode())
    for path in sorted(path for path in (place, *place.rglob("*")) if path.is_file()):
        stat = path.stat()
        state.update(f"{path.relative_to(place)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])
