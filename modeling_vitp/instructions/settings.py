"""How the rows of one source are encoded."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..image_processing_vitp import PIL_8BIT_MODES, ViTPImageProcessor, to_rgb
from ..input_spec import InputSpec

SampleTransform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


def makes_images(transform: SampleTransform | None) -> bool:
    """Whether a transform says that it does without the images of a row, which then are not read."""
    return getattr(transform, "makes_images", False)


def settings_of(transform: SampleTransform | None) -> Any:
    """What a transform says that it was made with, as JSON may hold; `None` if it does not say."""
    return getattr(transform, "settings", None)


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """How the rows of one source of a mixture are encoded; `None` leaves it to the processor.

    Args:
        max_patches: most tiles of a sample; its images share them.
        image_size: side of the square, in pixels, that every image is resampled to before it is cut into tiles: the
            tile size of the model gives one tile, twice as much four and a thumbnail.
        system_prompt: for conversations that have no system message of their own.
        input_spec: how images that are not 8-bit RGB are read, see [`InputSpec`].
        jpeg_degradation: whether training images go through JPEG compression of a random quality from 75 to 100.
    """

    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False

    @property
    def images_kwargs(self) -> dict[str, Any]:
        """What the image processor is told of the source."""
        kwargs = {"max_patches": self.max_patches, "input_spec": self.input_spec}
        return {name: value for name, value in kwargs.items() if value is not None}

    def spec_for(self, image_processor: ViTPImageProcessor) -> InputSpec:
        """By which its images are read: its own, or the image processor's, for the bands of that."""
        fields, names = self.input_spec or image_processor.input_spec, image_processor.band_names
        return InputSpec.from_dict(fields if names is None else {"band_names": names, **fields})

    def apply(self, images: list, generator: torch.Generator) -> list:
        """The images of a sample as the source wants them seen."""
        if self.jpeg_degradation:
            images = [degrade(image, generator) for image in images]
        if self.image_size is not None:
            images = [to_square(image, self.image_size) for image in images]
        return images

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with the system prompt of the source in front, unless they have one of their own."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def check(self) -> None:
        """Raises a `ValueError` if the input spec contradicts itself."""
        InputSpec.from_dict(self.input_spec)


def degrade(image: PIL.Image.Image, generator: torch.Generator) -> PIL.Image.Image:
    """The image, where it is transparent on white, after JPEG compression of a quality from 75 to 100."""
    if not isinstance(image, PIL.Image.Image) or image.mode not in PIL_8BIT_MODES:
        kind = f"mode {image.mode}" if isinstance(image, PIL.Image.Image) else f"{len(image)} bands of {image.dtype}"
        raise ValueError(f"jpeg_degradation needs 8-bit images, not one of {kind}: leave it out of the source.")
    quality = torch.randint(75, 101, (), generator=generator).item()
    compressed = io.BytesIO()
    to_rgb(image).save(compressed, format="JPEG", quality=quality)
    return PIL.Image.open(compressed).convert("RGB")


def to_square(image: PIL.Image.Image | np.ndarray, size: int) -> PIL.Image.Image | np.ndarray:
    """The image, or array of shape `(bands, height, width)`, resampled to `size` pixels a side, whatever its shape."""
    if not isinstance(image, PIL.Image.Image):
        return np.stack([resample_band(band, size) for band in np.asarray(image)])
    if image.mode in ("1", "P", "PA"):  # which Pillow resamples without interpolation
        image = image.convert("RGBA")
    return image.resize((size, size), PIL.Image.Resampling.BICUBIC)


def resample_band(band: np.ndarray, size: int) -> np.ndarray:
    """An array of shape `(height, width)` resampled in its own type, without values beyond those that it has."""
    if not np.isfinite(band).all():
        raise ValueError("image_size cannot resample an image with values that are not finite: fill them before.")
    square = PIL.Image.fromarray(band.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(square, dtype=np.float64), band.min(), band.max())
    return (np.rint(values) if band.dtype.kind in "bui" else values).astype(band.dtype)
