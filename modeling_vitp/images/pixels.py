"""Pictures as tensors of the channels that a model takes, and channels as colors to be looked at."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension

from ..bands import color_bands
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..input_spec import InputSpec
from .reading import Picture

IMAGE_PROCESSOR = ViTPSegmentationImageProcessor()


def to_pixels(
    picture: Picture, spec: InputSpec | None, layout: ChannelDimension = ChannelDimension.LAST
) -> torch.Tensor:
    """What augmentation works on, before mean and standard deviation.

    Args:
        picture: of Pillow, or an array with its bands where `layout` says.
        spec: how it is read; 8-bit RGB by itself if `None`.

    Returns:
        uint8 of shape `(3, height, width)`; for other bands than red, green and blue float32 of shape
        `(bands, height, width)` in [0, 1], since these are often of more than 8 bits.

    Raises:
        ValueError: if the picture is not what the spec asks for.
    """
    layout = {"input_data_format": layout} if isinstance(picture, np.ndarray) else {}
    pixels = IMAGE_PROCESSOR.process_image(picture, spec=spec, **layout)
    if spec is not None and spec.band_names is not None:
        return pixels / 255
    return pixels.round().to(torch.uint8)


def normalized(pixels: torch.Tensor, image_processor: TorchvisionBackend) -> torch.Tensor:
    """What [`to_pixels`] gives as a model takes it, float32 of the same shape: as the image processor makes it of the
    image."""
    own, values = image_processor, pixels
    if pixels.is_floating_point() or getattr(own, "input_spec", None) is not None:  # as a spec gives it
        values = 255 * F.to_dtype(pixels, scale=True)
    statistics = tuple(own.image_mean), tuple(own.image_std)
    scaling = own.do_rescale, own.rescale_factor, own.do_normalize, *statistics
    return own.rescale_and_normalize(values.as_subclass(torch.Tensor), *scaling).float()


def on_one_grid(bands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Bands of the same ground, `(height, width)`, bilinearly on the grid of the one that has most pixels.

    Raises:
        ValueError: if they are of different proportions, or one has bands itself.
    """
    if any(band.ndim != 2 for band in bands):
        raise ValueError(f"its bands are of shapes {', '.join(str(band.shape) for band in bands)}")
    height, width = max((band.shape for band in bands), key=math.prod)
    if any(band.shape[0] * width != band.shape[1] * height for band in bands):
        raise ValueError(f"its bands are of shapes {', '.join(str(band.shape) for band in bands)}")
    if all(band.shape == (height, width) for band in bands):
        return list(bands)
    pixels = [torch.from_numpy(band.astype(np.float32))[None] for band in bands]
    return [F.resize(band, [height, width], antialias=True)[0].numpy() for band in pixels]


def shown(pixels: torch.Tensor, band_names: Sequence[str] | None = None) -> np.ndarray:
    """Colors, uint8 of shape `(height, width, 3)`, of what [`to_pixels`] gives: of bands red, green and blue if the
    names tell them, else the first three, or the first alone in grey.
    """
    if band_names is not None:
        chosen = color_bands(band_names) or ([0, 1, 2] if len(band_names) > 2 else [0, 0, 0])
        pixels = (255 * pixels[chosen]).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()
