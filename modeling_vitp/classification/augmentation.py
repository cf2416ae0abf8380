"""Augmentation of images whose class does not change with it, by torchvision's transforms."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..training.fine_tuning_data import BandJitter


class RandomQuarterTurn(v2.Transform):
    """With a chance, a turn by 90, 180 or 270 degrees, of the same likelihood."""

    def __init__(self, chance: float):
        super().__init__()
        self.chance = chance

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        turns = torch.randint(1, 4, ()).item()
        return {"angle": 90 * turns if torch.rand(()) < self.chance else 0}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.rotate(inpt, params["angle"], expand=True) if params["angle"] else inpt


class Augmentation:
    """A crop that is resized to a square, flips, quarter turns and colors.

    Of images of other bands than red, green and blue, brightness and contrast change band by band.

    Args:
        image_size: side of the square, in pixels.
        crop_area: smallest and largest share of the image's area that a crop has; its sides are in a ratio of 3:4 to
            4:3, as in torchvision.
        flip: chance of a horizontal flip, and of a vertical one.
        quarter_turns: see [`RandomQuarterTurn`].
        photometric: whether brightness, contrast and saturation change by up to 0.4 of what they are, and the hue by
            0.05 of the circle.
        of_colors: whether images are of red, green and blue, uint8; else they are of any bands, float32 in [0, 1].
    """

    def __init__(
        self,
        image_size: int,
        crop_area: Sequence[float] = (0.5, 1.0),
        flip: tuple[float, float] = (0.5, 0.0),
        quarter_turns: float = 0.0,
        photometric: bool = True,
        of_colors: bool = True,
    ):
        steps = [
            v2.RandomResizedCrop(image_size, tuple(crop_area), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(flip[0]),
            v2.RandomVerticalFlip(flip[1]),
            RandomQuarterTurn(quarter_turns),
        ]
        jitters = [BandJitter((0.6, 1.4), from_mean) for from_mean in (False, True)]
        jitters = [v2.ColorJitter(0.4, 0.4, 0.4, 0.05)] if of_colors else jitters
        self.steps = v2.Compose([*steps, *jitters] if photometric else steps)

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Random by `seed` alone; `(bands, height, width)` to the square."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = self.steps(image)
        return image.clamp(0, 1) if image.is_floating_point() else image  # bicubic resampling overshoots
