"""Conversion of images to tensors, color augmentation, and conversion of channels and features to RGB for display."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension

from ..bands import color_bands
from ..command.settings import NonNegativeFloat, Probability, Settings
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..input_spec import InputSpec
from .reading import Picture

IMAGE_PROCESSOR = ViTPSegmentationImageProcessor()


def to_pixels(
    picture: Picture,
    spec: InputSpec | None,
    layout: ChannelDimension = ChannelDimension.LAST,
) -> torch.Tensor:
    """Convert an image to a tensor for augmentation, before normalization with mean and standard deviation.

    Args:
        picture: Pillow image, or array with the band axis of `layout`.
        spec: input spec of the image. `None` converts to 8-bit RGB.
        layout: position of the band axis of an array.

    Returns:
        uint8 of shape `(3, height, width)`. For bands other than red, green and blue, float32 of shape
        `(bands, height, width)` in [0, 1], because bands often have more than 8 bits.

    Raises:
        ValueError: if the image does not match the spec.
    """
    if isinstance(picture, np.ndarray):
        pixels = IMAGE_PROCESSOR.process_image(picture, spec=spec, input_data_format=layout)
    else:
        pixels = IMAGE_PROCESSOR.process_image(picture, spec=spec)
    if spec is not None and spec.band_names is not None:
        return pixels / 255
    return pixels.round().to(torch.uint8)


def normalized(pixels: torch.Tensor, image_processor: TorchvisionBackend) -> torch.Tensor:
    """Normalize the output of [`to_pixels`] like the image processor, float32 of the same shape."""
    has_input_spec = getattr(image_processor, "input_spec", None) is not None
    if pixels.is_floating_point() or has_input_spec:
        pixels = 255 * F.to_dtype(pixels, scale=True)  # An input spec gives values in [0, 255].
    normalized_pixels = image_processor.rescale_and_normalize(
        pixels.as_subclass(torch.Tensor),
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        tuple(image_processor.image_mean),
        tuple(image_processor.image_std),
    )
    return normalized_pixels.float()


@dataclass(frozen=True)
class ColorJitter(Settings):
    """Photometric augmentation: a random curve `gain * x ** exp(gamma) + bias` for each channel, and sometimes gray.

    A draw applies to all tiles of a sample. Results are clipped to [0, 1].

    Args:
        gamma: largest absolute logarithm of the exponent, at least 0.
        gain: largest absolute deviation of the gain from 1, in [0, 1].
        bias: largest absolute bias, as a share of the range of values, in [0, 1].
        gray: probability that each channel is replaced by the mean of the channels, in [0, 1].
        shared: whether all channels have the same curve, which changes brightness and contrast alone.
    """

    gamma: NonNegativeFloat = 0.5
    gain: Probability = 0.35
    bias: Probability = 0.15
    gray: Probability = 0.2
    shared: bool = False

    def __call__(
        self,
        tiles: Sequence[torch.Tensor],
        image_processor: TorchvisionBackend,
        generator: torch.Generator,
    ) -> list[torch.Tensor]:
        """Return the tiles of a sample in other colors.

        Args:
            tiles: uint8 in [0, 255], or float32 normalized by `image_processor`, each `(channels, height, width)`.
        """
        num_channels = len(tiles[0])
        num_curves = 1 if self.shared else num_channels
        unit_draws = torch.rand(3, num_curves, 1, generator=generator)
        draws = 2 * unit_draws - 1
        draws = draws.expand(3, num_channels, 1)
        is_gray = torch.rand((), generator=generator) < self.gray

        def recolor(values: torch.Tensor) -> torch.Tensor:
            """Apply the curves to values in [0, 1] of shape `(channels, number)`."""
            gamma, gain, bias = draws
            exponent = (self.gamma * gamma).exp()
            factor = 1 + self.gain * gain
            offset = self.bias * bias
            recolored_values = factor * values**exponent + offset
            return recolored_values.clamp(0, 1)

        # The 256 values of a raw tile are looked up, which is faster than a power for each pixel.
        raw_values = torch.arange(256)
        table = recolor(raw_values / 255)
        mean = 0.0
        std = 1.0
        if image_processor.do_normalize:
            mean = torch.tensor(image_processor.image_mean)
            std = torch.tensor(image_processor.image_std)
        highest_value = 255
        if image_processor.do_rescale:
            highest_value = 255 * image_processor.rescale_factor

        recolored_tiles = []
        for tile in tiles:
            is_raw = tile.dtype == torch.uint8
            channels = tile.flatten(1)
            if is_raw:
                channels = table.gather(1, channels.long())
            else:
                unnormalized = (channels.T * std + mean).T
                unit_values = unnormalized / highest_value
                channels = recolor(unit_values.clamp(0, 1))
            if is_gray:
                channels = channels.mean(0).expand_as(channels)
            if is_raw:
                channels = (255 * channels).round()
                channels = channels.to(torch.uint8)
            else:
                normalized_values = (highest_value * channels.T - mean) / std
                channels = normalized_values.T
            recolored_tiles.append(channels.reshape(tile.shape))
        return recolored_tiles


def on_one_grid(bands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Resize bands of the same area, `(height, width)`, bilinearly to the size of the largest band.

    Raises:
        ValueError: if the bands differ in aspect ratio, or an array has several bands.
    """
    shapes = [band.shape for band in bands]
    sizes = [shape[:2] for shape in shapes]
    height, width = max(sizes, key=math.prod)
    for shape in shapes:
        is_one_band = len(shape) == 2
        has_same_ratio = shape[0] * width == shape[1] * height
        if not is_one_band or not has_same_ratio:
            shapes_in_words = ", ".join(str(shape) for shape in shapes)
            raise ValueError(
                f"expected bands of shape (height, width) with the same aspect ratio, got {shapes_in_words}"
            )
    if set(shapes) == {(height, width)}:
        return list(bands)
    resized_bands = []
    for band in bands:
        pixels = torch.from_numpy(band.astype(np.float32))
        resized = F.resize(pixels[None], [height, width], antialias=True)
        resized_band = resized[0].numpy()
        resized_bands.append(resized_band)
    return resized_bands


