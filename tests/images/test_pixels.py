import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers import RTDetrImageProcessor
from transformers.image_utils import ChannelDimension

from modeling_vitp import ViTPSegmentationImageProcessor
from modeling_vitp.images.pixels import ColorJitter, normalized, shown, to_pixels
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


def recolored(values: np.ndarray, jitter: ColorJitter, seed: int) -> np.ndarray:
    """Return values in [0, 1] of shape `(channels, height, width)` in float64, by the definition."""
    generator = torch.Generator().manual_seed(seed)
    gamma, gain, bias = (2 * torch.rand(3, len(values), 1, generator=generator) - 1).double().numpy()[..., None]
    curve = (1 + jitter.gain * gain) * values ** np.exp(jitter.gamma * gamma) + jitter.bias * bias
    found = np.clip(curve, 0, 1)
    is_gray = torch.rand((), generator=generator).item() < jitter.gray
    return np.broadcast_to(found.mean(0), found.shape) if is_gray else found


@pytest.mark.parametrize("bands", [None, ("red", "green", "blue", "nir", "VV")])
@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_color_jitter_equals_its_definition(bands, gray):
    """All tiles of a sample have the same curves, as raw 8-bit and as normalized values."""
    jitter, channels = ColorJitter(gray=gray), 3 if bands is None else len(bands)
    statistics = {"image_mean": [0.4] * channels, "image_std": [0.2, 0.3, 0.25, 0.2, 0.2][:channels]}
    spec = None if bands is None else {"band_names": bands}
    processor = ViTPSegmentationImageProcessor(input_spec=spec, **statistics)
    raw = np.random.default_rng(0).integers(0, 256, (2, channels, 9, 11), dtype=np.uint8)
    expected = [recolored(tile / 255, jitter, 7) for tile in raw]
    found = jitter(list(torch.from_numpy(raw)), processor, torch.Generator().manual_seed(7))
    for tile, values in zip(found, expected):
        assert tile.dtype == torch.uint8 and tile.shape == values.shape
        np.testing.assert_allclose(tile.numpy(), 255 * values, atol=0.501)
    mean, std = (np.array(statistics[name])[:, None, None] for name in ("image_mean", "image_std"))
    tiles = list(torch.from_numpy((raw / 255 - mean) / std).float())
    for tile, values in zip(jitter(tiles, processor, torch.Generator().manual_seed(7)), expected):
        np.testing.assert_allclose(tile.numpy(), (values - mean) / std, atol=2e-5)


def test_color_jitter_of_gamma_alone_equals_torchvision():
    pixels = torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    jitter = ColorJitter(gamma=0.5, gain=0, bias=0, gray=0)
    (found,) = jitter([pixels], ViTPSegmentationImageProcessor(), torch.Generator().manual_seed(1))
    draws = 2 * torch.rand(3, 3, 1, generator=torch.Generator().manual_seed(1)) - 1
    for channel, gamma in enumerate((0.5 * draws[0, :, 0]).exp().tolist()):
        expected = 255 * tv.adjust_gamma(pixels[channel : channel + 1] / 255, gamma)
        np.testing.assert_allclose(found[channel].numpy(), expected[0].numpy(), atol=0.501)


def test_shared_color_jitter_keeps_gray_images_gray():
    """All channels have one curve, with the drawn gain and bias."""
    jitter = ColorJitter(gamma=0.0, gain=0.2, bias=0.1, gray=0.0, shared=True)
    pixels = torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (found,) = jitter([pixels], ViTPSegmentationImageProcessor(), torch.Generator().manual_seed(1))
    _, gain, bias = (2 * torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(1)) - 1).flatten().tolist()
    expected = 255 * (pixels / 255 * (1 + 0.2 * gain) + 0.1 * bias).clamp(0, 1)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=0.501)
    gray = pixels[:1].expand(3, -1, -1)
    (found,) = jitter([gray], ViTPSegmentationImageProcessor(), torch.Generator().manual_seed(2))
    assert (found == found[:1]).all() and (found != gray).any()
    with pytest.raises(ValueError, match="shared"):
        ColorJitter(shared="yes")


def test_color_jitter_draws_within_its_limits():
    """Gray values of 0 and 1 show bias and gain; a share of the draws is gray."""
    jitter, generator = ColorJitter(gamma=0.5, gain=0.2, bias=0.1, gray=0.25), torch.Generator().manual_seed(0)
    plain = ViTPSegmentationImageProcessor(do_normalize=False)
    image = torch.tensor([0.5]).expand(3, 1, 1)
    found = torch.stack([jitter([image], plain, generator)[0] for _ in range(2000)]).flatten(1)
    is_gray = (found.max(1).values - found.min(1).values) < 1e-6
    assert is_gray.double().mean().item() == pytest.approx(0.25, abs=0.04)
    assert found.min() >= 0.8 * 0.5 ** np.exp(0.5) - 0.1 and found.max() <= 1.2 * 0.5 ** np.exp(-0.5) + 0.1
    assert found[~is_gray].std(0).min() > 0.05
