"""Training augmentation for image classification with torchvision transforms."""

import torch
from torchvision.transforms import InterpolationMode, v2

from ...images.augmentation import BandJitter
from .arguments import ClassificationSettings


class Augmentation:
    """Random resized crop, flips, quarter turns and color jitter.

    Images with bands other than red, green and blue get brightness and contrast jitter, drawn per band.

    Args:
        settings: settings of the changes. The aspect ratio of a crop is between 3:4 and 4:3, the torchvision default.
            Brightness, contrast and saturation change by a factor of up to 0.4, and hue by 0.05.
        of_colors: whether images are RGB, uint8. If false, images have any bands, float32 in [0, 1].
    """

    def __init__(self, settings: ClassificationSettings, of_colors: bool = True):
        size, area = settings.image_size, tuple(settings.crop_area)
        turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (90, 180, 270)]
        steps = [
            v2.RandomResizedCrop(size, area, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(settings.horizontal_flip),
            v2.RandomVerticalFlip(settings.vertical_flip),
            v2.RandomApply([v2.RandomChoice(turns)], settings.quarter_turns),
        ]
        jitters = [BandJitter((0.6, 1.4), from_mean) for from_mean in (False, True)]
        jitters = [v2.ColorJitter(0.4, 0.4, 0.4, 0.05)] if of_colors else jitters
        self.steps = v2.Compose([*steps, *jitters] if settings.photometric else steps)

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the augmented image, `(bands, image_size, image_size)`. The result depends on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = self.steps(image)
        return image.clamp(0, 1) if image.is_floating_point() else image  # Bicubic resampling overshoots.
