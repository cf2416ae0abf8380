import copy
import json
import warnings

import numpy as np
import pytest
import rasterio
import torch
from pictures import write_bands
from pushed_runs import push
from tiny_models import FROM_SCRATCH, VISION, VISION_16, adapter_config
from torch import nn
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    InternVLVisionConfig,
    InternVLVisionModel,
)

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPDetectionImageProcessor,
    ViTPImageProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    resize_backbone,
    spread_bands,
)
from modeling_vitp.pretraining.loading import build_model, build_tokenizer

SENTINEL_2 = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
SAR = ["VV", "VH"]
# Color whose weights each band takes, M for the mean of the three.
COLORS = {
    "Sentinel-2": (SENTINEL_2, "RBGRGBRGBRGB"),
    "SAR": (SAR, "MM"),
    "panchromatic": (["pan"], "M"),
    "four": (["nir", "Red", "GREEN", "blue"], "MRGB"),
    "unnamed colors": (["a", "b", "c", "d", "e"], "RGBMM"),
    "one color alone": (["red", "nir", "swir"], "RGB"),
    "false color": (["B02", "B03", "B04"], "BGR"),
}


def tiny_vit(**settings) -> ViTPVisionModel:
    torch.manual_seed(0)
    return ViTPVisionModel(ViTPVisionConfig(**{**VISION, **settings})).eval()


def test_bands_of_another_family_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    with pytest.raises(ValueError, match="dinov2"):
        spread_bands(Dinov2Model(Dinov2Config(**sizes)), SAR)


@pytest.mark.parametrize("name", COLORS)
def test_band_weights_are_those_of_its_color(name):
    names, colors = COLORS[name]
    model = tiny_vit()
    kernel, bias = (value.detach().clone() for value in model.embeddings.patch_embeddings.projection.parameters())
    image = torch.randn(2, len(names), 28, 42)
    expected = bias[None, :, None, None]
    for band, color in enumerate(colors):
        weights = kernel.sum(1, keepdim=True) / 3 if color == "M" else kernel[:, ["RGB".index(color)]]
        expected = expected + nn.functional.conv2d(image[:, [band]], weights, stride=14) * 3 / len(names)
    spread = spread_bands(model, names)
    assert spread is model and model.config.band_names == names and model.config.num_channels == len(names)
    torch.testing.assert_close(model.embeddings.patch_embeddings.projection(image), expected, atol=1e-5, rtol=0)
    model(image)  # checks the number of channels


def test_gray_images_give_tokens_of_rgb_model():
    """If three divides the number of bands, mean and standard deviation are spread as the weights are."""
    image = np.random.default_rng(0).integers(0, 256, (56, 56), dtype=np.uint8)
    spec = {"band_names": SENTINEL_2}
    of_three, of_twelve = tiny_vit(), spread_bands(tiny_vit(), SENTINEL_2)
    size = {"size": {"height": 56, "width": 56}, "return_tensors": "pt"}
    expected = of_three(**ViTPImageProcessor()(image, **size)).last_hidden_state
    tokens = of_twelve(**ViTPImageProcessor(input_spec=spec)(np.stack([image] * 12), **size)).last_hidden_state
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_adapter_stem_is_spread_or_drawn_for_bands():
    model = ViTPAdapter(adapter_config()).eval()
    image = torch.randn(1, 1, 64, 64)
    expected = model(image.expand(-1, 3, -1, -1)).feature_maps
    found = spread_bands(copy.deepcopy(model), SAR)(image.expand(-1, 2, -1, -1)).feature_maps
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    vit = tiny_vit(**VISION_16)
    fresh = ViTPAdapter.from_backbone(vit, band_names=SAR, deformable_heads=4, spatial_prior_channels=8)
    assert fresh.spatial_prior.stem[0].weight.shape == (8, 2, 3, 3) and fresh.config.band_names == SAR
    assert fresh(torch.zeros(1, 2, 64, 64)).feature_maps[0].shape == (1, 32, 16, 16)
    assert vit.config.num_channels == 3 and vit.embeddings.patch_embeddings.projection.weight.shape[1] == 3


