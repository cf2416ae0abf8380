"""Training augmentation for image classification with torchvision transforms."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..training.fine_tuning_data import BandJitter


class RandomQuarterTurn(v2.Transform):
    """Random rotation by 90, 180 or 270 degrees, each equally likely.

    Args:
        probability: probability that an image is rotated.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        turns = torch.randint(1, 4, ()).item()
        return {"angle": 90 * turns if torch.rand(()) < self.probability else 0}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.rotate(inpt, params["angle"], expand=True) if params["angle"] else inpt


class Augmentation:
    """Random resized crop, flips, quarter turns and color jitter.

    Images with bands other than red, green and blue get brightness and contrast jitter, drawn per band.

    Args:
        image_size: side of the square output, in pixels.
        crop_area: smallest and largest crop area as a fraction of the image area. The aspect ratio of the crop is
            between 3:4 and 4:3, the torchvision default.
        flip: probabilities of a horizontal and a vertical flip.
        quarter_turns: probability of a rotation, see [`RandomQuarterTurn`].
        photometric: whether to jitter brightness, contrast and saturation by a factor of up to 0.4, and hue by 0.05.
        of_colors: whether images are RGB, uint8. If false, images have any bands, float32 in [0, 1].
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
        """Return the augmented image, `(bands, image_size, image_size)`. The result depends on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = self.steps(image)
        return image.clamp(0, 1) if image.is_floating_point() else image  # Bicubic resampling overshoots.
