"""Images with masks, under the corruptions of the paper's robustness table."""

from typing import Any

import torch
from torch.utils.data import Dataset

from ..images.corruptions import corrupt, motion, move_labels
from ..vrl import keyed_generator
from .classes import IGNORE_INDEX


class CorruptedImages(Dataset):
    """Samples with a corruption, which is drawn by the seed, the sample's id and the corruption alone.

    Both images of a pair are corrupted: moved alike, while noise, clouds and gaps are drawn for each. The mask moves
    with the images; pixels that come in from outside have no class.

    Args:
        samples: see [`~modeling_vitp.dense.samples.MaskedImages`].
        corruption, severity: see [`~modeling_vitp.images.corruptions.corrupt`].
    """

    def __init__(self, samples: Dataset, corruption: str, severity: int, seed: int):
        self.samples, self.corruption, self.severity, self.seed = samples, corruption, severity, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        images, how = sample["images"], (self.corruption, self.severity)
        seeds = [
            keyed_generator(self.seed, sample["id"], self.corruption, place).initial_seed()
            for place in range(len(images))
        ]
        matrix = motion(*how, *images[0].shape[1:], seed=seeds[0])
        if matrix is not None:
            seeds = seeds[:1] * len(images)
            sample = {**sample, "mask": move_labels(sample["mask"], matrix, IGNORE_INDEX)}
        return {**sample, "images": [corrupt(image, *how, seed) for image, seed in zip(images, seeds)]}

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask of a sample, moved with its images."""
        return self[index].get("mask")
