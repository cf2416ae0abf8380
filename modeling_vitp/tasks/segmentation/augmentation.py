"""Joint augmentation of images and masks, with torchvision's transforms."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ...image_processing_vitp_dense import IGNORE_INDEX
from ...images.augmentation import BandJitter
from .arguments import DenseSettings


class RandomScaledCrop(v2.Transform):
    """Square crop at a random scale and position, with a limit on the share of the most frequent class.

    The image is cropped first and resized afterwards, so large images cost no more than small ones. If the crop is
    larger than the image, it is padded at the right and at the bottom: images with `fill`, masks with the ignore index.

    Args:
        size: side of the output, in pixels.
        scale: smallest and largest scale factor of the image, drawn uniformly.
        max_class_share: largest allowed fraction of labeled pixels with the same class. Other crops are drawn again, up
            to ten times.
        fill: padding value for each band, in the value range of the images.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        fill: Sequence[float] = (0, 0, 0),
    ):
        super().__init__()
        self.size, self.scale, self.max_class_share, self.fill = size, tuple(scale), max_class_share, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (mask,) = (item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        height, width = mask.shape[-2:]
        factor = torch.empty(()).uniform_(*self.scale).item()
        side = max(round(self.size / factor), 1)
        box = {"height": min(side, height), "width": min(side, width)}
        for _ in range(10):
            box["top"] = torch.randint(height - box["height"] + 1, ()).item()
            box["left"] = torch.randint(width - box["width"] + 1, ()).item()
            if class_share(F.crop(mask, **box)) <= self.max_class_share:
                break
        scaled = [round(self.size * box[name] / side) for name in ("height", "width")]
        return {"box": box, "scaled": [max(length, 1) for length in scaled]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        cropped = F.crop(inpt, **params["box"])
        height, width = params["scaled"]
        beyond = [0, 0, self.size - width, self.size - height]
        if not isinstance(inpt, tv_tensors.Mask):
            return F.pad(F.resize(cropped, params["scaled"], antialias=True), beyond, fill=self.fill)
        # torchvision's resize of masks is not used, because it shifts masks by up to a pixel relative to images.
        mask = F.resize_image(cropped.as_subclass(torch.Tensor)[None], [height, width], InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(F.pad(mask, beyond, fill=IGNORE_INDEX)[0])


def class_share(mask: torch.Tensor) -> float:
    """Return the fraction of labeled pixels that have the most frequent class, 1 if no pixel is labeled."""
    counts = mask.flatten().to(torch.int64).bincount(minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return (counts.max() / counts.sum().clamp(min=1)).item() if counts.sum() else 1.0


def random_rotation_or_reflection(rotation: float, angle: float, reflection: float) -> v2.Transform:
    """Return a random rotation about the center or, of images that are not rotated, a random reflection.

    Rotated images keep their size. Outside the original image they are black, and masks have the ignore index.

    Args:
        rotation: probability of a rotation.
        angle: largest angle in degrees; angles are drawn uniformly in both directions.
        reflection: probability that an image that is not rotated is mirrored. The axis is horizontal, vertical or one
            of the diagonals, all equally likely.
    """
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
    turns = [v2.RandomRotation((turn, turn), expand=True) for turn in (0, 90, 180, 270)]
    choices = {
        v2.RandomRotation(angle, InterpolationMode.BILINEAR, fill=fill): rotation,
        v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomChoice(turns)]): (1 - rotation) * reflection,
        v2.Identity(): (1 - rotation) * (1 - reflection),
    }
    return v2.RandomChoice(list(choices), list(choices.values()))


def distort_colors(image: torch.Tensor, strengths: Sequence[float]) -> torch.Tensor:
    """Return an RGB image with random brightness, contrast, saturation and hue, each changed with a probability of 0.5.

    This is the photometric distortion of SSD (arXiv 1512.02325) as in mmsegmentation: a value is added for brightness,
    contrast is a factor, and saturation and hue are those of HSV. Contrast is changed before or after saturation and
    hue, with equal probability.

    Args:
        image: uint8 of shape `(3, height, width)`.
        strengths: largest change of brightness as a share of white, of the factors of contrast and of saturation, and
            of the hue as a share of the color circle.
    """
    drawn, chances = torch.empty(4).uniform_(-1, 1), torch.rand(5)
    changes = drawn * torch.tensor(strengths) * (chances[:4] < 0.5)
    brightness, contrast, saturation, hue = changes.tolist()
    pixels = (F.to_dtype(image, torch.float32, scale=True) + brightness).clamp(0, 1)
    contrast_is_first = chances[4] < 0.5
    if contrast_is_first:
        pixels = (pixels * (1 + contrast)).clamp(0, 1)
    if saturation:
        value = pixels.amax(0)
        below = value - pixels
        # The largest factor makes the smallest channel 0, a saturation of 1.
        pixels = value - below * (value / below.amax(0)).nan_to_num(1.0).clamp(max=1 + saturation)
    if hue:
        pixels = F.adjust_hue(pixels, hue)
    if not contrast_is_first:
        pixels = (pixels * (1 + contrast)).clamp(0, 1)
    return F.to_dtype(pixels, image.dtype, scale=True)


def distort_bands(image: torch.Tensor, strengths: Sequence[float]) -> torch.Tensor:
    """Return an image with bands in [0, 1] with random brightness and contrast, drawn per band.

    It replaces [`distort_colors`] for other bands than red, green and blue. Brightness and contrast are factors here.
    The strengths of saturation and hue are not used.
    """
    jitters = [BandJitter((1 - strength, 1 + strength), of_mean) for strength, of_mean in zip(strengths, (False, True))]
    return v2.Compose([v2.RandomApply([jitter], p=0.5) for jitter in jitters])(image)


class Augmentation:
    """Random rotation, scale, crop, flips and color distortion; for image pairs also a swap of the two images.

    All images of a sample and its mask get the same geometric transform. Colors are distorted for each image
    separately, because the lighting differs between two dates.

    Args:
        settings: settings of the changes, see also [`RandomScaledCrop`], [`random_rotation_or_reflection`],
            [`distort_colors`] and [`distort_bands`].
        fill: padding color, see [`RandomScaledCrop`].
        of_colors: whether images are RGB, uint8. If false, images have any bands, float32 in [0, 1].
    """

    def __init__(self, settings: DenseSettings, fill: Sequence[float] = (0, 0, 0), of_colors: bool = True):
        self.geometry = v2.Compose(
            [
                random_rotation_or_reflection(settings.rotation, settings.rotation_angle, settings.reflection),
                RandomScaledCrop(settings.crop_size, settings.scale_range, settings.max_class_share, fill),
                v2.RandomHorizontalFlip(settings.horizontal_flip),
                v2.RandomVerticalFlip(settings.vertical_flip),
            ]
        )
        distortion = distort_colors if of_colors else distort_bands
        strengths = settings.color_jitter
        self.colors = partial(distortion, strengths=strengths) if settings.photometric else v2.Identity()
        self.exchange_time = settings.exchange_time

    def __call__(
        self, images: list[tv_tensors.Image], mask: tv_tensors.Mask, seed: int
    ) -> tuple[list[tv_tensors.Image], tv_tensors.Mask]:
        """Return the augmented images and mask. The result depends on `seed` alone.

        Args:
            images: one image, or the two of a pair, of shape `(bands, height, width)`.
            mask: class indices, uint8 of shape `(height, width)`.
            seed: seed of the random generator.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            images, mask = self.geometry(images, mask)
            images = [self.colors(image) for image in images]
            if len(images) > 1 and torch.rand(()) < self.exchange_time:
                images = images[::-1]
        return images, mask
