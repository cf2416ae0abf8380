"""Features of every image, extracted once and kept in files, of which parts are read at a time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from .backbones import Backbone, Preprocessing


class Pixels(Dataset):
    """What a backbone takes of each image, float32 of shape `(channels, height, width)`."""

    def __init__(self, images: Dataset, preprocessing: Preprocessing):
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocessing(self.images[index])


def collate(pixels: list[torch.Tensor]) -> torch.Tensor:
    sizes = sorted({tuple(image.shape) for image in pixels})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor gives images of different size, {sizes[0]} and {sizes[1]}: give image_size."
        )
    return default_collate(pixels)


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
) -> np.ndarray:
    """The features of all images, in order.

    Args:
        images: of which an item is what [`~modeling_vitp.images.pixels.to_pixels`] gives.
        encode: from a batch of pixels, float32 of shape `(batch, channels, height, width)`, to features, `(batch, …)`.
        image_size: see [`~modeling_vitp.probing.backbones.Preprocessing`].
        key: what the features depend on beside the backbone's weights. They are extracted only if they are not in
            `folder` yet.
        folder: of the files.

    Returns:
        float32 of shape `(images, …)`, read from the file as it is used.

    Raises:
        ValueError: if an image cannot be read, or has features that are not finite.
    """
    digest = hashlib.sha256(f"{backbone.name}\0{backbone.state}\0{backbone.model.dtype}\0{image_size}\0{key}".encode())
    path = folder / f"{digest.hexdigest()[:20]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pixels = Pixels(images, Preprocessing(backbone.image_processor, image_size))
        loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=collate)
        features, done = None, 0
        for batch in tqdm(loader, desc=description):
            encoded = encode(batch).cpu().numpy()
            if not np.isfinite(encoded).all():
                raise ValueError(f"{backbone.name} gives features that are not finite, of images {done} and following.")
            if features is None:
                shape = (len(images), *encoded.shape[1:])
                features = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            features[done : done + len(encoded)] = encoded
            done += len(encoded)
        features.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")
