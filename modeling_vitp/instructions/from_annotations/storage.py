"""Rows of instruction data as Parquet, in a folder that `load_dataset` opens."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from ...command.paths import Shard
from .annotations import UNSPLIT, AnnotatedImage
from .collages import Collage, encode_collages
from .questions import Exchange
from .windows import image_bytes

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
FILE_BYTES = 400 * 2**20


def stored_split(split: str) -> str:
    """The name of a split in the Parquet; the whole of a data set without splits is for training."""
    return "train" if split == UNSPLIT else split


def make_rows(asked: Sequence[tuple[AnnotatedImage, list[Exchange]]]) -> Iterator[dict]:
    """Rows of images and the conversations about them, the images encoded."""
    for (image, conversation), encoded in zip(tqdm(asked, desc="rows"), encode(image for image, _ in asked)):
        messages = [message for exchange in conversation for message in exchange.messages]
        yield {"id": image.id, "images": encoded, "messages": messages}


def encode(images: Iterable[AnnotatedImage]) -> Iterator[list[dict]]:
    """The files of each image as `datasets` stores them; collages that follow one another are made together."""
    for are_collages, group in groupby(images, key=lambda image: isinstance(image, Collage)):
        make = encode_collages if are_collages else partial(map, image_bytes)
        yield from make(group)


def file_stem(split: str, shard: Shard | None) -> str:
    """What the names of files begin with, which sort as their rows do."""
    return split if shard is None else f"{split}-{shard.number:05d}-of-{shard.count:05d}"


def split_of(path: Path) -> str:
    """The split whose rows a file has."""
    return re.sub(r"(-\d+-of-\d+)?-\d+$", "", path.stem)


def save_rows(
    rows: Iterable[dict], folder: Path, split: str, shard: Shard | None = None, file_bytes: int = FILE_BYTES
) -> list[Path]:
    """Writes `SPLIT-00000.parquet`, …, in place of what the folder has of this split, one file in memory at a time.

    The images of a row are `{"bytes", "path"}`. A file ends with the row that takes its images to `file_bytes`. With a
    `shard`, whose `rows` they are, what the others of as many have written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {file_stem(split, other) for other in Shard.all_of(shard.count)} - {file_stem(split, shard)} if shard else ()
    for path in folder.glob(f"{split}-[0-9]*.parquet"):
        if path.stem.rpartition("-")[0] not in kept:
            path.unlink(missing_ok=True)
    files, pending, size = [], [], 0

    def flush():
        files.append(folder / f"{file_stem(split, shard)}-{len(files):05d}.parquet")
        Dataset.from_list(pending, features=FEATURES).to_parquet(files[-1])

    for row in rows:
        pending.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if size >= file_bytes:
            flush()
            pending, size = [], 0
    if pending:
        flush()
    return files


def check_shards(folder: Path, split: str, count: int, num_rows: int) -> None:
    """Raises a `ValueError` that names the shard of which the folder has not all rows, or more."""
    for shard in Shard.all_of(count):
        files = folder.glob(f"{file_stem(split, shard)}-*.parquet")
        found, wanted = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files), len(shard.part(num_rows))
        if found != wanted:
            raise ValueError(f"{folder} has {found} of the {wanted} rows of shard {shard}: give --shard {shard} again.")
