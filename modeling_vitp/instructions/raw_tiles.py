"""Tiles that go through the data loader as 8-bit integers, and become what the model takes on its device.

That is a quarter of the bytes, and the workers neither convert nor normalise a pixel.
"""

import PIL.Image
import torch
from torchvision.transforms.v2 import functional as tv
from transformers import BatchFeature
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import ImageInput, SizeDict, is_pil_image
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from ..image_processing_vitp import PIL_8BIT_MODES, ViTPImageProcessor


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

    def preprocess(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        """As the parent, faster for the 8-bit images of one sample: 8-bit RGB keeps the order in memory that it was
        decoded in, which is resized faster."""
        is_usual = kwargs.keys() <= {"crop_to_patches", "return_tensors", "max_patches"} and kwargs.get(
            "crop_to_patches"
        )
        if not is_usual or self.input_spec is not None or not all(map(is_eight_bit, images[0])):
            return super().preprocess(images, *args, **kwargs)
        size = self.size if isinstance(self.size, SizeDict) else SizeDict(**self.size)
        most = self.max_patches_of_image(len(images[0]), kwargs)
        by_image = [self.tiles(pixels_of(image), size, self.resample, self.min_patches, most) for image in images[0]]
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


def is_eight_bit(image: ImageInput) -> bool:
    return is_pil_image(image) and image.mode in PIL_8BIT_MODES and 0 not in image.size


def pixels_of(image: PIL.Image.Image) -> torch.Tensor:
    """uint8 `(3, height, width)`, each pixel's bands side by side in memory."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return tv.pil_to_tensor(image)
    return torch.from_numpy(convert_to_rgb(image, return_numpy=True)).movedim(-1, 0)


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
