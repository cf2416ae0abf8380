"""Feature maps at four strides: ViT-Adapter and feature pyramid."""

import json

import pytest
import torch
from original_adapter import FOLDER, MMCV_FOLDER, original_weights
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_vitp import (
    ViTPAdapter,
    ViTPAdapterConfig,
    ViTPFeaturePyramid,
    ViTPFeaturePyramidConfig,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.modeling_vitp_adapter import DeformableAttention, to_maps

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "attention_bias": True,
    "image_size": [96, 96],
    "patch_size": [16, 16],
}
ADAPTER = {"deformable_heads": 4, "spatial_prior_channels": 8}
BOTH = pytest.mark.parametrize("kind", ["adapter", "pyramid"])


MMCV = {"deformable_ratio": 1.0, "extractor_residual": "normed_tokens", "deformable_dropout": 0.1}


def make_model(kind):
    torch.manual_seed(0)
    if kind == "adapter":
        return ViTPAdapter(ViTPAdapterConfig(**TINY, **ADAPTER)).eval()
    model = ViTPFeaturePyramid(ViTPFeaturePyramidConfig(**TINY, pyramid_channels=24)).eval()
    with torch.no_grad():  # including the norms
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@BOTH
@pytest.mark.parametrize("size", [(96, 96), (70, 45), (1, 200)])
@torch.no_grad()
def test_images_of_any_size_are_padded_and_maps_cropped(kind, size):
    model, image = make_model(kind), torch.randn(2, 3, *size)
    padded = F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))
    for stride, maps, whole in zip((4, 8, 16, 32), model(image).feature_maps, model(padded).feature_maps, strict=True):
        height, width = -(-size[0] // stride), -(-size[1] // stride)
        assert maps.shape == (2, model.channels[0], height, width)
        assert torch.equal(maps, whole[:, :, :height, :width])


@BOTH
def test_gradients_reach_every_parameter(kind):
    model, images = make_model(kind).train(), torch.randn(2, 3, 64, 64)
    weights = [torch.randn_like(features) for features in model(images).feature_maps]

    def gradients():
        model.zero_grad()
        sum((features * weight).sum() for features, weight in zip(model(images).feature_maps, weights)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    with torch.no_grad():  # zero weights of the offsets would give zero gradients
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain = gradients()
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    unused = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert unused == (["embeddings.cls_token"] if kind == "adapter" else [])
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@BOTH
@torch.no_grad()
def test_bfloat16_is_close_to_float32(kind):
    model, images = make_model(kind), torch.randn(1, 3, 96, 96)
    expected = model(images).feature_maps
    for low, high in zip(model.to(torch.bfloat16)(images).feature_maps, expected, strict=True):
        assert low.dtype == torch.bfloat16
        assert (low - high).abs().mean() < 0.03 * high.abs().mean()


# Adapter


@pytest.mark.parametrize(("folder", "more"), [(FOLDER, {}), (MMCV_FOLDER, MMCV)], ids=["native", "mmcv"])
@torch.no_grad()
def test_adapter_maps_equal_original_code(folder, more):
    adapter = ViTPAdapter(ViTPAdapterConfig(**TINY, **ADAPTER, **more)).eval()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["interaction_indexes"] == adapter.config.interaction_layers
    loaded = adapter.load_state_dict(original_weights(folder), strict=False)
    # The original drops the CLS token before the ViT, and its checkpoint has none.
    assert loaded.missing_keys == ["embeddings.cls_token"]
    assert loaded.unexpected_keys == []
    expected = load_file(folder / "expected.safetensors")
    maps = adapter(expected["pixel_values"]).feature_maps
    for stride, features in zip((4, 8, 16, 32), maps, strict=True):
        torch.testing.assert_close(features, expected[f"map_stride_{stride}"], rtol=0, atol=1e-5)


def test_deformable_dropout_drops_share_in_training():
    torch.manual_seed(0)
    adapter = ViTPAdapter(ViTPAdapterConfig(**TINY, **ADAPTER, deformable_dropout=0.25))
    attention = adapter.interactions[0].extractors[0].attention
    queries, features = torch.randn(1, 9, 32), torch.randn(1, 2000, 32)
    shapes, points = [(40, 50)], torch.rand(9, 2)
    expected = attention.eval()(queries, points, features, shapes)
    assert torch.equal(attention(queries, points, features, shapes), expected)
    dropped = attention.train()(queries, points, features, shapes)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], expected[kept] / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5


def bilinear(grid: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Return a map's value (channels, height, width) at a point in cells, 0 outside, by a loop over four corners."""
    total = grid.new_zeros(grid.shape[0])
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < grid.shape[1] and 0 <= column < grid.shape[2]:
                total = total + grid[:, row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def randomized(attention: DeformableAttention) -> DeformableAttention:
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


@torch.no_grad()
def test_deformable_attention_equals_loop():
    """Compare with the sum over heads m of W_m sum over levels l and points k of A_mlk W'_m x_l(p + offset_mlk)."""
    torch.manual_seed(0)
    config = ViTPAdapterConfig(**TINY, **ADAPTER)
    attention = randomized(DeformableAttention(config, num_levels=3)).double()
    shapes = [(6, 4), (3, 2), (2, 1)]
    queries = torch.randn(2, 5, 32, dtype=torch.float64)
    features = torch.randn(2, sum(h * w for h, w in shapes), 32, dtype=torch.float64)
    points = torch.rand(5, 2, dtype=torch.float64)
    actual = attention(queries, points, features, shapes)

    heads, levels, samples, width = 4, 3, 4, 2
    for image in range(2):
        values = to_maps(attention.value_proj(features[image : image + 1]), shapes)
        for index, query in enumerate(queries[image]):
            offsets = attention.sampling_offsets(query).reshape(heads, levels, samples, 2)
            weights = attention.attention_weights(query).reshape(heads, levels * samples).softmax(-1)
            joined = []
            for head in range(heads):
                total = torch.zeros(width, dtype=torch.float64)
                for level, (height, columns) in enumerate(shapes):
                    grid = values[level][0, head * width : (head + 1) * width]
                    for sample in range(samples):
                        x = float(points[index, 0] * columns + offsets[head, level, sample, 0]) - 0.5
                        y = float(points[index, 1] * height + offsets[head, level, sample, 1]) - 0.5
                        total += weights[head, level * samples + sample] * bilinear(grid, x, y)
                joined.append(total)
            torch.testing.assert_close(actual[image, index], attention.output_proj(torch.cat(joined)))


def test_adapter_starts_from_backbone_as_in_paper(tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**TINY))
    export_backbone(vision, tmp_path / "backbone")
    adapter, report = ViTPAdapter.from_pretrained(tmp_path / "backbone", **ADAPTER, output_loading_info=True)
    assert not report["unexpected_keys"]
    ours = adapter.state_dict()
    for name, tensor in vision.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert {name.split(".")[0] for name in report["missing_keys"]} == {
        "spatial_prior",
        "interactions",
        "level_embeddings",
        "upsample",
        "norms",
    }
    for interaction in adapter.interactions:
        assert torch.all(interaction.injector.gate == 0.1)
        assert torch.all(interaction.injector.attention.sampling_offsets.weight == 0)
    # Four heads look right, down, left and up, one to four cells away.
    offsets = adapter.interactions[0].extractors[0].attention.sampling_offsets.bias.reshape(4, 4, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(offsets, directions[:, None] * torch.arange(1, 5)[:, None], atol=1e-6, rtol=0)

    adapter.save_pretrained(tmp_path / "adapter")
    again = ViTPAdapter.from_pretrained(tmp_path / "adapter")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())


def test_default_interactions_are_those_of_paper():
    config = ViTPAdapterConfig(num_hidden_layers=24, patch_size=[16, 16])
    assert config.interaction_layers == [[0, 7], [8, 11], [12, 15], [16, 23]]


@pytest.mark.parametrize("stages", [["stride4", "stride32"], ["stride16"]])
def test_unused_maps_update_no_statistics(stages):
    settings = {**TINY, **ADAPTER, "spatial_prior_norm": "batch_norm", "out_features": stages}
    model = ViTPAdapter(ViTPAdapterConfig(**settings)).train()
    maps = model(torch.randn(2, 3, 40, 64)).feature_maps
    strides = [int(stage.removeprefix("stride")) for stage in stages]
    assert [tuple(features.shape[-2:]) for features in maps] == [(-(-40 // s), -(-64 // s)) for s in strides]
    seen = [norm.num_batches_tracked.item() for norm in model.norms]
    assert seen == [int(stage in stages) for stage in model.stage_names]


# Feature pyramid


def test_layers_of_skipped_maps_are_frozen():
    settings = {**TINY, "pyramid_channels": 8, "out_features": ["stride8", "stride16"]}
    pyramid = ViTPFeaturePyramid(ViTPFeaturePyramidConfig(**settings))
    frozen = {name.split(".")[1] for name, weight in pyramid.named_parameters() if not weight.requires_grad}
    assert frozen == {"0", "3"}


def vision_of(pyramid: ViTPFeaturePyramid) -> ViTPVisionModel:
    vision = ViTPVisionModel(ViTPVisionConfig(**TINY)).eval()
    vision.load_state_dict({key: value for key, value in pyramid.state_dict().items() if "pyramid" not in key})
    return vision


def channel_norm(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centered = maps - maps.mean(1, keepdim=True)
    scaled = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * weight[:, None, None] + bias[:, None, None]


@torch.no_grad()
def test_pyramid_equals_plain_torch():
    pyramid = make_model("pyramid")
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


def test_pyramid_starts_from_backbone(tmp_path):
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
