"""Conversion of images to normalized tiles: 8-bit RGB, and all other images by an input spec."""

import base64
import logging
import os
from pathlib import Path

import PIL.Image
import torch
from transformers import BatchFeature, GotOcr2ImageProcessor, image_utils
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
from .opening import NamesItsFiles, read_config_fields

logger = logging.getLogger(__name__)
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
        band_names = self.band_names
        if band_names is not None:
            for field in ("image_mean", "image_std"):
                if kwargs.get(field) is None:
                    setattr(self, field, spread_values(getattr(self, field), band_names))
                elif len(kwargs[field]) != len(band_names):
                    raise ValueError(
                        f"Expected a value of {field} for each of {describe_bands(band_names)}, got "
                        f"{len(kwargs[field])}."
                    )
        check_settings(self, 3 if band_names is None else len(band_names))

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
        hub_options = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
        config = read_config_fields(backbone, **hub_options)
        timm_settings = config.get("pretrained_cfg") or {}
        settings = {}
        for name in ("mean", "std"):
            if name in timm_settings:
                settings[f"image_{name}"] = list(timm_settings[name])
        is_timm = config.get("model_type") == "timm_wrapper" or "pretrained_cfg" in config
        # timm writes no file of its own, but an export to its format has one, with the input spec.
        has_file = not is_timm or cached_file(
            backbone,
            IMAGE_PROCESSOR_NAME,
            _raise_exceptions_for_missing_entries=False,
            **hub_options,
        )
        if has_file:
            stored_settings, kwargs = cls.get_image_processor_dict(backbone, **kwargs)
            settings.update(stored_settings)
        else:
            kwargs = {name: value for name, value in kwargs.items() if name not in hub_options}

        backbone_settings = {name: settings[name] for name in cls.of_backbone if name in settings}
        size = backbone_settings.get("size")
        is_tile_size = isinstance(size, dict) and set(size) == {"height", "width"}
        if not is_tile_size:
            backbone_settings.pop("size", None)
        if "input_spec" in kwargs:
            input_spec = kwargs.pop("input_spec")
            dropped_settings = dict(backbone_settings.get("input_spec") or {})
            dropped_settings.pop("band_names", None)
            if dropped_settings and not input_spec:
                logger.warning(
                    "%s was trained on images read with input_spec=%s, but `input_spec` is empty here. Set it (in "
                    "`data`) if these images are of the same kind.",
                    backbone,
                    dropped_settings,
                )
            backbone_settings = settings_with(backbone_settings, input_spec)
        return cls(**{**backbone_settings, **kwargs})

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
        if resized.is_floating_point():
            return resized.clamp(0, 255)
        return resized

    def rescale_and_normalize(
        self, images: torch.Tensor, do_rescale: bool, rescale_factor: float, *args, **kwargs
    ) -> torch.Tensor:
        """Rescale and normalize images. Floats come from an [`InputSpec`]; without rescaling they are set to [0, 1]."""
        if not do_rescale and images.is_floating_point():
            do_rescale = True
            rescale_factor = 1 / 255
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, *args, **kwargs)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        images = self.fetch_images(images)
        if not isinstance(images, (list, tuple)):
            is_batch = getattr(images, "ndim", 0) == expected_ndims + 1
            images = list(images) if is_batch else [images]
        flat_images = []
        for image in images:
            if isinstance(image, (list, tuple)):
                flat_images.extend(image)
            else:
                flat_images.append(image)
        if not flat_images:
            raise ValueError("Expected at least one image, got none.")
        return flat_images

    def _prepare_image_like_inputs(
        self, images, *args, input_spec: dict | None = None, do_rescale: bool = True, **kwargs
    ) -> list[torch.Tensor]:
        band_names = self.band_names
        if band_names is not None:
            input_spec = {"band_names": band_names, **(input_spec or {})}
        spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        spec_names = None if spec is None else spec.band_names
        check_same_bands("the image processor", band_names, "the input spec", spec_names)
        images = self.fetch_images(images, spec or InputSpec())
        images = super()._prepare_image_like_inputs(images, *args, spec=spec, **kwargs)
        kinds = {image.is_floating_point() for image in images}
        if not do_rescale and len(kinds) > 1:
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
        bands = self.stored_bands(image, spec, input_data_format)
        if spec is None and bands.dtype == torch.uint8 and len(bands) in (1, 3):
            rgb = bands.expand(3, -1, -1)
        else:
            spec = spec or InputSpec()
            rgb = spec(bands)
        return super().process_image(rgb, input_data_format=ChannelDimension.FIRST, **kwargs)

    def stored_bands(
        self, image: ImageInput, spec: InputSpec | None, input_data_format: str | ChannelDimension | None = None
    ) -> torch.Tensor:
        """Return the stored bands of an image as a tensor `(bands, height, width)`."""
        if is_pil_image(image):
            input_data_format = ChannelDimension.LAST
            needs_conversion = image.mode in PIL_8BIT_MODES and image.mode not in ("L", "RGB")
            if needs_conversion and 0 not in image.size:
                image = super().process_image(to_rgb(image))
                input_data_format = ChannelDimension.FIRST
        if not isinstance(image, torch.Tensor):
            array = to_numpy_array(image)
            native_type = array.dtype.newbyteorder("=")
            image = torch.from_numpy(array.astype(native_type))
        if input_data_format is None and spec is not None and spec.band_names is not None and spec.bands is None:
            input_data_format = layout_of(image, spec.num_channels)
        return self._bands_first(image, input_data_format)

    @staticmethod
    def _bands_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
        """Move the bands to `(bands, height, width)`. If the layout is unknown, the shorter outer axis is taken."""
        if image.ndim == 2:
            image = image[None]
            input_data_format = ChannelDimension.FIRST
        if image.ndim != 3 or 0 in image.shape:
            raise ValueError(
                "Expected an image of shape (height, width), (bands, height, width) or (height, width, bands), without "
                f"an axis of length zero, got {tuple(image.shape)}."
            )
        if input_data_format is None:
            first = image.shape[0]
            last = image.shape[-1]
            if first == last or {first, last} <= {1, 3, 4}:
                raise ValueError(
                    f"The bands of an image of shape {tuple(image.shape)} could be the first or the last axis. Set "
                    "input_data_format='channels_first' or 'channels_last'."
                )
            is_last_shorter = last < first and first not in (1, 3, 4)
            is_last = last in (1, 3, 4) or is_last_shorter
            input_data_format = ChannelDimension.LAST if is_last else ChannelDimension.FIRST
        if input_data_format == ChannelDimension.LAST:
            return image.movedim(-1, 0)
        return image


