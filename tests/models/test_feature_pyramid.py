import pytest
import torch
from torch.nn import functional as F
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from modeling_vitp import (
    ViTPFeaturePyramid,
    ViTPFeaturePyramidConfig,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "attention_bias": True,
    "image_size": [96, 96],
    "patch_size": [16, 16],
}


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    model = ViTPFeaturePyramid(ViTPFeaturePyramidConfig(**TINY, pyramid_channels=24)).eval()
    with torch.no_grad():  # norms included
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vision_of(pyramid: ViTPFeaturePyramid) -> ViTPVisionModel:
    vision = ViTPVisionModel(ViTPVisionConfig(**TINY)).eval()
    vision.load_state_dict({key: value for key, value in pyramid.state_dict().items() if "pyramid" not in key})
    return vision


def channel_norm(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = maps - maps.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * weight[:, None, None] + bias[:, None, None]


@torch.no_grad()
def test_maps_equal_plain_torch_on_the_vision_models_last_features(pyramid):
    images = torch.randn(2, 3, 64, 96)
    features = vision_of(pyramid)(images).last_hidden_state[:, 1:].reshape(2, 4, 6, 32).permute(0, 3, 1, 2)
    weights = {name.removeprefix("pyramid."): weight for name, weight in pyramid.state_dict().items()}

    def layer(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    stride4 = F.conv_transpose2d(features, *layer("0.0"), stride=2)
    stride4 = F.conv_transpose2d(F.gelu(channel_norm(stride4, *layer("0.1"))), *layer("0.3"), stride=2)
    stride8 = F.conv_transpose2d(features, *layer("1.0"), stride=2)
    stride32 = features.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5))
    starts = {"0.4": stride4, "1.1": stride8, "2.0": features, "3.1": stride32}
    for (start, maps), actual in zip(starts.items(), pyramid(images).feature_maps, strict=True):
        level, index = map(int, start.split("."))
        maps = F.conv2d(maps, weights[f"{level}.{index}.weight"])
        maps = channel_norm(maps, *layer(f"{level}.{index + 1}"))
        maps = F.conv2d(maps, weights[f"{level}.{index + 2}.weight"], padding=1)
        torch.testing.assert_close(actual, channel_norm(maps, *layer(f"{level}.{index + 3}")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(96, 96), (70, 45), (1, 200)])
@torch.no_grad()
def test_images_of_any_size_are_padded_and_the_maps_cropped_back(pyramid, size):
    image = torch.randn(2, 3, *size)
    padded = F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))
    maps = zip((4, 8, 16, 32), pyramid(image).feature_maps, pyramid(padded).feature_maps, strict=True)
    for stride, features, whole in maps:
        height, width = -(-size[0] // stride), -(-size[1] // stride)
        assert features.shape == (2, 24, height, width)
        assert torch.equal(features, whole[:, :, :height, :width])


def test_an_exported_backbone_is_a_start(tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**TINY))
    export_backbone(vision, tmp_path / "backbone")
    pyramid = ViTPFeaturePyramid.from_backbone(tmp_path / "backbone", pyramid_channels=16, drop_path_rate=0.2)
    assert pyramid.channels == [16] * 4
    assert pyramid.encoder.layer[-1].drop_path.drop_prob == 0.2
    ours = pyramid.state_dict()
    for name, tensor in vision.state_dict().items():
        assert torch.equal(ours[name], tensor), name

    pyramid.save_pretrained(tmp_path / "pyramid")
    again = ViTPFeaturePyramid.from_backbone(tmp_path / "pyramid", out_features=["stride8", "stride32"]).eval()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    maps = pyramid.eval()(images).feature_maps
    for features, index in zip(again(images).feature_maps, (1, 3), strict=True):
        assert torch.equal(features, maps[index])


def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(pyramid):
    pyramid.train()
    images = torch.randn(2, 3, 64, 64)
    weights = [torch.randn_like(features) for features in pyramid(images).feature_maps]

    def gradients():
        pyramid.zero_grad()
        sum((features * weight).sum() for features, weight in zip(pyramid(images).feature_maps, weights)).backward()
        return {name: parameter.grad.clone() for name, parameter in pyramid.named_parameters()}

    plain = gradients()
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    pyramid.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@torch.no_grad()
def test_bfloat16_is_close_to_float32(pyramid):
    images = torch.randn(1, 3, 96, 96)
    expected = pyramid(images).feature_maps
    actual = pyramid.to(torch.bfloat16)(images).feature_maps
    for low, high in zip(actual, expected, strict=True):
        assert low.dtype == torch.bfloat16
        assert (low - high).abs().mean() < 0.03 * high.abs().mean()


@torch.no_grad()
def test_the_pyramid_is_a_backbone_of_transformers_own_upernet(pyramid):
    assert isinstance(AutoBackbone.from_config(pyramid.config), ViTPFeaturePyramid)
    config = UperNetConfig(backbone_config=pyramid.config, hidden_size=16, num_labels=3, use_auxiliary_head=False)
    assert UperNetForSemanticSegmentation(config).eval()(torch.randn(1, 3, 64, 64)).logits.shape == (1, 3, 64, 64)
