"""The interpolation of a ViT before and after a training: exact ends, a straight line, and two different ViTs."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from modeling_vitp.pretraining.interpolation import interpolate_vit

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def random_vit(seed: int, num_hidden_layers: int = 2) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(**SHAPE, num_hidden_layers=num_hidden_layers)
    return Dinov2Model(config)


def test_weights_lie_on_the_line_with_exact_ends(tmp_path):
    start = random_vit(0)
    trained = random_vit(1)
    trained.save_pretrained(tmp_path / "trained")
    for share in (0, 0.25, 1):
        vit = interpolate_vit(start, tmp_path / "trained", share)
        for name, weight in vit.state_dict().items():
            before = start.state_dict()[name]
            after = trained.state_dict()[name]
            expected = before + share * (after - before)
            if share in (0, 1):
                expected = after if share else before
                assert torch.equal(weight, expected), name
            else:
                torch.testing.assert_close(weight, expected)
    assert torch.equal(trained.layernorm.weight, random_vit(1).layernorm.weight)


def test_different_vits_are_refused():
    with pytest.raises(ValueError, match="encoder.layer.1"):
        interpolate_vit(random_vit(0, num_hidden_layers=1), random_vit(0), 0.5)
    with pytest.raises(ValueError, match="share"):
        interpolate_vit(random_vit(0), random_vit(1), 1.5)
