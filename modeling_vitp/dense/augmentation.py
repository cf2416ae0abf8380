"""Joint augmentation of images and masks, with torchvision's transforms."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..image_processing_vitp_dense import IGNORE_INDEX
from ..training.fine_tuning_data import BandJitter


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


def photometric_distortion() -> v2.Transform:
    """Return the photometric distortion of SSD (arXiv 1512.02325) without channel swaps.

    Brightness, contrast, saturation and hue are each changed with a probability of 0.5.
    """
    jitters = [
        v2.ColorJitter(brightness=(0.875, 1.125)),
        v2.ColorJitter(contrast=(0.5, 1.5)),
        v2.ColorJitter(saturation=(0.5, 1.5)),
        v2.ColorJitter(hue=0.05),
    ]
    return v2.Compose([v2.RandomApply([jitter], p=0.5) for jitter in jitters])


def band_distortion() -> v2.Transform:
    """Return a distortion of brightness and contrast for bands in [0, 1] that are not RGB, drawn per band.

    It replaces [`photometric_distortion`], because saturation and hue are defined for RGB only.
    """
    jitters = [BandJitter((0.875, 1.125), from_mean=False), BandJitter((0.5, 1.5), from_mean=True)]
    return v2.Compose([v2.RandomApply([jitter], p=0.5) for jitter in jitters])


class Augmentation:
    """Random scale, crop, flips and color distortion; for image pairs also a random swap of the two images.

    All images of a sample and its mask get the same geometric transform. Colors are distorted for each image
    separately, because the lighting differs between two dates.

    Args:
        crop_size: side of the crops, in pixels.
        scale, max_class_share: see [`RandomScaledCrop`].
        flip: probabilities of a horizontal and a vertical flip.
        photometric: whether to distort brightness, contrast, saturation and hue. Bands other than red, green and blue
            get brightness and contrast only.
        exchange: probability that the images of a pair are swapped.
        fill: padding color, see [`RandomScaledCrop`].
        of_colors: whether images are RGB, uint8. If false, images have any bands, float32 in [0, 1].
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip: tuple[float, float] = (0.5, 0.0),
        photometric: bool = True,
        exchange: float = 0.0,
        fill: Sequence[float] = (0, 0, 0),
        of_colors: bool = True,
    ):
        self.geometry = v2.Compose(
            [
                RandomScaledCrop(crop_size, scale, max_class_share, fill),
                v2.RandomHorizontalFlip(flip[0]),
                v2.RandomVerticalFlip(flip[1]),
            ]
        )
        distortion = photometric_distortion if of_colors else band_distortion
        self.colors = distortion() if photometric else v2.Identity()
        self.exchange = exchange

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
            torch.manual_seed(seed)
            images, mask = self.geometry(images, mask)
            images = [self.colors(image) for image in images]
            if len(images) > 1 and torch.rand(()) < self.exchange:
                images = images[::-1]
        return images, mask
