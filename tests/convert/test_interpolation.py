"""The interpolation of a ViT before and after a training: exact ends, a straight line, and two different ViTs."""

import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from modeling_vitp import ViTPVisionModel, export_backbone
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.convert.interpolation import interpolate_vit
from modeling_vitp.modeling_vitp_backbone import resize_backbone
from modeling_vitp.recipes.export_backbone import main

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def random_vit(seed: int, num_hidden_layers: int = 2) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(**SHAPE, num_hidden_layers=num_hidden_layers)
    return Dinov2Model(config)


def test_weights_lie_on_the_line_with_exact_ends(tmp_path):
    start = random_vit(0)
    trained = random_vit(1)
    trained.save_pretrained(tmp_path / "trained")
    for alpha in (0, 0.25, 1):
        vit = interpolate_vit(start, tmp_path / "trained", alpha)
        for name, weight in vit.state_dict().items():
            before = start.state_dict()[name]
            after = trained.state_dict()[name]
            expected = before + alpha * (after - before)
            if alpha in (0, 1):
                expected = after if alpha else before
                assert torch.equal(weight, expected), name
            else:
                torch.testing.assert_close(weight, expected)
    assert torch.equal(trained.layernorm.weight, random_vit(1).layernorm.weight)


def test_start_is_resized_to_the_trained_vit():
    start = random_vit(0)
    trained = resize_backbone(random_vit(1), image_size=28)
    vit = interpolate_vit(start, trained, 0)
    expected = resize_backbone(start, image_size=28)
    for name, weight in vit.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_export_between_start_and_checkpoint(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    start = ViTPVisionModel(model.config.vision_config)
    start.save_pretrained(tmp_path / "start")
    words = [str(tmp_path / "run"), str(tmp_path / "between"), "--start", str(tmp_path / "start")]
    assert main([*words, "--interpolation_alpha", "0.25"]) == 0
    vit = AutoModel.from_pretrained(tmp_path / "between")
    trained = model.model.vision_tower.state_dict()
    for name, weight in vit.state_dict().items():
        expected = 0.75 * start.state_dict()[name] + 0.25 * trained[name]
        torch.testing.assert_close(weight, expected)
    with pytest.raises(WrongArguments, match="start"):
        main([*words[:2], "--interpolation_alpha", "0.25"])


def test_alpha_needs_the_start(model_and_processor, tmp_path):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match="start"):
        export_backbone(model, tmp_path / "out", processor.image_processor, interpolation_alpha=0.5)
    assert not (tmp_path / "out").exists()


def test_different_vits_are_refused():
    with pytest.raises(ValueError, match="encoder.layer.1"):
        interpolate_vit(random_vit(0, num_hidden_layers=1), random_vit(0), 0.5)
    with pytest.raises(ValueError, match="alpha"):
        interpolate_vit(random_vit(0), random_vit(1), 1.5)