def test_vit_of_vlm_is_spread_and_saved(tmp_path):
    settings = FROM_SCRATCH
    model, _ = build_model(build_tokenizer(["a"], 320), settings["vision_config"], settings["text_config"])
    spread_bands(model, SENTINEL_2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert config["band_names"] == SENTINEL_2 and config["num_channels"] == 12
    again = type(model).from_pretrained(tmp_path)
    assert again.get_image_features(torch.zeros(1, 12, 56, 56)).pooler_output.shape[1] == 4


def test_auto_classes_open_backbone_of_bands(tmp_path):
    model = spread_bands(tiny_vit(), SENTINEL_2)
    image_processor = ViTPImageProcessor(input_spec={"band_names": SENTINEL_2, "window": [0, 10000]})
    export_backbone(model, tmp_path, image_processor)
    array = np.random.default_rng(0).integers(0, 12000, (12, 60, 50), dtype=np.uint16)
    opened = AutoImageProcessor.from_pretrained(tmp_path)
    inputs = opened(array, return_tensors="pt")
    assert opened.band_names == SENTINEL_2 and inputs.pixel_values.shape == (1, 12, 56, 56)
    native, ours, maps = (
        opener.from_pretrained(tmp_path).eval() for opener in (AutoModel, ViTPVisionModel, ViTPBackbone)
    )
    tokens = model(**inputs).last_hidden_state
    assert type(native).__name__ == "InternVLVisionModel" and native.config.band_names == SENTINEL_2
    assert torch.equal(native(**inputs).last_hidden_state, tokens)
    assert torch.equal(ours(**inputs).last_hidden_state, tokens)
    features = maps(**inputs).feature_maps[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, tokens[:, 1:])


def test_auto_backbone_opens_pushed_backbone_of_bands(hub, logged_in, tmp_path):
    model = spread_bands(tiny_vit(), SAR)
    processor = ViTPImageProcessor(input_spec={"band_names": SAR, "window": [-25, 0]})
    assert push(export_backbone(model, tmp_path / "b", processor), "tester/radar", "--what", "backbone") == 0
    backbone = AutoBackbone.from_pretrained("tester/radar", trust_remote_code=True)
    opened = AutoImageProcessor.from_pretrained("tester/radar", trust_remote_code=True)
    assert backbone.config.band_names == opened.band_names == SAR
    image = np.random.default_rng(0).normal(-12, 4, (2, 56, 56)).astype(np.float32)
    inputs = opened(image, return_tensors="pt")
    tokens = model(**inputs).last_hidden_state[:, 1:]
    torch.testing.assert_close(backbone(**inputs).feature_maps[0].flatten(2).transpose(1, 2), tokens)


def test_spread_model_is_not_spread_again():
    model = spread_bands(tiny_vit(), SAR)
    kernel = model.embeddings.patch_embeddings.projection.weight
    assert spread_bands(model, SAR).embeddings.patch_embeddings.projection.weight is kernel


def brute_force(bands, windows, mean, std):
    """Window and normalize each band in float64; NaN is black."""
    out = []
    for band, (low, high), center, width in zip(bands.astype(np.float64), windows, mean, std, strict=True):
        unit = np.clip((np.nan_to_num(band, nan=low) - low) / (high - low), 0, 1)
        out.append((unit - center) / width)
    return np.stack(out)


@pytest.mark.parametrize("kind", ["reflectance", "SAR", "channels last", "file", "picked"])
def test_each_band_is_windowed_and_normalized(kind, tmp_path):
    rng, picked = np.random.default_rng(0), list(range(12))
    names, mean, std = SENTINEL_2, rng.uniform(0.1, 0.6, 12).tolist(), rng.uniform(0.1, 0.4, 12).tolist()
    windows = [[float(100 * band), 3000.0 + 500 * band] for band in range(12)]
    array = image = rng.integers(0, 12000, (12, 28, 35), dtype=np.uint16)
    if kind == "reflectance":
        windows = [[0.0, 1.0]] * 12
        array = image = rng.uniform(-0.2, 1.3, (12, 28, 35)).astype(np.float32)
    elif kind == "SAR":
        names, mean, std, windows = SAR, mean[:2], std[:2], [[-25.0, 0.0], [-32.5, -5.0]]
        array = image = rng.normal(-15, 8, (2, 28, 35)).astype(np.float32)
        image[rng.random(image.shape) < 0.1] = np.nan
    elif kind == "channels last":
        image = array.transpose(1, 2, 0)
    elif kind == "file":
        image = str(write_bands(tmp_path / "scene.tif", array))
    elif kind == "picked":
        picked = rng.permutation(12).tolist()
    spec = {"band_names": names, "window": windows} | ({"bands": picked} if kind == "picked" else {})
    expected = brute_force(array[picked] if names is SENTINEL_2 else array, windows, mean, std)
    for processor_class in (ViTPImageProcessor, ViTPSegmentationImageProcessor, ViTPDetectionImageProcessor):
        processor = processor_class(input_spec=spec, image_mean=mean, image_std=std)
        pixels = processor(image, size={"height": 28, "width": 35}, return_tensors="pt").pixel_values[0]
        np.testing.assert_allclose(pixels.numpy(), expected, atol=2e-5)


def test_image_of_bands_is_tiled():
    array = np.random.default_rng(0).integers(0, 10000, (12, 56, 112), dtype=np.uint16)
    processor = ViTPImageProcessor(
        input_spec={"band_names": SENTINEL_2, "window": [0, 10000]}, size={"height": 56, "width": 56}
    )
    tiles = processor(array, crop_to_patches=True, return_tensors="pt").pixel_values
    whole = processor(array, size={"height": 56, "width": 112}, return_tensors="pt").pixel_values[0]
    assert tiles.shape == (3, 12, 56, 56)
    assert torch.equal(torch.cat([tiles[0], tiles[1]], -1), whole)


def test_mean_and_std_follow_bands(tmp_path):
    processor = ViTPImageProcessor(input_spec={"band_names": SENTINEL_2})
    red, green, blue = ViTPImageProcessor().image_mean
    assert list(processor.image_mean) == [{"R": red, "G": green, "B": blue}[color] for color in COLORS["Sentinel-2"][1]]
    np.testing.assert_allclose(
        ViTPImageProcessor(input_spec={"band_names": SAR}).image_std, np.mean(ViTPImageProcessor().image_std)
    )
    ViTPImageProcessor(image_mean=[0.1, 0.2, 0.6], image_std=[1.0, 2.0, 3.0]).save_pretrained(tmp_path)
    spread = ViTPSegmentationImageProcessor.from_backbone(tmp_path, input_spec={"band_names": ["B02", "B03", "B04"]})
    assert list(spread.image_mean) == [0.6, 0.2, 0.1] and list(spread.image_std) == [3.0, 2.0, 1.0]
    spread.save_pretrained(tmp_path)
    again = ViTPSegmentationImageProcessor.from_backbone(tmp_path, input_spec={"window": [0, 9]})
    assert list(again.image_mean) == [0.6, 0.2, 0.1] and again.band_names == ["B02", "B03", "B04"]
    with pytest.raises(ValueError, match="3 bands"):
        ViTPSegmentationImageProcessor.from_backbone(tmp_path, input_spec={"band_names": SAR})


def test_spec_of_call_is_for_bands_of_processor():
    array = np.random.default_rng(0).integers(0, 200, (2, 20, 30), dtype=np.uint8)
    processor = ViTPSegmentationImageProcessor(input_spec={"band_names": SAR})
    windowed = ViTPSegmentationImageProcessor(input_spec={"band_names": SAR, "window": [10, 90]})
    pixels = processor(array, input_spec={"window": [10, 90]}, return_tensors="pt").pixel_values
    assert torch.equal(pixels, windowed(array, return_tensors="pt").pixel_values)


def test_wrong_number_of_bands_is_named_with_file(tmp_path):
    processor = ViTPImageProcessor(input_spec={"band_names": SENTINEL_2, "window": [0, 10000]})
    with pytest.raises(ValueError, match="12 bands"):
        processor(np.zeros((3, 20, 30), np.uint16))
    path = write_bands(tmp_path / "three.tif", np.zeros((3, 20, 30), np.uint8))
    with pytest.raises(ValueError, match=r"three\.tif.*12 bands"):
        processor(path)


def test_fourth_band_of_file_is_not_alpha(tmp_path):
    """GDAL marks the fourth of four 8-bit bands as alpha."""
    array = np.random.default_rng(0).integers(0, 255, (4, 20, 30), dtype=np.uint8)
    path = write_bands(tmp_path / "four.tif", array)
    with warnings.catch_warnings(), rasterio.open(path) as file:
        assert file.colorinterp[3].name == "alpha"
    processor = ViTPSegmentationImageProcessor(input_spec={"band_names": ["red", "green", "blue", "nir"]})
    read = processor(str(path), return_tensors="pt").pixel_values
    assert torch.equal(read, processor(array, return_tensors="pt").pixel_values)


KERNEL, POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = ViTPVisionModel(ViTPVisionConfig(**{**VISION, "image_size": [112, 112], "drop_path_rate": 0.1})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def bicubic(values: list[float], size: int) -> list[float]:
    """Resample a line by Keys' cubic (a = -0.75) in a loop, with aligned pixel centers and repeated borders."""
    a = -0.75

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    result = []
    for index in range(size):
        center = (index + 0.5) * len(values) / size - 0.5
        left = int(center // 1)
        taps = range(left - 1, left + 3)
        result.append(sum(weight(center - tap) * values[min(max(tap, 0), len(values) - 1)] for tap in taps))
    return result


def resampled(square: torch.Tensor, size: int) -> torch.Tensor:
    """Resample the rows and then the columns of a square."""
    rows = torch.tensor([bicubic(row, size) for row in square.double().tolist()], dtype=torch.float64)
    return torch.tensor([bicubic(column, size) for column in rows.T.tolist()], dtype=torch.float64).T


@pytest.mark.parametrize(("patch_size", "image_size"), [(16, 192), (8, 112)])
def test_kernel_and_grid_are_resampled_bicubically(backbone, patch_size, image_size):
    resized = resize_backbone(backbone, patch_size, image_size)
    before, after = backbone.state_dict(), resized.state_dict()
    assert after[KERNEL].shape == (32, 3, patch_size, patch_size)
    for output, channel in ((0, 0), (5, 2), (31, 1)):
        wanted = resampled(before[KERNEL][output, channel], patch_size)
        torch.testing.assert_close(after[KERNEL][output, channel].double(), wanted, atol=1e-5, rtol=0)
    side = image_size // patch_size
    assert after[POSITIONS].shape == (1, 1 + side * side, 32)
    assert torch.equal(after[POSITIONS][:, 0], before[POSITIONS][:, 0])
    for channel in (0, 17):
        wanted = resampled(before[POSITIONS][0, 1:, channel].view(8, 8), side)
        found = after[POSITIONS][0, 1:, channel].view(side, side).double()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert before.keys() == after.keys()
    for key in before.keys() - {KERNEL, POSITIONS}:
        assert torch.equal(before[key], after[key]), key


def test_half_precision_is_resampled_in_float32(backbone):
    dtype = torch.bfloat16
    half = backbone.to(dtype)
    resized = resize_backbone(half, 16, 192)
    assert {parameter.dtype for parameter in resized.parameters()} == {dtype}
    wanted = nn.functional.interpolate(half.state_dict()[KERNEL].float(), size=(16, 16), mode="bicubic")
    assert torch.equal(resized.state_dict()[KERNEL], wanted.to(dtype))


def test_resizing_keeps_class_and_original_model(backbone):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    resized = resize_backbone(backbone, 16, 128)
    assert type(resized) is ViTPVisionModel and type(resized.config) is ViTPVisionConfig
    assert (list(resized.config.patch_size), list(resized.config.image_size)) == ([16, 16], [128, 128])
    assert resized.config.drop_path_rate == 0.1
    assert not resized.training and backbone.train() and resize_backbone(backbone, 16, 128).training
    with torch.no_grad():
        resized.embeddings.cls_token.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert list(backbone.config.image_size) == [112, 112]


@torch.no_grad()
def test_resized_backbone_is_exported_and_opened(backbone, tmp_path):
    resized = resize_backbone(backbone, 16, 128)
    export_backbone(resized, tmp_path)
    native = AutoModel.from_pretrained(tmp_path)
    assert type(native) is InternVLVisionModel
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(native(pixels).last_hidden_state, resized.eval()(pixels).last_hidden_state)
    assert type(resize_backbone(native, 8, 64)) is InternVLVisionModel


def test_vit_without_position_embeddings_is_resized(backbone):
    model = InternVLVisionModel(InternVLVisionConfig(**VISION, use_absolute_position_embeddings=False))
    assert resize_backbone(model, 16, 128).embeddings.position_embeddings is None
