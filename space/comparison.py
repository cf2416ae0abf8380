"""Cosine similarity of a backbone's patch features on a corrupted image to those on the clean one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from modeling_vitp.images.corruptions import SEVERITIES, corrupt, motion, parameters, undo_motion


class Comparison(NamedTuple):
    """One point of a line."""

    backbone: str
    corruption: str
    severity: int
    parameters: dict[str, float]
    similarity: float
    """The mean of the cosine similarity over the places compared, in [-1, 1]; NaN if there is none."""
    compared: float
    """The share of places that are compared, in [0, 1]: all but for geometric corruptions."""
    floor: float
    """The mean similarity of the image to other images, place by place: what is left when nothing stays."""

    @property
    def share(self) -> float:
        """Of the room between the floor and 1, what stays: 1 where nothing changed, 0 where the image could be another.

        A backbone to which all images are alike has a high similarity under every corruption, and no share of it.
        """
        return (self.similarity - self.floor) / (1 - self.floor) if self.floor < 1 else float("nan")


def similarity_map(clean: torch.Tensor, corrupted: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Cosine similarity at each place of the clean image.

    Args:
        clean, corrupted: patch features of shape `(channels, rows, columns)`, the map spanning the whole image.
        matrix: the motion of a geometric corruption ([`~modeling_vitp.images.corruptions.motion`]), which is undone
            before. That interpolates between patches, which by itself makes the similarity a little less than 1.

    Returns:
        float32 of shape `(rows, columns)` in [-1, 1], NaN where motion took the place out of the image.
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
    """Compares severity by severity, corruption by corruption, and within these backbone by backbone.

    A generator, so that the caller can show progress and results as they come, and can stop.

    Args:
        image: uint8 RGB of shape `(height, width, 3)`, at the size at which corruptions are meant to be seen.
        backbones: by name, functions from such an image to its patch features, of shape `(channels, rows, columns)`.
            They may resize the image, but not crop or pad it.
        seed: of what the corruptions draw; all backbones see the same images.
        others: images of the same shape, for the floor; without them it is 0.

    Raises:
        ValueError: if there is no such corruption or severity, before anything is computed.
    """
    cases = [(name, severity, parameters(name, severity)) for severity in severities for name in corruptions]
    return _compare(image, backbones, cases, seed, others)


def floor_of(clean: torch.Tensor, others: Sequence[torch.Tensor]) -> float:
    """The mean cosine similarity of patch features to those of other images at the same places; 0 without others."""
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
