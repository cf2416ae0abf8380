"""Training augmentation for image classification with torchvision transforms."""

from collections.abc import Sequence

import torch
from torchvision.transforms import InterpolationMode, v2

from ..training.fine_tuning_data import BandJitter


class Augmentation:
    """Random resized crop, flips, quarter turns and color jitter.

    Images with bands other than red, green and blue get brightness and contrast jitter, drawn per band.

    Args:
        image_size: side of the square output, in pixels.
        crop_area: smallest and largest crop area as a fraction of the image area. The aspect ratio of the crop is
            between 3:4 and 4:3, the torchvision default.
        flip: probabilities of a horizontal and a vertical flip.
        quarter_turns: probability of a rotation by 90, 180 or 270 degrees, each equally likely.
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
        turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (90, 180, 270)]
        steps = [
            v2.RandomResizedCrop(image_size, tuple(crop_area), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(flip[0]),
            v2.RandomVerticalFlip(flip[1]),
            v2.RandomApply([v2.RandomChoice(turns)], quarter_turns),
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
