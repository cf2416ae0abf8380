"""Images to normalised tiles: 8-bit RGB, and through an input spec everything else that domains image with."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch
from transformers import BatchFeature, GotOcr2ImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    is_pil_image,
    to_numpy_array,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessorKwargs

from .opening import NamesItsFiles

# What Pillow converts to RGB without losing range; its other modes ("I;16", "I", "F" …) hold more than 8 bits.
PIL_8BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}


@dataclass(frozen=True)
class InputSpec:
    """How an image of any depth and number of bands becomes three channels in [0, 255].

    Args:
        bands: indices of the bands to use, one (repeated to three channels) or three, from 0. All by default, which
            needs an image of one or three bands.
        window: `(low, high)` in the image's own units (digital numbers, Hounsfield units, decibels …), or one such
            pair for each band; low becomes black, high white, and what lies outside is clipped.
        percentiles: `(low, high)` in [0, 100]: the window is taken from each band's own values. NaN and infinities
            do not count.
        gamma: exponent applied to the windowed value in [0, 1]; below 1 brightens.

    Without `window` and `percentiles`, unsigned integers span their type's range (0 to 65535 for 16 bits) and floats
    must lie in [0, 1].

    Raises:
        ValueError: if the fields contradict each other.
    """

    bands: tuple[int, ...] | None = None
    window: tuple | None = None
    percentiles: tuple[float, float] | None = None
    gamma: float = 1.0

    def __post_init__(self):
        if self.bands is not None and not (
            isinstance(self.bands, (list, tuple))
            and len(self.bands) in (1, 3)
            and all(isinstance(band, int) and band >= 0 for band in self.bands)
        ):
            raise ValueError(f"input_spec: bands={self.bands}, but one or three indices from 0 are needed.")
        if self.window is not None and self.percentiles is not None:
            raise ValueError("input_spec: give either `window` or `percentiles`, not both.")
        if self.window is not None and not (is_pair(self.window) or is_list_of_pairs(self.window)):
            raise ValueError(
                f"input_spec: window={self.window}, but (low, high), or one such pair for each band, is needed."
            )
        for low, high in self.windows or []:
            if not (low < high and math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"input_spec: window ({low}, {high}) is empty: low must be below high, both finite.")
        if self.percentiles is not None and not (
            is_pair(self.percentiles) and 0 <= self.percentiles[0] < self.percentiles[1] <= 100
        ):
            raise ValueError(f"input_spec: percentiles={self.percentiles}, but 0 <= low < high <= 100 is needed.")
        if not (isinstance(self.gamma, (int, float)) and self.gamma > 0):
            raise ValueError(f"input_spec: gamma={self.gamma} must be positive.")

    @classmethod
    def from_dict(cls, fields: dict | None) -> "InputSpec":
        """From the dictionary that is saved with the image processor; an unknown field is an error."""
        fields = fields or {}
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"input_spec: unknown field(s) {sorted(unknown)}; it has {sorted(cls.__dataclass_fields__)}."
            )
        return cls(**fields)

    @property
    def is_in_units(self) -> bool:
        """Whether it says what is black and white in an image's own units."""
        return self.window is not None or self.percentiles is not None

    @property
    def windows(self) -> list[tuple[float, float]] | None:
        """The window as a list of pairs: one for all bands, or one for each."""
        if self.window is None:
            return None
        return [tuple(pair) for pair in self.window] if isinstance(self.window[0], (list, tuple)) else [self.window]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """
        Args:
            image: of shape `(bands, height, width)`, any real dtype.

        Returns:
            float32 of shape `(3, height, width)` in [0, 255].

        Raises:
            ValueError: if the image has not the bands that the spec asks for, holds no finite value, or needs a
                window that the spec does not give.
        """
        if image.is_complex():
            raise ValueError("the image is complex: give its magnitude or another real quantity.")
        if self.bands is not None:
            if max(self.bands) >= image.shape[0]:
                raise ValueError(
                    f"input_spec asks for bands {list(self.bands)}, but the image has {image.shape[0]} band(s)."
                )
            image = image[list(self.bands)]
        if image.shape[0] not in (1, 3):
            raise ValueError(
                f"the image has {image.shape[0]} bands. Name the one or three to use, for example "
                "input_spec={'bands': [3, 2, 1]}; convert RGBA arrays to PIL images."
            )
        low, high = self._range(image)
        scaled = ((image.to(torch.float64) - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)
        return (255 * scaled**self.gamma).float().expand(3, -1, -1)

    def _range(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Black and white points, each of shape `(bands, 1, 1)` or `(1, 1, 1)`."""
        if self.window is not None:
            if len(self.windows) not in (1, image.shape[0]):
                raise ValueError(
                    f"input_spec has {len(self.windows)} windows, but {image.shape[0]} band(s) are used: give one "
                    "window, or one for each band."
                )
            low, high = torch.tensor(self.windows, dtype=torch.float64).T
        elif self.percentiles is not None:
            low, high = torch.tensor([band_percentiles(band, self.percentiles) for band in image]).T
            high = torch.where(high > low, high, low + 1)
        elif image.dtype == torch.bool:
            low, high = torch.tensor([0.0]), torch.tensor([1.0])
        elif not image.dtype.is_signed:
            low, high = torch.tensor([0.0]), torch.tensor([float(torch.iinfo(image.dtype).max)])
        elif image.is_floating_point() and image.isfinite().all() and image.min() >= 0 and image.max() <= 1:
            low, high = torch.tensor([0.0]), torch.tensor([1.0])
        else:
            finite = image[image.isfinite()]
            span = f"[{finite.min():g}, {finite.max():g}]" if finite.numel() else "nothing finite"
            raise ValueError(
                f"the image is {str(image.dtype).removeprefix('torch.')} with values in {span}, and no window says "
                "what is black and what is white. Give input_spec={'window': [low, high]} or "
                "input_spec={'percentiles': [2, 98]}."
            )
        return low.double().view(-1, 1, 1), high.double().view(-1, 1, 1)


def is_pair(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


def is_list_of_pairs(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_pair(v) for v in value)


def band_percentiles(band: torch.Tensor, percentiles: tuple[float, float]) -> list[float]:
    """Linearly interpolated percentiles of the finite values (`torch.quantile` stops at 16 million elements)."""
    values = band[band.isfinite()].double()
    if values.numel() == 0:
        raise ValueError(
            "a band of the image holds no finite value, so it has no percentiles. Give a `window`, or other `bands`."
        )
    result = []
    for percentile in percentiles:
        rank = percentile / 100 * (values.numel() - 1)
        lower = values.kthvalue(int(rank) + 1).values
        upper = values.kthvalue(min(int(rank) + 2, values.numel())).values
        result.append((lower + (rank - int(rank)) * (upper - lower)).item())
    return result


class InputSpecImageProcessor(NamesItsFiles, TorchvisionBackend):
    """Reads 8-bit RGB images as transformers does, and all others by an [`InputSpec`].

    Transparency is composited onto white. `do_rescale=False` leaves 8-bit images in [0, 255], as in transformers, and
    gives all others in [0, 1], from black to white.
    """

    input_spec = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        InputSpec.from_dict(self.input_spec)

    @classmethod
    def from_backbone(cls, backbone: str | Path, **kwargs) -> "InputSpecImageProcessor":
        """With the mean, standard deviation and input spec of the backbone in a folder or Hub repo."""
        settings, kwargs = cls.get_image_processor_dict(backbone, **kwargs)
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "input_spec")
        return cls(**{name: settings[name] for name in names if name in settings} | kwargs)

    def fetch_images(self, images: ImageInput):
        """As the parent, but files are opened with Pillow, so that alpha, depth, bands and TIFF are not lost."""
        if isinstance(images, os.PathLike):
            images = os.fspath(images)
        if not isinstance(images, str):
            return super().fetch_images(images)
        try:
            if not os.path.isfile(images):
                return super().fetch_images(images)
            with PIL.Image.open(images) as image:
                return PIL.ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, RuntimeError) as error:
            raise ValueError(f"image {images[:200]!r} cannot be read: {error}") from error

    def resize(self, image: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As the parent, which clamps the overshoot of bicubic resampling only if the image is uint8."""
        resized = super().resize(image, *args, **kwargs)
        return resized.clamp(0, 255) if resized.is_floating_point() else resized

    def rescale_and_normalize(
        self, images: torch.Tensor, do_rescale: bool, rescale_factor: float, *args, **kwargs
    ) -> torch.Tensor:
        """As the parent. Floats come from an [`InputSpec`], and without rescaling are meant to be in [0, 1]."""
        if not do_rescale and images.is_floating_point():
            do_rescale, rescale_factor = True, 1 / 255
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, *args, **kwargs)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        images = self.fetch_images(images)
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == expected_ndims + 1 else [images]
        images = [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]
        if not images:
            raise ValueError("there is no image: give at least one.")
        return images

    def _prepare_image_like_inputs(
        self, images, *args, input_spec: dict | None = None, do_rescale: bool = True, **kwargs
    ) -> list[torch.Tensor]:
        spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        images = super()._prepare_image_like_inputs(images, *args, spec=spec, **kwargs)
        if not do_rescale and len({image.is_floating_point() for image in images}) > 1:
            raise ValueError(
                "with do_rescale=False, 8-bit images stay in [0, 255] and others are in [0, 1], and these are of both "
                "kinds: give images of one kind, or rescale."
            )
        return images

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        spec: InputSpec | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One image to a `(3, height, width)` tensor in [0, 255]; see [`InputSpec`] for what is refused."""
        if is_pil_image(image):
            if 0 in image.size:
                raise ValueError(f"the image is empty: {image.size[0]} x {image.size[1]} pixels.")
            if spec is None and image.mode in PIL_8BIT_MODES:
                return super().process_image(image, do_convert_rgb=True, **kwargs)
            if image.mode in PIL_8BIT_MODES and image.mode not in ("L", "RGB"):
                image = super().process_image(image, do_convert_rgb=True)
                input_data_format = ChannelDimension.FIRST
            else:
                input_data_format = ChannelDimension.LAST
        if not isinstance(image, torch.Tensor):
            array = to_numpy_array(image)
            image = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        array = self._bands_first(image, input_data_format)
        if spec is None and array.dtype == torch.uint8 and array.shape[0] in (1, 3):
            rgb = array.expand(3, -1, -1)
        else:
            rgb = (spec or InputSpec())(array)
        return super().process_image(rgb, input_data_format=ChannelDimension.FIRST, **kwargs)

    @staticmethod
    def _bands_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
        """To `(bands, height, width)`: the shorter of the outer axes holds the bands unless the caller says."""
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if image.ndim != 3 or 0 in image.shape:
            raise ValueError(
                f"an image has shape {tuple(image.shape)}; (height, width), (bands, height, width) or "
                "(height, width, bands) is needed, with no axis of length zero."
            )
        if input_data_format is None:
            first, last = image.shape[0], image.shape[-1]
            if first == last or {first, last} <= {1, 3, 4}:
                raise ValueError(
                    f"an image has shape {tuple(image.shape)}, so its bands could be the first or the last axis: pass "
                    "input_data_format='channels_first' or 'channels_last'."
                )
            is_last = last in (1, 3, 4) or (last < first and first not in (1, 3, 4))
            input_data_format = ChannelDimension.LAST if is_last else ChannelDimension.FIRST
        return image.movedim(-1, 0) if input_data_format == ChannelDimension.LAST else image


class ViTPImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):
    r"""
    input_spec (`dict`, *optional*):
        How images that are not 8-bit RGB become three channels: the fields of [`InputSpec`] (`bands`, `window`,
        `percentiles`, `gamma`). Given, it applies to every image; not given, 8-bit images are taken as they are and
        others by the range of their type.
    """

    input_spec: dict | None


class ViTPImageProcessor(InputSpecImageProcessor, GotOcr2ImageProcessor):
    """InternVL's dynamic tiling with ImageNet mean and std, and an input spec for images that are not 8-bit RGB.

    8-bit RGB input gives what [`~transformers.GotOcr2ImageProcessor`] gives with the same settings.
    """

    valid_kwargs = ViTPImageProcessorKwargs
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """As its parent; images that come in a list for each sample share the budget of their sample.

        Args:
            images: one image, a list of images, or a list of the images of each sample.

        Returns:
            `pixel_values` of all tiles, image after image, and `num_patches`, the tiles of each image.
        """
        is_by_sample = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if not is_by_sample:
            return super().preprocess(images, *args, **kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        data = {"pixel_values": [], "num_patches": []}
        for sample in images:
            max_patches = self.max_patches_of_image(len(sample), kwargs)
            tiles = super().preprocess(sample, *args, **{**kwargs, "max_patches": max_patches}) if sample else {}
            for name, values in tiles.items():
                data[name] += values
        return BatchFeature(data, tensor_type=return_tensors)

    def stack(self, tiles: list[torch.Tensor]) -> torch.Tensor:
        """Tiles of a batch as one tensor."""
        return torch.stack(tiles)

    def max_patches_of_image(self, num_images: int, images_kwargs: dict | None = None) -> int:
        """Most tiles of each image of a sample, which share its budget `max_patches`; at least one."""
        images_kwargs = images_kwargs or {}
        budget = images_kwargs.get("max_patches") or self.max_patches
        return max(budget // max(num_images, 1), images_kwargs.get("min_patches") or self.min_patches, 1)

    def num_tiles(self, image_sizes: list[tuple[int, int]], images_kwargs: dict | None = None) -> list[int]:
        """Tiles of each image of a sample, thumbnail included.

        Args:
            image_sizes: height and width of each, in pixels.
            images_kwargs: what the image processor is told of them.
        """
        max_patches = self.max_patches_of_image(len(image_sizes), images_kwargs)
        kwargs = {"crop_to_patches": True, **(images_kwargs or {}), "max_patches": max_patches}
        return [self.get_number_of_image_patches(*size, kwargs) for size in image_sizes]


__all__ = ["InputSpec", "ViTPImageProcessor"]
