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
    """A square crop of the image at a random scale, of which no class takes more than a share.

    The crop is cut first and scaled then, so large images cost no more than small ones. Where it reaches beyond the
    image, it is filled up at the right and at the bottom with `fill`, and in masks with pixels without a class.

    Args:
        size: side of the result, in pixels.
        scale: lowest and highest factor by which the image grows, drawn uniformly.
        max_class_share: a crop is drawn again, up to ten times, while one class has more than this share of its
            labelled pixels.
        fill: a value for each band, in the range that those of the images have.
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
        # Not torchvision's resize of masks, which moves them by up to a pixel against images.
        mask = F.resize_image(cropped.as_subclass(torch.Tensor)[None], [height, width], InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(F.pad(mask, beyond, fill=IGNORE_INDEX)[0])


def class_share(mask: torch.Tensor) -> float:
    """Share of the largest class among the labelled pixels; 1 if there is none."""
    counts = mask.flatten().to(torch.int64).bincount(minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return (counts.max() / counts.sum().clamp(min=1)).item() if counts.sum() else 1.0


def photometric_distortion() -> v2.Transform:
    """Each with a chance of one half, as in SSD (arXiv 1512.02325), without the exchange of channels."""
    jitters = [
        v2.ColorJitter(brightness=(0.875, 1.125)),
        v2.ColorJitter(contrast=(0.5, 1.5)),
        v2.ColorJitter(saturation=(0.5, 1.5)),
        v2.ColorJitter(hue=0.05),
    ]
    return v2.Compose([v2.RandomApply([jitter], p=0.5) for jitter in jitters])


def band_distortion() -> v2.Transform:
    """What is left of [`photometric_distortion`] for bands in [0, 1] that are no colors: brightness and contrast, of
    each band by itself. Saturation and hue are of red, green and blue.
    """
    jitters = [BandJitter((0.875, 1.125), from_mean=False), BandJitter((0.5, 1.5), from_mean=True)]
    return v2.Compose([v2.RandomApply([jitter], p=0.5) for jitter in jitters])


class Augmentation:
    """Scale, crop, flips and colours; for pairs the exchange of before and after too.

    Geometry is one for the images of a sample and its mask. Colours are drawn for each image, since the light of two
    days differs.

    Args:
        crop_size: side of the crops in pixels.
        scale, max_class_share: see [`RandomScaledCrop`].
        flip: chance of a horizontal flip, and of a vertical one.
        photometric: whether brightness, contrast, saturation and hue change; of other bands than red, green and blue
            brightness and contrast.
        exchange: chance that the images of a pair change places.
        fill: colour beyond the image's border, see [`RandomScaledCrop`].
        of_colors: whether images are of red, green and blue, uint8; else they are of any bands, float32 in [0, 1].
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
        """Random by `seed` alone.

        Args:
            images: one image, or the two of a pair, of shape `(bands, height, width)`.
            mask: class indices, uint8 of shape `(height, width)`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images, mask = self.geometry(images, mask)
            images = [self.colors(image) for image in images]
            if len(images) > 1 and torch.rand(()) < self.exchange:
                images = images[::-1]
        return images, mask