def layout_of(image: torch.Tensor, num_bands: int) -> ChannelDimension | None:
    """Return the channel layout of an image if exactly one outer axis has `num_bands` entries, else `None`."""
    if image.ndim != 3:
        return None
    is_first = image.shape[0] == num_bands
    is_last = image.shape[-1] == num_bands
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
    present_names = InputSpec.from_dict(settings.get("input_spec")).band_names
    if present_names is not None:
        input_spec = {"band_names": present_names, **(input_spec or {})}
    band_names = InputSpec.from_dict(input_spec).band_names
    settings = {**settings, "input_spec": input_spec}
    if present_names is not None:
        check_same_bands("the image processor", present_names, "the input spec", band_names)
    elif band_names is not None:
        for field in ("image_mean", "image_std"):
            if field in settings:
                settings[field] = spread_values(settings[field], band_names)
    return settings


def check_settings(processor: TorchvisionBackend, channels: int) -> None:
    """Raise a `ValueError` that names the setting if pixel values would not be finite, or their size is impossible."""
    factor = processor.rescale_factor
    mean = processor.image_mean
    std = processor.image_std
    size = getattr(processor, "size", None)
    sides = vars(size).values() if isinstance(size, SizeDict) else [size]
    is_normalized = processor.do_normalize
    switch_values = (True, False, None)
    is_valid = {
        "do_resize": getattr(processor, "do_resize", None) in switch_values,
        "do_rescale": processor.do_rescale in switch_values,
        "do_normalize": is_normalized in switch_values,
        "rescale_factor": not isinstance(factor, (list, tuple)) and factor != 0 and is_between(factor, -1e6, 1e6),
        "image_mean": are_between(mean, -1e6, 1e6, channels) and (mean is not None or not is_normalized),
        "image_std": are_between(std, 1e-9, 1e6, channels) and (std is not None or not is_normalized),
        "resample": getattr(processor, "resample", None) in (None, *PIL.Image.Resampling),
        "size": all(is_between(side, 1, 1 << 16) for side in sides),
    }
    for name, is_valid_setting in is_valid.items():
        if not is_valid_setting:
            raise ValueError(f"{name} of the image processor is out of range: {str(getattr(processor, name))[:80]}.")


