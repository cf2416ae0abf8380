"""Initial distributions of the adapter and of the decode heads against their formulas."""

import math
import re

import pytest
import torch
from tiny_models import adapter_config

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationConfig

WIDTH = 32  # of the ViT
STEM = 8  # channels of the first convolutions
CHANNELS = 64  # of the heads

# Standard deviation of the weights whose names match a pattern. Convolutions have sqrt(2 / fan-out) with the outputs of
# one group, as in the ViT-Adapter and in mmsegmentation.
DEVIATIONS = {
    r"backbone\.spatial_prior\.stem\.[036]": math.sqrt(2 / (9 * STEM)),
    r"backbone\.spatial_prior\.projections\.\d": math.sqrt(2 / WIDTH),
    r"backbone\.interactions\..*\.depthwise": math.sqrt(2 / 9),
    r"backbone\.interactions\..*\.fc[12]": 0.02,
    r"backbone\.upsample": math.sqrt(2 / (4 * WIDTH)),
    r"decode_head\.psp_modules\..*\.conv": math.sqrt(2 / CHANNELS),
    r"decode_head\.lateral_convs\.\d\.conv": math.sqrt(2 / CHANNELS),
    r"decode_head\.(fpn_convs\.\d|bottleneck|fpn_bottleneck)\.conv": math.sqrt(2 / (9 * CHANNELS)),
    r"decode_head\.classifier": 0.01,
    r"auxiliary_head\.convs\.\d\.conv": math.sqrt(2 / (9 * CHANNELS)),
    r"auxiliary_head\.classifier": 0.01,
}


@pytest.fixture(scope="module")
def model() -> ViTPForSemanticSegmentation:
    torch.manual_seed(0)
    sizes = {"hidden_size": CHANNELS, "auxiliary_channels": CHANNELS, "num_labels": 5}
    return ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **sizes))


@pytest.mark.parametrize("pattern", DEVIATIONS)
def test_weights_have_the_deviation_of_their_formula(model, pattern):
    """The standard deviation of n normal weights deviates by 1 / sqrt(2 n) of its value, and five times are allowed."""
    weights = []
    for name, parameter in model.named_parameters():
        if re.fullmatch(rf"{pattern}\.weight", name):
            weights.append(parameter.detach().flatten())
        elif re.fullmatch(rf"{pattern}\.bias", name):
            assert (parameter == 0).all(), name
    weights = torch.cat(weights)
    expected = DEVIATIONS[pattern]
    assert weights.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * len(weights)))
    assert abs(weights.mean().item()) < 5 * expected / math.sqrt(len(weights))
