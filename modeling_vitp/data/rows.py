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
from ..images.reading import fetch, is_url, picture_size, read_errors
from .files import CASES

# Streamed data sets refer to files on the Hub, or in an archive there, by such paths.
OF_THE_HUB = re.compile(r"((zip|gzip|bz2|xz|zstd|lz4)://((?!::).)*::)*hf://((?!::).)+")


def content_of(image: dict) -> bytes:
    """Return the encoded bytes of an image, from the row, its file or, if fetching is enabled, its URL."""
    content = image.get("bytes")
    if content is not None:
        return content
    path = image.get("path")
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
    if isinstance(image, PIL.Image.Image):
        width, height = image.size
        return height, width
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    if not isinstance(image, dict):
        bands = ViTPImageProcessor._bands_first(torch.as_tensor(image), None)
        return tuple(bands.shape[1:])
    path = image.get("path")
    origin = f" ({path})" if path else ""
    with read_errors(f"an image{origin}"):
        if image.get("bytes") is None and os.path.isfile(path or ""):
            with open(path, "rb") as file:
                return picture_size(file)
        return picture_size(io.BytesIO(content_of(image)))


def undecoded(features: Features) -> Features:
    """Return the same features with images and videos left encoded."""

    def encoded_feature(feature):
        if isinstance(feature, (Image, Video)):
            return type(feature)(decode=False)
        if isinstance(feature, List) and isinstance(feature.feature, (Image, Video)):
            return List(encoded_feature(feature.feature))
        return feature

    return Features({name: encoded_feature(feature) for name, feature in features.items()})


def encoded_rows(rows: Dataset) -> Dataset:
    """Return rows whose images stay encoded, because `datasets` decodes 16-bit images and TIFF to 8 bits.

    `Dataset.cast` is not used, because it writes a copy of all images.
    """
    rows = rows.select_columns(rows.column_names)
    rows.info.features = undecoded(rows.features)
    return rows


def find_columns(
    known: Collection[str],
    usual: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    name: str,
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
    for role, usual_names in usual.items():
        columns_of_role = settings.get(role)
        if columns_of_role is None:
            for column in usual_names:
                if column in known:
                    columns[role] = column
                    break
            continue
        for column in [columns_of_role] if isinstance(columns_of_role, str) else columns_of_role:
            if column not in known:
                raise missing_column(known, column, name)
        columns[role] = columns_of_role
    return columns


def missing_column(known: Collection[str], column: str, name: str) -> ValueError:
    """Return the error for a column that does not exist."""
    known_columns = ", ".join(sorted(known))
    return ValueError(f"Split {name!r} has no column {column!r}. Found: {known_columns}. Set `columns` in `data`.")


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
    case_columns = [name for name in CASES if name in rows.column_names]
    if not case_columns:
        return None
    cases = []
    for index, case in enumerate(rows[case_columns[0]]):
        cases.append(f"row {index} of {rows.split}" if case is None else str(case))
    return cases


def folder_cache(name: str | Path) -> str | None:
    """Return a cache folder for this state of a folder or file, or `None` for a Hub id.

    If the folder has a card, `datasets` alone would use an outdated cache after the files have changed, or the cache of
    another folder with the same name and the same file names.
    """
    place = Path(name)
    if not place.exists():
        return None
    state = hashlib.sha256(str(place.resolve()).encode())
    for path in sorted((place, *place.rglob("*"))):
        if not path.is_file():
            continue
        stat = path.stat()
        file_state = f"{path.relative_to(place)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        state.update(file_state.encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])
