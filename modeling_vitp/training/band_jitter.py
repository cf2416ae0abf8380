"""Brightness and contrast of bands that are no colors, for augmentation."""

from typing import Any

import torch
from torchvision.transforms import v2


class BandJitter(v2.Transform):
    """Multiplies by how much each band differs from black, or from its own mean; the factor is drawn for each band.

    Bands are in [0, 1], and stay there.

    Args:
        factors: the lowest and the highest, between which they are drawn uniformly.
        from_mean: whether contrast changes, and not brightness.
    """

    def __init__(self, factors: tuple[float, float], from_mean: bool):
        super().__init__()
        self.factors, self.from_mean = factors, from_mean

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        base = inpt.mean((1, 2), keepdim=True) if self.from_mean else 0.0
        factors = torch.empty(len(inpt), 1, 1).uniform_(*self.factors)
        return (base + factors * (inpt - base)).clamp(0, 1)
