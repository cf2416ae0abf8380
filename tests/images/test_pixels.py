import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension

from modeling_vitp.images.pixels import shown, to_pixels
from modeling_vitp.input_spec import InputSpec


def test_colors_are_pixels_of_8_bits_as_ever():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for picture in (array, Image.fromarray(array)):
        pixels = to_pixels(picture, None)
        assert pixels.dtype == torch.uint8 and np.array_equal(shown(pixels), array)
    deep = np.array([[[0, 1500, 3000, 9000]]], np.uint16)
    windowed = to_pixels(deep, InputSpec(window=(0, 3000)), ChannelDimension.FIRST)
    assert windowed[:, 0].tolist() == [[0, 128, 255, 255]] * 3


def test_bands_keep_their_depth():
    array = np.random.default_rng(0).integers(0, 10000, (20, 30, 2), dtype=np.uint16)
    pixels = to_pixels(array, InputSpec(window=(0, 10000), band_names=("VV", "VH")))
    np.testing.assert_allclose(pixels.numpy(), array.transpose(2, 0, 1) / 10000, atol=1e-6)
    assert pixels.dtype == torch.float32


def test_bands_are_shown_in_their_colors_or_as_they_come():
    pixels = torch.tensor([0.0, 0.2, 0.4, 0.6])[:, None, None].expand(4, 2, 3)
    for names, values in {
        ("nir", "blue", "green", "red"): [153, 102, 51],
        ("a", "b", "c", "d"): [0, 51, 102],
        ("VH", "VV"): [0, 0, 0],
    }.items():
        colors = shown(pixels[: len(names)], names)
        assert colors.shape == (2, 3, 3) and colors.dtype == np.uint8 and colors[0, 0].tolist() == values
