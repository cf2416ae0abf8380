"""Features of every image, extracted once and kept in files, of which parts are read at a time."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

from ..command.paths import Shard
from .backbones import Backbone, Preprocessing


class Pixels(Dataset):
    """What a backbone takes of each image, float32 of shape `(channels, height, width)`."""

    def __init__(self, images: Dataset, preprocessing: Preprocessing):
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocessing(self.images[index])


def collate(pixels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = sorted({tuple(image.shape) for image in pixels})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor gives images of different size, {sizes[0]} and {sizes[1]}: give image_size."
        )
    return default_collate([{"pixel_values": image} for image in pixels])


def extract(
    backbone: Backbone,
    images: Dataset,
    encode: Callable[[torch.Tensor], torch.Tensor],
    image_size: int | None,
    key: str,
    folder: Path,
    batch_size: int = 32,
    num_workers: int = 0,
    description: str = "",
    shard: Shard | None = None,
) -> np.ndarray:
    """The features of all images, in order.

    Args:
        images: of which an item is what [`~modeling_vitp.images.pixels.to_pixels`] gives.
        encode: from a batch of pixels, float32 of shape `(batch, channels, height, width)`, to features, `(batch, …)`.
        image_size: see [`~modeling_vitp.probing.backbones.Preprocessing`].
        key: what the features depend on beside the backbone's weights. They are extracted only if they are not in
            `folder` yet, in one file or in those of all shards.
        folder: of the files.
        shard: extracts and returns only those of its part of the batches.

    Returns:
        float32 of shape `(images, …)`, read from the file as it is used.

    Raises:
        ValueError: if an image cannot be read, has features that are not finite, or lacks them beside those of shards.
    """
    digest = hashlib.sha256(f"{backbone.name}\0{backbone.state}\0{backbone.model.dtype}\0{image_size}\0{key}".encode())
    path, rows = folder / f"{digest.hexdigest()[:20]}.npy", range(len(images))
    if shard and not path.is_file():  # whole batches, by which features differ in their last bits
        batches = shard.part(-(-len(images) // batch_size))
        rows = rows[batches.start * batch_size : batches.stop * batch_size]
        path = path.with_suffix(f".{rows.start}-{rows.stop}.npy")
    if path.is_file():
        return np.load(path, mmap_mode="r")
    if not shard and (parts := find_parts(path)):
        save_rows(joined(parts, len(images)), len(images), path)
        for _, _, part in parts:
            part.unlink()
        return np.load(path, mmap_mode="r")
    pixels = Subset(Pixels(images, Preprocessing(backbone.image_processor, image_size)), rows)
    loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=collate)

    def encoded() -> Iterator[np.ndarray]:
        for number, batch in enumerate(tqdm(loader, desc=description)):
            features = encode(batch["pixel_values"]).cpu().numpy()
            if not np.isfinite(features).all():
                first = rows[number * batch_size]
                raise ValueError(
                    f"{backbone.name} gives features that are not finite, of images {first} and following."
                )
            yield features

    if not rows:  # of a shard, where there are more shards than batches
        return np.empty(0, np.float32)
    save_rows(encoded(), len(rows), path)
    return np.load(path, mmap_mode="r")


def save_rows(blocks: Iterable[np.ndarray], length: int, path: Path) -> None:
    """Writes `length` rows of features, float32, one block in memory at a time; a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    features, done = None, 0
    for block in blocks:
        if features is None:
            shape = (length, *block.shape[1:])
            features = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        features[done : done + len(block)] = block
        done += len(block)
    features.flush()
    os.replace(partial, path)


def find_parts(path: Path) -> list[tuple[int, int, Path]]:
    """What shards have left of the features of a file: the first image, the one after the last, the part."""
    return sorted(
        (*map(int, part.suffixes[0][1:].split("-")), part) for part in path.parent.glob(f"{path.stem}.*-*.npy")
    )


def joined(parts: Sequence[tuple[int, int, Path]], length: int) -> Iterator[np.ndarray]:
    """The parts, one after another. Raises a `ValueError` that names the first image of which there are no features."""
    done = 0
    for first, end, part in [*parts, (length, length, None)]:
        if first != done:
            raise ValueError(
                f"{parts[0][2].parent} has features of shards, but none of image {done} and following, of {length}: "
                "extract the shards that are missing, with the --batch_size of the others, or remove theirs."
            )
        if part is not None:
            yield np.load(part, mmap_mode="r")
        done = end
