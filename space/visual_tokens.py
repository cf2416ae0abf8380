"""Maps of the visual tokens that Visual Robustness Learning keeps, over the tiles and the thumbnail of an image."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from modeling_vitp import ViTPProcessor

DIMMED = 0.25  # relative brightness of the image under dropped tokens
TILE_BORDER = "#ffb000"


class TokenMaps(NamedTuple):
    """Kept visual tokens of one image, in the order of the model (row by row)."""

    tiles: np.ndarray
    """Tokens of the tiles: bool of shape `(tile rows * side, tile columns * side)`, with `side` tokens along a tile."""
    thumbnail: np.ndarray | None
    """Tokens of the thumbnail: bool of shape `(side, side)`; `None` if the image is a single tile."""
    grid: tuple[int, int]
    """Rows and columns of tiles."""


def token_maps(
    processor: ViTPProcessor, size: tuple[int, int], num_tiles: int, kept: torch.LongTensor | None = None
) -> TokenMaps:
    """Map the kept visual tokens to their positions in the image.

    Args:
        size: width and height of the image, the only one of its sample.
        num_tiles: number of tiles in `pixel_values`, including the thumbnail.
        kept: `visual_token_indices` of the processor. Default: all tokens are kept.

    Raises:
        ValueError: if an image of that size has another number of tiles.
    """
    image_processor = processor.image_processor
    columns, rows = get_optimal_tiled_canvas(
        size[::-1],
        (image_processor.size["height"], image_processor.size["width"]),
        image_processor.min_patches,
        image_processor.max_patches,
    )
    if num_tiles != rows * columns + (rows * columns > 1):
        raise ValueError(
            f"An image of {size[0]} × {size[1]} is cut into {rows} × {columns} tiles, got {num_tiles} tiles with the "
            "thumbnail. Pass the image that was given to the processor."
        )
    mask = np.full(num_tiles * processor.image_seq_length, kept is None)
    if kept is not None:
        mask[kept.numpy()] = True
    return TokenMaps(*placed(mask, (rows, columns), num_tiles), (rows, columns))


def placed(values: np.ndarray, grid: tuple[int, int], num_tiles: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Arrange a value for each visual token, tile by tile, as maps.

    Args:
        values: array of shape `(num_tiles * tokens,)`.
        grid: rows and columns of tiles.

    Returns:
        The map over the image, of shape `(tile rows * side, tile columns * side)`, and that of the thumbnail, if any.
    """
    rows, columns = grid
    side = math.isqrt(len(values) // num_tiles)
    values = values.reshape(num_tiles, side, side)
    tiles = values[: rows * columns].reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, -1)
    return tiles, values[-1] if rows * columns > 1 else None


def draw_tokens(image: Image.Image, kept: np.ndarray, grid: tuple[int, int] = (1, 1)) -> Image.Image:
    """Darken dropped tokens on a copy of the image, and draw the borders of the tiles.

    Args:
        kept: bool of shape `(rows, columns)` of tokens, which spans the image.
        grid: rows and columns of tiles; lines are drawn between them.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    brightness = np.where(kept[rows[:, None], columns], 1.0, DIMMED)[..., None]
    drawn = Image.fromarray((pixels * brightness).round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    line = max(1, round(max(width, height) / 400))
    for row in range(1, grid[0]):
        draw.line([(0, row * height / grid[0]), (width, row * height / grid[0])], fill=TILE_BORDER, width=line)
    for column in range(1, grid[1]):
        draw.line([(column * width / grid[1], 0), (column * width / grid[1], height)], fill=TILE_BORDER, width=line)
    return drawn
