"""Cosine similarity of a backbone's patch features between clean and corrupted images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from modeling_vitp.images.corruptions import SEVERITIES, corrupt, motion, parameters, undo_motion


class Comparison(NamedTuple):
    """Feature similarity of one backbone under one corruption and severity."""

    backbone: str
    corruption: str
    severity: int
    parameters: dict[str, float]
    similarity: float
    """Mean cosine similarity over the compared patches, in [-1, 1]; NaN without a compared patch."""
    compared: float
    """Share of compared patches, in [0, 1]; less than 1 only for geometric corruptions."""
    floor: float
    """Mean similarity of the image to other images at the same patch positions."""

    @property
    def share(self) -> float:
        """Similarity rescaled from [floor, 1] to [0, 1]: 1 for an unchanged image, 0 for a different image.

        A backbone that maps all images to similar features has a high similarity under corruption, but a low share.
        """
        return (self.similarity - self.floor) / (1 - self.floor) if self.floor < 1 else float("nan")


def similarity_map(clean: torch.Tensor, corrupted: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine similarity at each patch of the clean image.

    Args:
        clean, corrupted: patch features of shape `(channels, rows, columns)` that span the whole image.
        matrix: motion of a geometric corruption ([`~modeling_vitp.images.corruptions.motion`]), which is undone first.
            The interpolation between patches makes the similarity slightly less than 1.

    Returns:
        float32 of shape `(rows, columns)` in [-1, 1], NaN where the motion moved the patch out of the image.
    """
    clean, corrupted = clean.float(), corrupted.float()
    if matrix is None:
        return F.cosine_similarity(clean, corrupted, dim=0)
    undone, valid = undo_motion(corrupted, matrix)
    return F.cosine_similarity(clean, undone, dim=0).masked_fill(~valid, torch.nan)


def compare(
    image: np.ndarray,
    backbones: Mapping[str, Callable[[np.ndarray], torch.Tensor]],
    corruptions: Sequence[str] = tuple(SEVERITIES),
    severities: Sequence[int] = (3,),
    seed: int = 0,
    others: Sequence[np.ndarray] = (),
) -> Iterator[Comparison]:
    """Return a generator of comparisons, ordered by severity, corruption and backbone.

    Args:
        image: uint8 RGB of shape `(height, width, 3)`, at the size at which corruptions are applied.
        backbones: functions, by name, from such an image to patch features of shape `(channels, rows, columns)`. They
            may resize the image, but not crop or pad it.
        seed: seed of the corruptions. All backbones see the same images.
        others: images of the same shape for the floor; the floor is 0 without them.

    Raises:
        ValueError: if a corruption or severity is unknown, before anything is computed.
    """
    cases = [(name, severity, parameters(name, severity)) for severity in severities for name in corruptions]
    return _compare(image, backbones, cases, seed, others)


def floor_of(clean: torch.Tensor, others: Sequence[torch.Tensor]) -> float:
    """Return the mean cosine similarity of patch features to those of other images; 0 without other images."""
    return float(np.mean([similarity_map(clean, other).mean().item() for other in others])) if others else 0.0


def _compare(image, backbones, cases, seed, others) -> Iterator[Comparison]:
    clean = {backbone: encode(image) for backbone, encode in backbones.items()}
    floors = {
        backbone: floor_of(clean[backbone], [encode(other) for other in others])
        for backbone, encode in backbones.items()
    }
    for name, severity, settings in cases:
        corrupted = corrupt(image, name, severity, seed)
        matrix = motion(name, severity, *image.shape[:2], seed=seed)
        for backbone, encode in backbones.items():
            similarity = similarity_map(clean[backbone], encode(corrupted), matrix)
            compared = similarity.isfinite().float().mean().item()
            mean = similarity.nanmean().item()
            yield Comparison(backbone, name, severity, settings, mean, compared, floors[backbone])
