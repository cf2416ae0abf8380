"""Principal components of patch features as colors, the same rule for every backbone."""

import numpy as np
import torch
from torch.nn import functional as F


def principal_scores(features: torch.Tensor) -> torch.Tensor:
    """Scores of the patches on the three first principal components, each of mean 0 and variance 1.

    The sign of a component is such that its loading of largest magnitude is positive. Components without variance
    (fewer patches than components, an image without structure) have the score 0.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        float64 of shape `(3, rows, columns)`.
    """
    flat = features.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    values, vectors = values.flip(0)[:3], vectors.flip(1)[:, :3]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    scales = torch.where(values > 1e-9 * flat.square().sum(0).max(), values.clamp(min=1e-300).rsqrt(), 0.0)
    scores = scales[:, None] * (vectors.T @ flat)
    return F.pad(scores, (0, 0, 0, 3 - len(scores))).unflatten(1, features.shape[1:])


def align_scores(scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The scores of another backbone, turned so that its colours are as near to the reference's as they can be.

    Principal components of two backbones come in any order, sign and mixture. The rotation (with reflection) is that
    of orthogonal Procrustes; it changes no distance between patches.

    Args:
        scores, reference: of shape `(3, rows, columns)`.
    """
    left, _, right = torch.linalg.svd(reference.flatten(1) @ scores.flatten(1).T)
    return ((left @ right) @ scores.flatten(1)).view_as(scores)


def colors_of(scores: torch.Tensor) -> np.ndarray:
    """Scores as RGB: two standard deviations below the mean are 0, two above 255, by the same rule for every backbone.

    Args:
        scores: of shape `(3, rows, columns)`.

    Returns:
        uint8 of shape `(rows, columns, 3)`.
    """
    return (255 * (scores / 4 + 0.5).clamp(0, 1)).round().to(torch.uint8).movedim(0, -1).numpy()
