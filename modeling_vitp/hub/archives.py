"""What is inside of compressed files and Parquet, piece by piece; what cannot be looked into says so."""

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

CHUNK, OVERLAP = 1 << 22, 1 << 10
DEEPEST = 4  # archives in one another
MOST_TIMES, AT_LEAST = 200, 1 << 28  # bytes that a file may unpack to, of its size, or these
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CLOSED = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # 7z, RAR, Zstandard, LZ4
ZIP, PARQUET, TAR_PLACE = b"PK\x03\x04", b"PAR1", 257
ROWS = 100  # of Parquet, read at a time


class Unsearchable(Exception):
    """A compressed file that cannot be looked into."""


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """The content in pieces that overlap, so that nothing is hidden by a border."""
    tail = b""
    while piece := file.read(CHUNK):
        yield tail + piece
        tail = piece[-OVERLAP:]


def unpacked(file: BinaryIO, size: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of what is inside of a file, in pieces; nothing if it is not compressed.

    Args:
        file: open, at its beginning.
        size: its bytes, of which the content may be `MOST_TIMES` as many.

    Raises:
        Unsearchable: says why.
    """
    left = max(MOST_TIMES * size, AT_LEAST)
    try:
        for name, piece in inside(file, "", 0):
            left -= len(piece)
            if left < 0:
                raise Unsearchable("it unpacks to far more than its size")
            yield name, piece
    except Unsearchable:
        raise
    except Exception as error:  # of many kinds: broken, encrypted, of a method that is not known
        raise Unsearchable(" ".join(str(error).split()) or type(error).__name__) from error


def inside(file: BinaryIO, name: str, depth: int) -> Iterator[tuple[str, bytes]]:
    head = file.read(TAR_PLACE + 5)
    file.seek(0)
    if head.startswith(CLOSED):
        raise Unsearchable("it is of a kind that is not opened here")
    opener = next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), None)
    is_archive = opener is not None or head.startswith(ZIP) or head[TAR_PLACE:] == b"ustar"
    if is_archive and depth == DEEPEST:
        raise Unsearchable(f"there are more than {DEEPEST} archives in one another")
    if opener is not None:
        with opener(file) as content:
            yield from inside(content, name, depth + 1)
    elif head.startswith(ZIP):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                yield member.filename, member.comment
                if not member.is_dir():
                    with archive.open(member) as content:
                        yield from inside(content, member.filename, depth + 1)
    elif head[TAR_PLACE:] == b"ustar":
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                yield member.name, b""
                if member.isfile():
                    yield from inside(archive.extractfile(member), member.name, depth + 1)
    elif head.startswith(PARQUET):
        yield from ((name, values) for values in parquet_values(file))
    elif depth:
        for piece in pieces(file):
            yield name, piece


def parquet_values(file: BinaryIO) -> Iterator[bytes]:
    """The texts and bytes of a Parquet file, those of one column in some rows at a time, each once."""
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(file).iter_batches(ROWS):
        for column in batch.columns:
            for values in texts_in(column):
                yield b"\n".join(value for value in values if value is not None)


def texts_in(array) -> Iterator[list[bytes | None]]:
    """The different values of each array of texts or bytes that an Arrow array is made of."""
    from pyarrow import BaseExtensionType, large_binary, types

    kind = array.type
    if isinstance(kind, BaseExtensionType):
        yield from texts_in(array.storage)
    elif types.is_dictionary(kind):
        yield from texts_in(array.dictionary)
    elif types.is_struct(kind):
        for place in range(kind.num_fields):
            yield from texts_in(array.field(place))
    elif types.is_map(kind):
        yield from texts_in(array.keys)
        yield from texts_in(array.items)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from texts_in(array.values)
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        yield array.unique().cast(large_binary()).to_pylist()