def is_between(number: object, low: float, high: float) -> bool:
    """Return whether a setting is a number in a range, or `None`."""
    if number is None:
        return True
    return isinstance(number, (int, float)) and low <= number <= high


def are_between(setting: object, low: float, high: float, channels: int) -> bool:
    """Return whether a setting is a number in a range or a list of these, one for all channels or one for each."""
    if not isinstance(setting, (list, tuple)):
        return is_between(setting, low, high)
    return len(setting) in (1, channels) and all(is_between(number, low, high) for number in setting)


def spread_values(values: list[float], band_names: list[str]) -> list[float]:
    """Return a mean or standard deviation for red, green and blue as one value for each band."""
    return spread(torch.tensor(values, dtype=torch.float64), band_names).tolist()


def stored_content(image: str) -> bytes:
    """Return the file of an image at a URL or in base64, which transformers' own loader converts to 8-bit RGB."""
    if image.startswith(("http://", "https://")):
        httpx = image_utils.httpx  # that of transformers; its package depends on the release
        try:
            response = httpx.get(image, timeout=FETCH_SECONDS, follow_redirects=True)
            return response.raise_for_status().content
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"the server did not send it: {error}") from error
    encoded = image
    if image.startswith("data:image/"):
        _, _, encoded = image.partition(",")
    without_whitespace = "".join(encoded.split())
    try:
        return base64.b64decode(without_whitespace, validate=True)
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
        pixel_values = []
        num_patches = []
        for sample in images:
            if not sample:
                continue
            options = {**kwargs, "max_patches": self.max_patches_of_image(len(sample), kwargs)}
            tiles = super().preprocess(sample, *args, **options)
            pixel_values += tiles["pixel_values"]
            num_patches += tiles["num_patches"]
        data = {"pixel_values": pixel_values, "num_patches": num_patches}
        return BatchFeature(data, tensor_type=return_tensors)

    def max_patches_of_image(self, num_images: int, images_kwargs: dict | None = None) -> int:
        """Return the maximum number of tiles of an image in a sample whose images share `max_patches`; at least one."""
        images_kwargs = images_kwargs or {}
        budget = images_kwargs.get("max_patches") or self.max_patches
        min_patches = images_kwargs.get("min_patches") or self.min_patches
        share = budget // max(num_images, 1)
        return max(share, min_patches, 1)

    def num_tiles(self, image_sizes: list[tuple[int, int]], images_kwargs: dict | None = None) -> list[int]:
        """Return the number of tiles of each image of a sample, thumbnail included.

        Args:
            image_sizes: height and width of each image, in pixels.
            images_kwargs: keyword arguments of the image processor.
        """
        max_patches = self.max_patches_of_image(len(image_sizes), images_kwargs)
        options = {"crop_to_patches": True, **(images_kwargs or {}), "max_patches": max_patches}
        return [self.get_number_of_image_patches(height, width, options) for height, width in image_sizes]


__all__ = ["ViTPImageProcessor"]
