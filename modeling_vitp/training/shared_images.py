"""Whether two splits hold the same image under different names: by the content of files, as far as it is needed."""

import gzip
import hashlib
import io
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..images.reading import packed_key, read_picture
from ..images.volumes import files_of
from ..instructions.rows import content_of
from .files import FileSample

PIECE = 1 << 16  # bytes at the beginning, in the middle and at the end, by which large files are told apart first


@dataclass(frozen=True)
class StoredImage:
    """An encoded image of a split: how it is called in errors, its size in bytes (or another number that the same
    images share), and what opens it."""

    split: str
    name: str
    size: int
    open: Callable[[], BinaryIO]


def images_of_files(splits: Mapping[str, Iterable[FileSample]]) -> Iterator[StoredImage]:
    """The files, those of a series one by one; NIfTI in gzip is compared as it is unpacked."""
    for split, samples in splits.items():
        for path in dict.fromkeys(path for sample in samples for path in sample.images):
            for file in files_of(path):
                unpack = gzip.open if file.name.lower().endswith(".nii.gz") else open
                yield StoredImage(
                    split, str(file), packed_key(file), lambda file=file, unpack=unpack: unpack(file, "rb")
                )


def images_of_rows(splits: Mapping[str, tuple[Dataset, Sequence[str]]]) -> Iterator[StoredImage]:
    """Of a table only the lengths of the images are read.

    Args:
        splits: rows with images that are not decoded, and their columns of images.
    """
    for split, (rows, columns) in splits.items():
        for column in columns:
            place = 0
            for part in rows.select_columns([column]).with_format("arrow").iter(1000):
                for size, path in sizes_and_paths(part.column(column)):

                    def open_row(rows=rows, column=column, place=place):
                        return io.BytesIO(content_of(rows[place][column]))

                    if size is not None or (path is not None and Path(path).is_file()):
                        size = Path(path).stat().st_size if size is None else size
                        yield StoredImage(split, f"row {place} ({column})", size, open_row)
                    place += 1


def sizes_and_paths(column: pa.ChunkedArray) -> Iterator[tuple[int | None, str | None]]:
    """Of encoded images in a column of a table; nothing if images are stored otherwise."""
    for chunk in column.chunks:
        chunk = chunk.storage if isinstance(chunk.type, pa.BaseExtensionType) else chunk
        if not isinstance(chunk.type, pa.StructType) or {field.name for field in chunk.type} != {"bytes", "path"}:
            return
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes"))
        yield from zip(sizes.to_pylist(), pc.struct_field(chunk, "path").to_pylist())


def check_no_shared_images(images: Iterable[StoredImage]) -> None:
    """Raises a `ValueError` that names both if an image of one split is, byte for byte, one of another.

    Images of one color are left out, as tiles without data are alike in any split. Sizes are compared first; of files
    of one size three pieces are read, and only what agrees in these is read whole.
    """
    groups = [list(images)]
    for key in (lambda image: image.size, digest_of_pieces, digest_of_all):
        groups = [part for group in groups for part in divide(group, key) if len({image.split for image in part}) > 1]
    for first, *others in groups:
        other = next(image for image in others if image.split != first.split)
        if not is_of_one_color(first):
            raise ValueError(
                f"{other.name} in split {other.split!r} is the same image as {first.name} in {first.split!r}: take it "
                "out of one of the two, or, where these are the published splits, set allow_shared_images in `data`."
            )


def divide(images: Iterable[StoredImage], key: Callable[[StoredImage], Hashable]) -> list[list[StoredImage]]:
    parts: dict[Hashable, list[StoredImage]] = {}
    for image in images:
        parts.setdefault(key(image), []).append(image)
    return list(parts.values())


def digest_of_pieces(image: StoredImage) -> bytes:
    seen = hashlib.blake2b()
    with image.open() as file:
        size = file.seek(0, io.SEEK_END)
        for start in sorted({0, max(size // 2 - PIECE // 2, 0), max(size - PIECE, 0)}):
            file.seek(start)
            seen.update(file.read(PIECE))
    return seen.digest()


def digest_of_all(image: StoredImage) -> bytes:
    seen = hashlib.blake2b()
    with image.open() as file:
        while chunk := file.read(1 << 20):
            seen.update(chunk)
    return seen.digest()


def is_of_one_color(image: StoredImage) -> bool:
    with image.open() as file:
        content = file.read()
    try:
        pixels = np.asarray(read_picture(content))
    except Exception:  # of many kinds: a volume, or a broken file, which is named where it is read
        return False
    pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
    return bool((pixels == pixels[0]).all())
