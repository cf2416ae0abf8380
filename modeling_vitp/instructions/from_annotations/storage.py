"""Rows of instruction data as Parquet, in a folder that `load_dataset` opens."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

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
SHARD_BYTES = 400 * 2**20


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


def save_rows(rows: Iterable[dict], folder: Path, split: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes `SPLIT-00000.parquet`, …, in place of what the folder has of this split, one shard in memory at a time.

    The images of a row are `{"bytes", "path"}`. A shard ends with the row that takes its images to `shard_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{split}-[0-9]*.parquet"):
        path.unlink()
    shards, pending, size = [], [], 0

    def flush():
        shards.append(folder / f"{split}-{len(shards):05d}.parquet")
        Dataset.from_list(pending, features=FEATURES).to_parquet(shards[-1])

    for row in rows:
        pending.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if size >= shard_bytes:
            flush()
            pending, size = [], 0
    if pending:
        flush()
    return shards
