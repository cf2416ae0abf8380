import pytest
import torch
from tiny_models import VISION

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPForChangeDetection,
    ViTPForObjectDetection,
    ViTPForSemanticSegmentation,
)
from modeling_vitp.training.freezing import layer_decay_groups

LAYERS = 4
SETTINGS = {
    ViTPForSemanticSegmentation: {"hidden_size": 16, "auxiliary_channels": 16},
    ViTPForChangeDetection: {"hidden_size": 16, "auxiliary_channels": 16},
    ViTPForObjectDetection: {"neck_channels": 16, "head_hidden_size": 16},
}


@pytest.fixture(params=SETTINGS, ids=["segmentation", "change", "detection"])
def model(request):
    backbone = ViTPAdapterConfig(
        **{**VISION, "num_hidden_layers": LAYERS, "image_size": [64, 64], "patch_size": [16, 16]},
        deformable_heads=4,
        spatial_prior_channels=8,
    )
    settings = SETTINGS[request.param] | {"num_labels": 2}
    return request.param(request.param.config_class(backbone_config=backbone, **settings))


def test_every_parameter_is_in_one_group_with_the_rate_computed_by_hand(model):
    groups = layer_decay_groups(model, learning_rate=2.0, weight_decay=0.3, layer_decay=0.5, num_layers=LAYERS)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    # 2 * 0.5 ** (4 - i) for layer i, once more for the embeddings, and 2 for the adapter and the heads.
    rates = {
        "backbone.embeddings.": 0.0625,
        "backbone.encoder.layer.0.": 0.125,
        "backbone.encoder.layer.1.": 0.25,
        "backbone.encoder.layer.2.": 0.5,
        "backbone.encoder.layer.3.": 1.0,
    }
    trained = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found, name
            continue
        trained += 1
        group = found[id(parameter)]
        assert group["lr"] == next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 2.0), name
        without = name.endswith((".bias", "position_embeddings", "gate", "lambda_1", "lambda_2")) or "norm" in name
        without = without or parameter.ndim == 1
        assert group["weight_decay"] == (0.0 if without else 0.3), name
    assert trained == len(found)
    assert {group["lr"] for group in groups} == {*rates.values(), 2.0}


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_the_releases_two_differences_are_options(model, at_input, positions):
    groups = layer_decay_groups(model, 2.0, 0.3, 0.5, LAYERS, at_input, positions)
    plain = layer_decay_groups(model, 2.0, 0.3, 0.5, LAYERS)
    found, before = (
        {id(p): (group["lr"], group["weight_decay"]) for group in some for p in group["params"]}
        for some in (groups, plain)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changed = {names[key]: value for key, value in found.items() if before[key] != value}
    expected = {"backbone.level_embeddings": (0.0625, 0.3)} if at_input else {}
    expected |= {"backbone.embeddings.position_embeddings": (0.0625, 0.3)} if positions else {}
    assert found.keys() == before.keys() and changed == expected


def test_an_optimizer_moves_each_group_by_its_own_rate(model):
    groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.0, layer_decay=0.5, num_layers=LAYERS)
    optimizer = torch.optim.SGD(groups)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter).mean().item() for name, parameter in model.named_parameters()}
    assert moved["backbone.embeddings.patch_embeddings.projection.weight"] == pytest.approx(0.5**5, rel=1e-4)
    assert moved["backbone.encoder.layer.2.mlp.fc1.weight"] == pytest.approx(0.25, rel=1e-4)
    head = next(name for name in moved if name.startswith(("decode_head.", "box_heads.")) and name.endswith("weight"))
    assert moved[head] == pytest.approx(1.0, rel=1e-4)
    assert moved["backbone.embeddings.cls_token"] == 0


def test_without_decay_there_is_one_rate(model):
    groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=1.0, num_layers=LAYERS)
    assert {group["lr"] for group in groups} == {1.0}
