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
        self.size = size
        self.scale = tuple(scale)
        self.max_class_share = max_class_share
        self.fill = list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (mask,) = [item for item in flat_inputs if isinstance(item, tv_tensors.Mask)]
        height, width = mask.shape[-2:]
        smallest_scale, largest_scale = self.scale
        factor = torch.empty(()).uniform_(smallest_scale, largest_scale).item()
        side = max(round(self.size / factor), 1)
        crop_height = min(side, height)
        crop_width = min(side, width)
        for _ in range(10):
            top = torch.randint(height - crop_height + 1, ()).item()
            left = torch.randint(width - crop_width + 1, ()).item()
            crop = F.crop(mask, top, left, crop_height, crop_width)
            if class_share(crop) <= self.max_class_share:
                break
        return {
            "box": {"top": top, "left": left, "height": crop_height, "width": crop_width},
            "scaled_height": max(round(self.size * crop_height / side), 1),
            "scaled_width": max(round(self.size * crop_width / side), 1),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        cropped = F.crop(inpt, **params["box"])
        height = params["scaled_height"]
        width = params["scaled_width"]
        scaled_size = [height, width]
        padding = [0, 0, self.size - width, self.size - height]
        if not isinstance(inpt, tv_tensors.Mask):
            image = F.resize(cropped, scaled_size, antialias=True)
            return F.pad(image, padding, fill=self.fill)
        # torchvision's resize of masks is not used, because it shifts masks by up to a pixel relative to images.
        pixels = cropped.as_subclass(torch.Tensor)[None]
        pixels = F.resize_image(pixels, scaled_size, InterpolationMode.NEAREST_EXACT)
        pixels = F.pad(pixels, padding, fill=IGNORE_INDEX)
        return tv_tensors.Mask(pixels[0])


def class_share(mask: torch.Tensor) -> float:
    """Return the fraction of labeled pixels that have the most frequent class, 1 if no pixel is labeled."""
    labels = mask.flatten().to(torch.int64)
    counts = labels.bincount(minlength=IGNORE_INDEX + 1)
    counts = counts[:IGNORE_INDEX]
    total = counts.sum()
    if not total:
        return 1.0
    return (counts.max() / total).item()


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
    quarter_turns = [v2.RandomRotation((degrees, degrees), expand=True) for degrees in (0, 90, 180, 270)]
    # A mirrored image that is turned is mirrored about one of the four axes.
    random_reflection = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomChoice(quarter_turns)])
    return v2.RandomChoice(
        [
            v2.RandomRotation(angle, InterpolationMode.BILINEAR, fill=fill),
            random_reflection,
            v2.Identity(),
        ],
        [
            rotation,
            (1 - rotation) * reflection,
            (1 - rotation) * (1 - reflection),
        ],
    )


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
    directions = torch.empty(4).uniform_(-1, 1)
    chances = torch.rand(5)
    changes = directions * torch.tensor(strengths) * (chances[:4] < 0.5)
    brightness, contrast, saturation, hue = changes.tolist()
    contrast_is_first = chances[4] < 0.5
    pixels = F.to_dtype(image, torch.float32, scale=True)
    pixels = (pixels + brightness).clamp(0, 1)
    if contrast_is_first:
        pixels = (pixels * (1 + contrast)).clamp(0, 1)
    if saturation:
        value = pixels.amax(0)
        below = value - pixels
        # The largest factor makes the smallest channel 0, a saturation of 1.
        largest_factor = (value / below.amax(0)).nan_to_num(1.0)
        pixels = value - below * largest_factor.clamp(max=1 + saturation)
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
    brightness, contrast = strengths[:2]
    jitters = [
        BandJitter((1 - brightness, 1 + brightness), from_mean=False),
        BandJitter((1 - contrast, 1 + contrast), from_mean=True),
    ]
    for jitter in jitters:
        image = v2.RandomApply([jitter], p=0.5)(image)
    return image


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

    def __init__(
        self,
        settings: DenseSettings,
        fill: Sequence[float] = (0, 0, 0),
        of_colors: bool = True,
    ):
        self.geometry = v2.Compose(
            [
                random_rotation_or_reflection(settings.rotation, settings.rotation_angle, settings.reflection),
                RandomScaledCrop(
                    settings.crop_size,
                    settings.scale_range,
                    settings.max_class_share,
                    fill,
                ),
                v2.RandomHorizontalFlip(settings.horizontal_flip),
                v2.RandomVerticalFlip(settings.vertical_flip),
            ]
        )
        self.colors = v2.Identity()
        if settings.photometric:
            distortion = distort_colors if of_colors else distort_bands
            self.colors = partial(distortion, strengths=settings.photometric_strengths)
        self.exchange_time = settings.exchange_time

    def __call__(
        self,
        images: list[tv_tensors.Image],
        mask: tv_tensors.Mask,
        seed: int,
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
