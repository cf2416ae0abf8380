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
        turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (90, 180, 270)]
        steps = [
            v2.RandomResizedCrop(
                settings.image_size,
                scale=tuple(settings.crop_area),
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(settings.horizontal_flip),
            v2.RandomVerticalFlip(settings.vertical_flip),
            v2.RandomApply([v2.RandomChoice(turns)], settings.quarter_turns),
        ]
        if settings.photometric and of_colors:
            steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05))
        elif settings.photometric:
            for from_mean in (False, True):  # brightness, contrast
                steps.append(BandJitter((0.6, 1.4), from_mean))
        self.steps = v2.Compose(steps)

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the augmented image, `(bands, image_size, image_size)`. The result depends on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = self.steps(image)
        return image.clamp(0, 1) if image.is_floating_point() else image  # Bicubic resampling overshoots.
