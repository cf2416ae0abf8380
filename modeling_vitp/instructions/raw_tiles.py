"""Tiles that go through the data loader as 8-bit integers, and become what the model takes on its device.

That is a quarter of the bytes, and the workers neither convert nor normalise a pixel.
"""

from typing import Any

import torch
from torchvision.transforms.v2 import functional as tv
from transformers import BatchFeature
from transformers.image_utils import ImageInput, SizeDict, is_pil_image
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from ..image_processing_vitp import ViTPImageProcessor
from ..input_spec import InputSpec


class RawTileProcessor(ViTPImageProcessor):
    """Leaves the tiles of 8-bit images uint8 in [0, 255]; [`normalize_tiles`] makes of them what its parent would have.

    A sample that has other images too comes normalised, as from the parent.
    """

    @classmethod
    def of(cls, image_processor: ViTPImageProcessor) -> "RawTileProcessor | None":
        """With the same settings; `None` where these, or the class, make something else than tiles of it."""
        settings = image_processor
        if type(settings) is not ViTPImageProcessor or not (settings.do_rescale and settings.do_normalize):
            return None
        return cls.from_dict(settings.to_dict())

    def process_image(
        self, image: ImageInput, input_data_format: Any = None, spec: InputSpec | None = None, **kwargs
    ) -> torch.Tensor:
        """As the parent; 8-bit RGB keeps the order in memory that it was decoded in, which is resized faster."""
        if spec is None and is_pil_image(image) and image.mode == "RGB" and 0 not in image.size:
            return tv.pil_to_tensor(image)
        return super().process_image(image, input_data_format=input_data_format, spec=spec, **kwargs)

    def tiled(
        self, images: list[ImageInput], max_patches: int | None = None, input_spec: dict | None = None
    ) -> tuple[list[torch.Tensor], list[int]] | None:
        """The tiles of a sample's images, and how many each has; `None` if one is no 8-bit RGB picture or has an input
        spec, which [`preprocess`] is for.
        """
        plain = [is_pil_image(image) and image.mode == "RGB" and 0 not in image.size for image in images]
        if not all(plain) or (input_spec, self.input_spec, self.band_names) != (None, None, None):
            return None
        size = self.size if isinstance(self.size, SizeDict) else SizeDict(**self.size)
        most = self.max_patches_of_image(len(images), {"max_patches": max_patches})
        pixels = [tv.pil_to_tensor(image) for image in images]
        by_image = [self.tiles(image, size, self.resample, self.min_patches, most) for image in pixels]
        return [tile for tiles in by_image for tile in tiles], [len(tiles) for tiles in by_image]

    def stack(self, tiles: list[torch.Tensor]) -> list[torch.Tensor]:
        """Leaves it to the collator."""
        return tiles

    def _preprocess(
        self,
        images: list[torch.Tensor],
        size: SizeDict,
        resample: "tv.InterpolationMode",
        crop_to_patches: bool = False,
        min_patches: int = 1,
        max_patches: int = 12,
        **kwargs,
    ) -> BatchFeature:
        if not crop_to_patches or any(image.dtype != torch.uint8 for image in images):
            tiling = {"crop_to_patches": crop_to_patches, "min_patches": min_patches, "max_patches": max_patches}
            return super()._preprocess(images, size=size, resample=resample, **tiling, **kwargs)
        by_image = [self.tiles(image, size, resample, min_patches, max_patches) for image in images]
        tiles = [tile for tiles in by_image for tile in tiles]
        return BatchFeature({"pixel_values": tiles, "num_patches": [len(tiles) for tiles in by_image]})

    def tiles(
        self, image: torch.Tensor, size: SizeDict, resample: "tv.InterpolationMode", min_patches: int, max_patches: int
    ) -> list[torch.Tensor]:
        """As [`~transformers.GotOcr2ImageProcessor.crop_image_to_patches`] of one image, without a copy: views of the
        resized image, row by row, and the thumbnail if there is more than one."""
        height, width = size.height, size.width
        columns, rows = get_optimal_tiled_canvas(image.shape[-2:], (height, width), min_patches, max_patches)
        canvas = self.resize(image, SizeDict(height=height * rows, width=width * columns), resample=resample)
        tiles = [tile for row in canvas.split(height, -2) for tile in row.split(width, -1)]
        return tiles if len(tiles) == 1 else [*tiles, self.resize(image, size, resample=resample)]


def normalize_tiles(pixel_values: torch.Tensor, image_processor: ViTPImageProcessor) -> torch.Tensor:
    """uint8 tiles `(num_tiles, 3, height, width)` rescaled and normalised to float32, on the device they are on; on one
    device the same to the bit as the image processor's own. Others are normalised already, and come back as they are.
    """
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    settings = image_processor
    return settings.rescale_and_normalize(
        pixel_values.contiguous(), True, settings.rescale_factor, True, settings.image_mean, settings.image_std
    )