def shown(pixels: torch.Tensor, band_names: Sequence[str] | None = None) -> np.ndarray:
    """Convert the output of [`to_pixels`] to RGB for display, uint8 of shape `(height, width, 3)`.

    Bands are shown as red, green and blue if their names include these. Otherwise the first three bands are shown, or
    the first band in gray.
    """
    if band_names is not None:
        displayed_bands = color_bands(band_names)
        if not displayed_bands and len(band_names) > 2:
            displayed_bands = [0, 1, 2]
        elif not displayed_bands:
            displayed_bands = [0, 0, 0]
        values = 255 * pixels[displayed_bands]
        values = values.round()
        values = values.clamp(0, 255)
        pixels = values.to(torch.uint8)
    image = pixels.permute(1, 2, 0)
    return image.cpu().numpy()


def principal_scores(features: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Return the scores of the patches on the first principal components, each with mean 0 and variance 1.

    The sign of a component makes its loading of largest magnitude positive. Components without variance (fewer patches
    than components, or a uniform image) have the score 0.

    Args:
        features: patch features of shape `(channels, rows, columns)`.
        count: number of components.

    Returns:
        Scores, float64 of shape `(count, rows, columns)`.
    """
    patches = features.flatten(1).double()
    mean = patches.mean(1, keepdim=True)
    patches = patches - mean
    num_patches = patches.shape[1]
    covariance = patches @ patches.T / num_patches
    variances, components = torch.linalg.eigh(covariance)
    # `eigh` sorts from the smallest variance to the largest.
    variances = variances.flip(0)
    variances = variances[:count]
    components = components.flip(1)
    components = components[:, :count]

    largest_rows = components.abs().argmax(0, keepdim=True)
    largest_loadings = components.gather(0, largest_rows)
    components = components * largest_loadings.sign()

    squared_norms = patches.square().sum(0)
    smallest_variance = 1e-9 * squared_norms.max()
    has_variance = variances > smallest_variance
    positive_variances = variances.clamp(min=1e-300)
    scales = torch.where(has_variance, positive_variances.rsqrt(), 0.0)
    projections = components.T @ patches
    scores = scales[:, None] * projections

    num_missing = count - len(scores)
    padded_scores = nn.functional.pad(scores, (0, 0, 0, num_missing))
    return padded_scores.unflatten(1, features.shape[1:])


def align_scores(scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Rotate the scores of a backbone so that its colors are as close as possible to those of a reference.

    The principal components of two backbones may differ in order, sign and mixture. The rotation (with reflection) is
    the solution of the orthogonal Procrustes problem. It keeps the distances between patches.

    Args:
        scores, reference: scores of shape `(3, rows, columns)`.
    """
    flat_scores = scores.flatten(1)
    flat_reference = reference.flatten(1)
    products = flat_reference @ flat_scores.T
    left_vectors, _, right_vectors = torch.linalg.svd(products)
    rotation = left_vectors @ right_vectors
    rotated_scores = rotation @ flat_scores
    return rotated_scores.view_as(scores)


def colors_of(scores: torch.Tensor) -> np.ndarray:
    """Convert scores to RGB. Two standard deviations below the mean become 0, two above become 255.

    Args:
        scores: scores of shape `(3, rows, columns)`.

    Returns:
        Colors, uint8 of shape `(rows, columns, 3)`.
    """
    unit_colors = scores / 4 + 0.5
    unit_colors = unit_colors.clamp(0, 1)
    values = (255 * unit_colors).round()
    colors = values.to(torch.uint8)
    return colors.movedim(0, -1).numpy()
