"""Random changes of images with any number of bands."""

from typing import Any

import torch
from torchvision.transforms import v2


class BandJitter(v2.Transform):
    """Random change of brightness or contrast with an independent factor for each band.

    Values of bands are in [0, 1] before and after.

    Args:
        factors: lowest and highest factor of the uniform distribution.
        from_mean: whether to change contrast around the mean of a band instead of brightness.
    """

    def __init__(self, factors: tuple[float, float], from_mean: bool):
        super().__init__()
        self.factors = factors
        self.from_mean = from_mean

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        base = 0.0
        if self.from_mean:
            base = inpt.mean((1, 2), keepdim=True)
        num_bands = len(inpt)
        lowest, highest = self.factors
        factors = torch.empty(num_bands, 1, 1).uniform_(lowest, highest)
        changed = base + factors * (inpt - base)
        return changed.clamp(0, 1)
