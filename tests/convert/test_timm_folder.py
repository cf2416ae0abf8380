import functools
import json
import sys

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from pictures import picture
from tiny_models import VISION, vivid_model
from torch import nn
from transformers import AutoModel, GotOcr2ImageProcessor

from modeling_vitp import (
    ViTPBackbone,
    ViTPImageProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    export_timm,
    resize_backbone,
    spread_bands,
)
from modeling_vitp.convert.timm_folder import ARCHITECTURE, timm_model_args, weights_in_layout
from modeling_vitp.recipes.export_backbone import main

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
SIZES = [(42, 42), (84, 56)]  # height, width; not those of the position embeddings


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Folder with a model in `full`, and its backbone for transformers and for timm."""
    folder = tmp_path_factory.mktemp("timm")
    model, processor = vivid_model(tokenizer)
    processor.image_processor.image_mean, processor.image_processor.image_std = MEAN, STD
    model.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    export_backbone(folder / "full", folder / "backbone")
    export_timm(folder / "full", folder / "timm")
    return folder


@pytest.fixture
def vit(folder):
    return ViTPVisionModel.from_pretrained(folder / "backbone").eval()


def vivid_vit(**settings) -> ViTPVisionModel:
    torch.manual_seed(0)
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION | settings)).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return vit


def open_timm(folder, **options) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def pixels_of(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def assert_same_features(folder, vit: ViTPVisionModel, pixels: torch.Tensor) -> None:
    model, expected = open_timm(folder), vit(pixels)
    assert_same(model.forward_features(pixels), expected.last_hidden_state)
    assert_same(model(pixels), expected.pooler_output)


@torch.no_grad()
def test_features_are_the_same(folder, vit, tmp_path):
    pixels = pixels_of(56, 56)
    assert_same_features(folder / "timm", vit, pixels)
    model = open_timm(folder / "timm", num_classes=5)
    assert model(pixels).shape == (2, 5)
    assert_same(model.forward_features(pixels), vit(pixels).last_hidden_state)
    image_processor = ViTPImageProcessor.from_pretrained(folder / "backbone")
    assert_same_files(export_timm(vit, tmp_path / "model", image_processor), folder / "timm")
    assert_same_files(export_timm(folder / "backbone", tmp_path / "backbone"), folder / "timm")


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_positions_of_other_sizes_are_antialiased(folder, vit, size, monkeypatch):
    pixels = pixels_of(*size)
    expected, found = vit(pixels).last_hidden_state, open_timm(folder / "timm").forward_features(pixels)
    assert 0 < (found - expected).std() < 0.2 * expected.std()  # positions of noise, which differ the most
    monkeypatch.setattr(nn.functional, "interpolate", functools.partial(nn.functional.interpolate, antialias=True))
    assert_same_features(folder / "timm", vit, pixels)


def test_resized_backbone_has_the_same_features(vit, tmp_path):
    resized = resize_backbone(vit, image_size=84)
    pixels = pixels_of(84, 84)
    assert_same(resized(pixels).last_hidden_state, vit(pixels).last_hidden_state)
    assert_same_features(export_timm(resized, tmp_path / "timm"), vit, pixels)


@pytest.mark.parametrize("size", [(56, 56), (50, 45)])
@torch.no_grad()
def test_features_only_gives_maps_of_backbone(folder, size):
    backbone = ViTPBackbone.from_pretrained(folder / "backbone", out_features=["stage1", "stage3"]).eval()
    model, pixels = open_timm(folder / "timm", features_only=True, out_indices=[0, 2]), pixels_of(*size)
    found, expected = model(pixels), backbone(pixels).feature_maps
    assert [maps.shape for maps in found] == [(2, 32, 4, 4)] * 2
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [14, 14]


def test_transform_equals_image_processor(folder):
    settings = timm.data.resolve_model_data_config(open_timm(folder / "timm"))
    assert settings == {
        "input_size": (3, 56, 56),
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    image_processor = GotOcr2ImageProcessor.from_pretrained(folder / "backbone")
    for size in ((80, 120), (30, 20)):
        found = timm.data.create_transform(**settings)(picture(*size))
        expected = image_processor(picture(*size), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(found, expected, atol=1.1 / 255 / min(STD), rtol=0)  # rounding of a gray level


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_type": "rms_norm"},
        {"attention_bias": False},
        {"hidden_size": 352, "intermediate_size": 480, "num_hidden_layers": 1},  # 352 * (480 / 352) < 480
        {"patch_size": [14, 28], "image_size": [56, 112]},
        {"layer_scale_init_value": 0.0},
    ],
)
def test_variant_has_the_same_features(settings, tmp_path):
    vit = vivid_vit(**settings)
    assert_same_features(export_timm(vit, tmp_path / "timm"), vit, pixels_of(*vit.config.image_size))


def test_other_bands_are_channels(folder, vit, tmp_path):
    names = ["B02", "B03", "B04", "B08"]
    image_processor = ViTPImageProcessor.from_pretrained(folder / "backbone")
    image_processor = image_processor.with_input_spec({"band_names": names, "window": [0, 10000]})
    radar = spread_bands(vit, names)
    with pytest.raises(ValueError, match="B02, B03, B04, B08"):
        export_timm(radar, tmp_path / "timm")
    export_timm(radar, tmp_path / "timm", image_processor)
    assert_same_features(tmp_path / "timm", radar, pixels_of(56, 56, channels=4))
    settings = timm.data.resolve_model_data_config(open_timm(tmp_path / "timm"))
    assert settings["input_size"] == (4, 56, 56) and settings["mean"][:3] == MEAN[::-1] and len(settings["std"]) == 4
    saved = ViTPImageProcessor.from_pretrained(tmp_path / "timm")
    assert saved.band_names == names and saved.size == {"height": 56, "width": 56}
    assert ViTPSegmentationImageProcessor.from_backbone(tmp_path / "timm").input_spec == saved.input_spec
    gray = open_timm(tmp_path / "timm", in_chans=1)
    assert_same(gray.patch_embed.proj.weight, radar.embeddings.patch_embeddings.projection.weight.sum(1, keepdim=True))


def test_setting_that_timm_lacks_is_named(tmp_path):
    for name, value in (
        ("use_qk_norm", True),
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "relu"),
        ("use_mean_pooling", False),
        ("use_mask_token", True),
        ("use_absolute_position_embeddings", False),
    ):
        with pytest.raises(ValueError, match=name):
            export_timm(vivid_vit(**{name: value}), tmp_path / "timm")
        assert not (tmp_path / "timm").exists()


def test_shape_of_internvit_is_that_of_the_entry():
    with torch.device("meta"):
        vit = ViTPVisionModel(ViTPVisionConfig(attention_bias=True))
        published = timm.create_model(ARCHITECTURE, num_classes=0, img_size=448)
        ours = timm.create_model(ARCHITECTURE, num_classes=0, **timm_model_args(vit.config))
    weights = weights_in_layout(vit, "timm")
    shapes = {name: tensor.shape for name, tensor in published.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


def assert_same_files(folder, other) -> None:
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_half_precision_is_kept(vit, tmp_path):
    export_backbone(vit.bfloat16(), tmp_path / "backbone")
    export_timm(tmp_path / "backbone", tmp_path / "timm")
    weights = timm.models.load_state_dict(tmp_path / "timm" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert_same_features(tmp_path / "timm", vit.float(), pixels_of(56, 56))


@torch.no_grad()
def test_transformers_opens_folder(folder, vit):
    outputs, expected = AutoModel.from_pretrained(folder / "timm").eval()(pixels_of(56, 56)), vit(pixels_of(56, 56))
    assert_same(outputs.last_hidden_state, expected.last_hidden_state)
    assert_same(outputs.pooler_output, expected.pooler_output)


def test_existing_export_is_replaced_and_other_folder_refused(folder, vit, tmp_path):
    export_timm(vivid_vit(), tmp_path / "timm")
    export_timm(folder / "full", tmp_path / "timm")
    assert_same_files(tmp_path / "timm", folder / "timm")
    for refused in (folder / "backbone", folder / "full"):
        with pytest.raises(ValueError, match=f"{refused.name} exists"):
            export_timm(vit, refused)
    with pytest.raises(ValueError, match="timm exists"):
        export_backbone(vit, tmp_path / "timm")


def test_weights_that_are_nan_are_refused(tmp_path):
    vit = vivid_vit()
    vit.embeddings.cls_token.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="cls_token"):
        export_timm(vit, tmp_path / "timm")
    assert export_timm(vit, tmp_path / "timm", allow_nan=True).is_dir()


def test_folder_is_written_without_timm(folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    export_timm(folder / "full", tmp_path / "timm")
    assert_same_files(tmp_path / "timm", folder / "timm")


def test_recipe_writes_card_whose_example_runs(folder, tmp_path, monkeypatch):
    (folder / "full" / "run.json").write_text(json.dumps({"licenses": {"org/start": {"license": "cc-by-nc-4.0"}}}))
    monkeypatch.chdir(tmp_path)
    assert main([str(folder / "full"), "my_timm", "--format", "timm"]) == 0
    card = ModelCard.load("my_timm/README.md")
    assert card.data.library_name == "timm" and card.data.license == "cc-by-nc-4.0"
    names = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert names["features"].shape == (1, 32)
