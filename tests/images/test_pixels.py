import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor
from transformers.image_utils import ChannelDimension

from modeling_vitp import ViTPSegmentationImageProcessor
from modeling_vitp.images.pixels import normalized, shown, to_pixels
from modeling_vitp.input_spec import InputSpec


def test_rgb_images_become_8_bit_pixels():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for picture in (array, Image.fromarray(array)):
        pixels = to_pixels(picture, None)
        assert pixels.dtype == torch.uint8 and np.array_equal(shown(pixels), array)
    deep = np.array([[[0, 1500, 3000, 9000]]], np.uint16)
    windowed = to_pixels(deep, InputSpec(window=(0, 3000)), ChannelDimension.FIRST)
    assert windowed[:, 0].tolist() == [[0, 128, 255, 255]] * 3


def test_bands_keep_bit_depth():
    array = np.random.default_rng(0).integers(0, 10000, (20, 30, 2), dtype=np.uint16)
    pixels = to_pixels(array, InputSpec(window=(0, 10000), band_names=("VV", "VH")))
    np.testing.assert_allclose(pixels.numpy(), array.transpose(2, 0, 1) / 10000, atol=1e-6)
    assert pixels.dtype == torch.float32


def test_bands_are_displayed_as_rgb():
    pixels = torch.tensor([0.0, 0.2, 0.4, 0.6])[:, None, None].expand(4, 2, 3)
    for names, values in {
        ("nir", "blue", "green", "red"): [153, 102, 51],
        ("a", "b", "c", "d"): [0, 51, 102],
        ("VH", "VV"): [0, 0, 0],
    }.items():
        colors = shown(pixels[: len(names)], names)
        assert colors.shape == (2, 3, 3) and colors.dtype == np.uint8 and colors[0, 0].tolist() == values


def test_transformers_processor_normalizes_pixels():
    """Check an image processor of transformers, as used by one-stage detectors."""
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    processor = RTDetrImageProcessor(do_resize=False, do_normalize=True, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    wanted = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(normalized(to_pixels(image, None), processor), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3},
        {"input_spec": {"window": [0, 200]}, "do_rescale": False},
        {"input_spec": {"band_names": ["VV", "VH"], "window": [0, 200]}},
    ],
    ids=str,
)
def test_normalized_equals_image_processor(settings):
    processor = ViTPSegmentationImageProcessor(**settings)
    spec = settings.get("input_spec") and InputSpec.from_dict(settings["input_spec"])
    number = 3 if processor.band_names is None else 2
    image = np.random.default_rng(0).integers(0, 256, (24, 32, number), dtype=np.uint8)
    found = normalized(to_pixels(image, spec), processor)
    wanted = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    step = wanted.float().diff().abs().max() / 255  # One step of 8 bits, to which colors are rounded.
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float(), atol=float(step), rtol=0)
