"""Maps of kept visual tokens, compared with a loop over tiles and with the pixel shuffle of the model."""

import numpy as np
import pytest
import torch
from answers import encode
from pictures import picture
from PIL import Image
from tiny_models import TOKENS_PER_TILE
from visual_tokens import DIMMED, TILE_BORDER, draw_tokens, token_maps

SIDE = 2  # tokens along a tile
QUESTION = [{"role": "user", "content": "How many trees are there?"}]


@pytest.mark.parametrize(
    ("size", "grid"),
    [((168, 112), (2, 3)), ((56, 168), (3, 1)), ((300, 56), (1, 5)), ((56, 56), (1, 1)), ((1, 90), (6, 1))],
)
@pytest.mark.parametrize("drop_ratio", [0.0, 0.5, 0.75])
def test_maps_show_kept_tokens_of_processor(processor, size, grid, drop_ratio):
    image = picture(*size)
    inputs = encode(processor, [image], QUESTION, drop_ratio, seed=3)
    kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
    maps = token_maps(processor, image.size, num_tiles, kept)
    assert maps.grid == grid
    rows, columns = grid
    wanted = np.zeros((rows * SIDE, columns * SIDE), dtype=bool)
    thumbnail = np.zeros((SIDE, SIDE), dtype=bool)
    for index in range(num_tiles * TOKENS_PER_TILE) if kept is None else kept.tolist():
        tile, token = divmod(index, TOKENS_PER_TILE)
        row, column = divmod(token, SIDE)
        if tile < rows * columns:
            wanted[tile // columns * SIDE + row, tile % columns * SIDE + column] = True
        else:
            thumbnail[row, column] = True
    assert (maps.tiles == wanted).all()
    if num_tiles == 1:
        assert maps.thumbnail is None
    else:
        assert (maps.thumbnail == thumbnail).all()
    total = num_tiles * TOKENS_PER_TILE
    assert maps.tiles.sum() + thumbnail.sum() * (num_tiles > 1) == np.ceil(total * (1 - drop_ratio))


def test_model_orders_tokens_by_row(model):
    """A marked patch is in the token that covers it after the pixel shuffle."""
    for row in range(4):
        for column in range(4):
            patches = torch.zeros(1, 4, 4, 8)
            patches[0, row, column] = 1
            tokens = model.model.pixel_shuffle(patches, scale_factor=0.5).flatten(1, 2)[0]
            assert tokens.any(-1).nonzero().flatten().tolist() == [row // 2 * SIDE + column // 2]


def test_processor_orders_tiles_by_row(processor):
    """The bright sixth of an image is the tile at that position of the map."""
    for row in range(2):
        for column in range(3):
            pixels = np.zeros((112, 168, 3), dtype=np.uint8)
            pixels[row * 56 : (row + 1) * 56, column * 56 : (column + 1) * 56] = 255
            tiles = encode(processor, [Image.fromarray(pixels)], QUESTION)["pixel_values"]
            assert tiles[:6].mean((1, 2, 3)).argmax() == 3 * row + column
            kept = torch.arange(TOKENS_PER_TILE) + TOKENS_PER_TILE * (3 * row + column)
            maps = token_maps(processor, (168, 112), len(tiles), kept)
            shown = np.array(draw_tokens(Image.fromarray(pixels), maps.tiles))
            assert (shown == pixels).all()


def test_draw_depends_on_the_seed_alone(processor):
    draws = [
        encode(processor, [picture(168, 112, seed)], QUESTION, 0.5, key)["visual_token_indices"]
        for seed, key in ((0, 1), (1, 1), (0, 2))
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_wrong_number_of_tiles_raises(processor):
    with pytest.raises(ValueError, match="2 × 3 tiles, got 5"):
        token_maps(processor, (168, 112), 5)


@pytest.mark.parametrize("size", [(30, 20), (31, 17), (7, 3), (600, 400)])
def test_only_dropped_tokens_are_darkened(size):
    width, height = size
    image = picture(width, height)
    kept = np.random.default_rng(0).random((4, 6)) < 0.5
    drawn = np.array(draw_tokens(image, kept, (1, 1))).astype(float)
    for y in range(height):
        for x in range(0, width, 7):
            factor = 1 if kept[int(y * 4 / height), int(x * 6 / width)] else DIMMED
            assert np.abs(drawn[y, x] - factor * np.array(image.getpixel((x, y)))).max() <= 0.5


def test_tile_borders_are_drawn_between_tiles_only():
    drawn = np.array(draw_tokens(Image.new("RGB", (90, 60)), np.ones((4, 6), dtype=bool), (2, 3)))
    lines = (drawn == [int(TILE_BORDER[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    assert lines[30].all() and lines[:, 30].all() and lines[:, 60].all()
    assert not lines[[0, 15, 45, 59]][:, [0, 15, 45, 75, 89]].any()
