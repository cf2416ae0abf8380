"""Tiles of 8-bit images that are normalized on the device of the model, a quarter of the bytes to copy there."""

import PIL.Image
import torch
from torchvision.transforms.v2 import functional as tv
from transformers import BatchFeature
from transformers.image_utils import ImageInput, SizeDict, is_pil_image
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from ..image_decoding import PIL_8BIT_MODES, to_rgb
from ..image_processing_vitp import ViTPImageProcessor


class RawTileProcessor(ViTPImageProcessor):
    """Image processor that returns the tiles of 8-bit images as uint8 in [0, 255], for [`normalize_tiles`].

    The tiles of a sample that has other images as well are normalized.
    """

    @classmethod
    def of(cls, image_processor: ViTPImageProcessor) -> "RawTileProcessor | None":
        """Return a processor with the same settings, or `None` for another class or if it does not normalize."""
        if type(image_processor) is not ViTPImageProcessor:
            return None
        if not (image_processor.do_rescale and image_processor.do_normalize):
            return None
        return cls.from_dict(image_processor.to_dict())

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """Return the tiles of images. The 8-bit images of one sample take a faster path.

        8-bit RGB images keep the memory format of the decoder, which is resized faster.
        """
        has_spec = self.input_spec is not None or kwargs.get("input_spec") is not None
        if has_spec or not kwargs.get("crop_to_patches") or not all(map(is_eight_bit, images[0])):
            return super().preprocess(images, *args, **kwargs)
        size = self.size
        if not isinstance(size, SizeDict):
            size = SizeDict(**size)
        max_patches = self.max_patches_of_image(len(images[0]), kwargs)
        tiles = []
        num_patches = []
        for image in images[0]:
            image_tiles = self.tiles(
                pixels_of(image),
                size,
                self.resample,
                self.min_patches,
                max_patches,
            )
            tiles += image_tiles
            num_patches.append(len(image_tiles))
        return BatchFeature({"pixel_values": tiles, "num_patches": num_patches})

    def tiles(
        self,
        image: torch.Tensor,
        size: SizeDict,
        resample: "tv.InterpolationMode",
        min_patches: int,
        max_patches: int,
    ) -> list[torch.Tensor]:
        """Return the tiles of one image, row by row, and its thumbnail if there are several tiles.

        The tiles equal those of [`~transformers.GotOcr2ImageProcessor.crop_image_to_patches`], but they are views of
        the resized image instead of copies.
        """
        num_columns, num_rows = get_optimal_tiled_canvas(
            image.shape[-2:],
            (size.height, size.width),
            min_patches,
            max_patches,
        )
        canvas_size = SizeDict(height=size.height * num_rows, width=size.width * num_columns)
        canvas = self.resize(image, canvas_size, resample=resample)
        tiles = []
        for row in canvas.split(size.height, -2):
            tiles += row.split(size.width, -1)
        if len(tiles) > 1:
            tiles.append(self.resize(image, size, resample=resample))
        return tiles


def is_eight_bit(image: ImageInput) -> bool:
    return is_pil_image(image) and image.mode in PIL_8BIT_MODES and 0 not in image.size


def pixels_of(image: PIL.Image.Image) -> torch.Tensor:
    """Return an image as uint8 `(3, height, width)` in channels-last memory format."""
    if image.mode != "RGB" or "transparency" in image.info:
        image = to_rgb(image)
    return tv.pil_to_tensor(image)


def normalize_tiles(pixel_values: torch.Tensor, image_processor: ViTPImageProcessor) -> torch.Tensor:
    """Rescale and normalize uint8 tiles `(num_tiles, 3, height, width)` to float32 on their device.

    On one device, the result equals that of the image processor exactly. Tiles of another dtype are already normalized
    and are returned unchanged.
    """
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    return image_processor.rescale_and_normalize(
        pixel_values.contiguous(),
        True,
        image_processor.rescale_factor,
        True,
        image_processor.image_mean,
        image_processor.image_std,
    )
