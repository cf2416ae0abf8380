import pytest
import torch
from tiny_models import VISION
from torch import nn
from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone, resize_backbone

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
    """One line resampled by Keys' cubic with a = -0.75, pixel centres aligned, borders repeated: written as a loop."""
    a = -0.75

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    result = []
    for index in range(size):
        centre = (index + 0.5) * len(values) / size - 0.5
        left = int(centre // 1)
        taps = range(left - 1, left + 3)
        result.append(sum(weight(centre - tap) * values[min(max(tap, 0), len(values) - 1)] for tap in taps))
    return result


def resampled(square: torch.Tensor, size: int) -> torch.Tensor:
    """A square of numbers, its rows and then its columns resampled."""
    rows = torch.tensor([bicubic(row, size) for row in square.double().tolist()], dtype=torch.float64)
    return torch.tensor([bicubic(column, size) for column in rows.T.tolist()], dtype=torch.float64).T


@pytest.mark.parametrize(("patch_size", "image_size"), [(16, 128), (16, 192), (8, 112), (14, 168)])
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


def test_the_dense_step_keeps_the_grid_bit_for_bit(backbone):
    resized = resize_backbone(backbone, patch_size=16, image_size=128)
    assert torch.equal(resized.embeddings.position_embeddings, backbone.embeddings.position_embeddings)


@torch.no_grad()
def test_a_resized_grid_is_what_the_model_interpolates_to_at_run_time(backbone):
    pixels = torch.randn(2, 3, 168, 168, generator=torch.Generator().manual_seed(1))
    resized = resize_backbone(backbone, image_size=168)
    torch.testing.assert_close(
        resized(pixels).last_hidden_state, backbone(pixels).last_hidden_state, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_other_aspect_ratios_are_interpolated_at_run_time(backbone):
    resized = resize_backbone(backbone, 16, 128).eval()
    pixels = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    grid = resized.embeddings.position_embeddings[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(6, 10), mode="bicubic", align_corners=False)
    patches = nn.functional.conv2d(
        pixels, resized.state_dict()[KERNEL], resized.embeddings.patch_embeddings.projection.bias, stride=16
    )
    states = (patches + grid).flatten(2).transpose(1, 2)
    cls_state = resized.embeddings.cls_token + resized.embeddings.position_embeddings[:, :1]
    wanted = resized.encoder(torch.cat([cls_state, states], 1)).last_hidden_state
    found = resized(pixels).last_hidden_state
    assert found.shape == (1, 61, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resampled_in_float32_and_stays_half(backbone, dtype):
    half = backbone.to(dtype)
    resized = resize_backbone(half, 16, 192)
    assert {parameter.dtype for parameter in resized.parameters()} == {dtype}
    wanted = nn.functional.interpolate(half.state_dict()[KERNEL].float(), size=(16, 16), mode="bicubic")
    assert torch.equal(resized.state_dict()[KERNEL], wanted.to(dtype))


def test_class_configuration_and_the_model_itself_are_kept(backbone):
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
def test_it_is_exported_and_opened_at_the_new_size(backbone, tmp_path):
    resized = resize_backbone(backbone, 16, 128)
    export_backbone(resized, tmp_path)
    native = AutoModel.from_pretrained(tmp_path)
    assert type(native) is InternVLVisionModel
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(native(pixels).last_hidden_state, resized.eval()(pixels).last_hidden_state)
    assert type(resize_backbone(native, 8, 64)) is InternVLVisionModel


def test_a_ViT_without_position_embeddings(backbone):
    model = InternVLVisionModel(InternVLVisionConfig(**VISION, use_absolute_position_embeddings=False))
    assert resize_backbone(model, 16, 128).embeddings.position_embeddings is None
