"""Conversion of images to normalized tiles: 8-bit RGB, and all other images by an input spec."""

import base64
import logging
import os
from pathlib import Path

import PIL.Image
import torch
from transformers import BatchFeature, GotOcr2ImageProcessor, PreTrainedConfig, image_utils
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    SizeDict,
    is_pil_image,
    to_numpy_array,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessorKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from .bands import check_same_bands, describe_bands, spread
from .image_decoding import PIL_8BIT_MODES, decode_image, to_rgb
from .input_spec import InputSpec
from .opening import NamesItsFiles

logger = logging.getLogger(__name__)
SWITCHES = ("do_resize", "do_rescale", "do_normalize")
FETCH_SECONDS = 30  # after which a server that sends nothing is given up


class InputSpecImageProcessor(NamesItsFiles, TorchvisionBackend):
    """Base class of the image processors: 8-bit RGB images as in transformers, all others by an [`InputSpec`].

    Transparency is composited onto white. With `do_rescale=False`, 8-bit images stay in [0, 255], as in transformers,
    and all others are in [0, 1], from black to white.

    With `band_names` in the input spec, `image_mean` and `image_std` have a value for each band. If they are not set,
    the class's values for red, green and blue are spread over the bands as [`spread_bands`] does with weights.
    """

    input_spec = None
    of_backbone = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "input_spec")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        names = InputSpec.from_dict(self.input_spec).band_names
        for field in ("image_mean", "image_std") if names is not None else ():
            if kwargs.get(field) is None:
                setattr(self, field, spread_values(getattr(self, field), names))
            elif len(kwargs[field]) != len(names):
                raise ValueError(
                    f"Expected a value of {field} for each of {describe_bands(names)}, got {len(kwargs[field])}."
                )
        check_settings(self, 3 if names is None else len(names))

    @property
    def band_names(self) -> list[str] | None:
        """Names of the channels, `None` for red, green and blue."""
        names = InputSpec.from_dict(self.input_spec).band_names
        return None if names is None else list(names)

    @classmethod
    def from_backbone(cls, backbone: str | Path, **kwargs) -> "InputSpecImageProcessor":
        """Create an image processor with the mean, standard deviation and input spec of a backbone.

        The backbone is a folder or Hub id. A processor that cuts tiles also takes its size. If another `input_spec` is
        passed and drops settings of the backbone's, a warning is logged.
        """
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(backbone, **hub)
        is_timm = fields.get("model_type") == "timm_wrapper" or "pretrained_cfg" in fields
        timm = fields.get("pretrained_cfg") or {}
        settings = {f"image_{name}": list(timm[name]) for name in ("mean", "std") if name in timm}
        # timm writes no file of its own, but an export to its format has one, with the input spec.
        if is_timm and not cached_file(
            backbone, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **hub
        ):
            kwargs = {name: value for name, value in kwargs.items() if name not in hub}
        else:
            stored, kwargs = cls.get_image_processor_dict(backbone, **kwargs)
            settings |= stored
        own = {name: settings[name] for name in cls.of_backbone if name in settings}
        size = own.get("size")
        if not isinstance(size, dict) or {*size} != {"height", "width"}:  # not the size of a tile
            own.pop("size", None)
        if "input_spec" in kwargs:
            left_out = {**(own.get("input_spec") or {})}
            left_out.pop("band_names", None)
            if left_out and not kwargs["input_spec"]:
                logger.warning(
                    "%s was trained on images read with input_spec=%s, but `input_spec` is empty here. Set it (in "
                    "`data`) if these images are of the same kind.",
                    backbone,
                    left_out,
                )
            own = settings_with(own, kwargs.pop("input_spec"))
        return cls(**own | kwargs)

    def with_input_spec(self, input_spec: dict | None) -> "InputSpecImageProcessor":
        """Return a copy of the image processor with another input spec.

        For other bands, mean and standard deviation are spread as [`spread_bands`] does with weights.

        Raises:
            ValueError: if the image processor already has other bands than red, green and blue.
        """
        return type(self).from_dict(settings_with(self.to_dict(), input_spec))

    def fetch_images(self, images: ImageInput, spec: InputSpec | None = None):
        """Open paths, URLs and images in base64 without loss of alpha, bit depth or bands.

        Pillow reads a file if it can read it without loss, otherwise rasterio does.

        Args:
            spec: input spec for the images. Defaults to the image processor's.
        """
        spec = spec or InputSpec.from_dict(self.input_spec)
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image, spec) for image in images]
        if isinstance(images, os.PathLike):
            images = os.fspath(images)
        if not isinstance(images, str):
            return super().fetch_images(images)
        try:
            content = Path(images).read_bytes() if os.path.isfile(images) else stored_content(images)
            return decode_image(content, spec)
        except (OSError, SyntaxError, ValueError, RuntimeError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"image {images[:200]!r} cannot be read: {error}") from error

    def resize(self, image: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Resize an image, and clamp the overshoot of bicubic interpolation also for floats."""
        resized = super().resize(image, *args, **kwargs)
        return resized.clamp(0, 255) if resized.is_floating_point() else resized

    def rescale_and_normalize(
        self, images: torch.Tensor, do_rescale: bool, rescale_factor: float, *args, **kwargs
    ) -> torch.Tensor:
        """Rescale and normalize images. Floats come from an [`InputSpec`]; without rescaling they are set to [0, 1]."""
        if not do_rescale and images.is_floating_point():
            do_rescale, rescale_factor = True, 1 / 255
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, *args, **kwargs)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        images = self.fetch_images(images)
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == expected_ndims + 1 else [images]
        images = [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]
        if not images:
            raise ValueError("Expected at least one image, got none.")
        return images

    def _prepare_image_like_inputs(
        self, images, *args, input_spec: dict | None = None, do_rescale: bool = True, **kwargs
    ) -> list[torch.Tensor]:
        names = self.band_names
        if names is not None:
            input_spec = {"band_names": names, **(input_spec or {})}
        spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        check_same_bands("the image processor", names, "the input spec", None if spec is None else spec.band_names)
        images = self.fetch_images(images, spec or InputSpec())
        images = super()._prepare_image_like_inputs(images, *args, spec=spec, **kwargs)
        if not do_rescale and len({image.is_floating_point() for image in images}) > 1:
            raise ValueError(
                "Expected images of one kind with do_rescale=False, got 8-bit images, which stay in [0, 255], and "
                "others, which are in [0, 1]. Set do_rescale=True, or pass the two kinds separately."
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
        """Convert one image to a `(channels, height, width)` tensor in [0, 255]; see [`InputSpec`] for the errors."""
        if is_pil_image(image) and spec is None and image.mode in PIL_8BIT_MODES and 0 not in image.size:
            return super().process_image(to_rgb(image), **kwargs)
        array = self.stored_bands(image, spec, input_data_format)
        if spec is None and array.dtype == torch.uint8 and array.shape[0] in (1, 3):
            rgb = array.expand(3, -1, -1)
        else:
            rgb = (spec or InputSpec())(array)
        return super().process_image(rgb, input_data_format=ChannelDimension.FIRST, **kwargs)

    def stored_bands(
        self, image: ImageInput, spec: InputSpec | None, input_data_format: str | ChannelDimension | None = None
    ) -> torch.Tensor:
        """Return the stored bands of an image as a tensor `(bands, height, width)`."""
        if is_pil_image(image):
            if 0 in image.size:
                raise ValueError(f"The image is empty: {image.size[0]} x {image.size[1]} pixels.")
            if image.mode in PIL_8BIT_MODES and image.mode not in ("L", "RGB"):
                image = super().process_image(to_rgb(image))
                input_data_format = ChannelDimension.FIRST
            else:
                input_data_format = ChannelDimension.LAST
        if not isinstance(image, torch.Tensor):
            array = to_numpy_array(image)
            image = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        if input_data_format is None and spec is not None and spec.band_names is not None and spec.bands is None:
            input_data_format = layout_of(image, spec.num_channels)
        return self._bands_first(image, input_data_format)

    @staticmethod
    def _bands_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
        """Move the bands to `(bands, height, width)`. If the layout is unknown, the shorter outer axis is taken."""
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if image.ndim != 3 or 0 in image.shape:
            raise ValueError(
                "Expected an image of shape (height, width), (bands, height, width) or (height, width, bands), without "
                f"an axis of length zero, got {tuple(image.shape)}."
            )
        if input_data_format is None:
            first, last = image.shape[0], image.shape[-1]
            if first == last or {first, last} <= {1, 3, 4}:
                raise ValueError(
                    f"The bands of an image of shape {tuple(image.shape)} could be the first or the last axis. Set "
                    "input_data_format='channels_first' or 'channels_last'."
                )
            is_last = last in (1, 3, 4) or (last < first and first not in (1, 3, 4))
            input_data_format = ChannelDimension.LAST if is_last else ChannelDimension.FIRST
        return image.movedim(-1, 0) if input_data_format == ChannelDimension.LAST else image


def layout_of(image: torch.Tensor, num_bands: int) -> ChannelDimension | None:
    """Return the channel layout of an image if exactly one outer axis has `num_bands` entries, else `None`."""
    is_first, is_last = (image.ndim == 3 and image.shape[axis] == num_bands for axis in (0, -1))
    if is_first == is_last:
        return None
    return ChannelDimension.FIRST if is_first else ChannelDimension.LAST


def settings_with(settings: dict, input_spec: dict | None) -> dict:
    """Return the settings of an image processor with another input spec.

    Mean and standard deviation for red, green and blue are spread over the spec's bands as [`spread_bands`] does with
    weights. If the settings already have band names, the spec may omit them.

    Raises:
        ValueError: if the settings are for other bands.
    """
    own = InputSpec.from_dict(settings.get("input_spec")).band_names
    if own is not None:
        input_spec = {"band_names": own, **(input_spec or {})}
    names = InputSpec.from_dict(input_spec).band_names
    settings = {**settings, "input_spec": input_spec}
    if own is not None:
        check_same_bands("the image processor", own, "the input spec", names)
    elif names is not None:
        for field in {"image_mean", "image_std"} & settings.keys():
            settings[field] = spread_values(settings[field], names)
    return settings


def check_settings(processor: TorchvisionBackend, channels: int) -> None:
    """Raise a `ValueError` that names the setting if pixel values would not be finite, or their size is impossible."""

    def is_between(value: object, low: float, high: float) -> bool:
        if isinstance(value, (list, tuple)):
            return len(value) in (1, channels) and all(is_between(part, low, high) for part in value)
        return value is None or (isinstance(value, (int, float)) and low <= value <= high)

    size = getattr(processor, "size", None)
    sides = vars(size).values() if isinstance(size, SizeDict) else [size]
    factor, mean, std = processor.rescale_factor, processor.image_mean, processor.image_std
    valid = {name: getattr(processor, name, None) in (True, False, None) for name in SWITCHES} | {
        "rescale_factor": not isinstance(factor, (list, tuple)) and factor != 0 and is_between(factor, -1e6, 1e6),
        "image_mean": is_between(mean, -1e6, 1e6) and (mean is not None or not processor.do_normalize),
        "image_std": is_between(std, 1e-9, 1e6) and (std is not None or not processor.do_normalize),
        "resample": getattr(processor, "resample", None) in (None, *PIL.Image.Resampling),
        "size": all(is_between(side, 1, 1 << 16) for side in sides),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f"{name} of the image processor is out of range: {str(getattr(processor, name))[:80]}.")


def spread_values(values: list[float], band_names: list[str]) -> list[float]:
    """Return a mean or standard deviation for red, green and blue as one value for each band."""
    return spread(torch.tensor(values, dtype=torch.float64), band_names).tolist()


def stored_content(image: str) -> bytes:
    """Return the file of an image at a URL or in base64, which transformers' own loader converts to 8-bit RGB."""
    if image.startswith(("http://", "https://")):
        httpx = image_utils.httpx  # that of transformers; its package depends on the release
        try:
            return httpx.get(image, timeout=FETCH_SECONDS, follow_redirects=True).raise_for_status().content
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"the server did not send it: {error}") from error
    encoded = image.partition(",")[2] if image.startswith("data:image/") else image
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise ValueError("expected an existing file, an http(s) URL or an image in base64") from None


class ViTPImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):
    r"""Keyword arguments of [`ViTPImageProcessor`].

    input_spec (`dict`, *optional*):
        Conversion of images that are not 8-bit RGB to the model's channels: the fields of [`InputSpec`] (`bands`,
        `window`, `percentiles`, `gamma`, `band_names`). If set, it applies to every image. If not set, 8-bit images
        stay as they are and others are scaled by the range of their type.
    """

    input_spec: dict | None


class ViTPImageProcessor(InputSpecImageProcessor, GotOcr2ImageProcessor):
    """Image processor with InternVL's dynamic tiling, and with an input spec for images that are not 8-bit RGB.

    8-bit RGB images give the same result as [`~transformers.GotOcr2ImageProcessor`] with the same settings.
    """

    valid_kwargs = ViTPImageProcessorKwargs
    of_backbone = (*InputSpecImageProcessor.of_backbone, "size")
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """Cut images into tiles. Images in a nested list share the tile budget of their sample.

        Args:
            images: one image, a list of images, or a list with the images of each sample.

        Returns:
            `pixel_values` of all tiles, image after image, and `num_patches`, the number of tiles of each image.
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

    def max_patches_of_image(self, num_images: int, images_kwargs: dict | None = None) -> int:
        """Return the maximum number of tiles of an image in a sample whose images share `max_patches`; at least one."""
        images_kwargs = images_kwargs or {}
        budget = images_kwargs.get("max_patches") or self.max_patches
        return max(budget // max(num_images, 1), images_kwargs.get("min_patches") or self.min_patches, 1)

    def num_tiles(self, image_sizes: list[tuple[int, int]], images_kwargs: dict | None = None) -> list[int]:
        """Return the number of tiles of each image of a sample, thumbnail included.

        Args:
            image_sizes: height and width of each image, in pixels.
            images_kwargs: keyword arguments of the image processor.
        """
        max_patches = self.max_patches_of_image(len(image_sizes), images_kwargs)
        kwargs = {"crop_to_patches": True, **(images_kwargs or {}), "max_patches": max_patches}
        return [self.get_number_of_image_patches(*size, kwargs) for size in image_sizes]


__all__ = ["ViTPImageProcessor"]
