"""transformers' own one-stage detectors on ViTP's adapter: no code of ours beyond the backbone."""

import pytest
import torch
from tiny_models import VISION_16
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from modeling_vitp import ViTPAdapter, ViTPVisionConfig, ViTPVisionModel

DETR = {"d_model": 32, "num_queries": 10, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 2}
HYBRID = {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
DETECTORS = {
    RTDetrV2ForObjectDetection: RTDetrV2Config(**DETR, **HYBRID),
    DFineForObjectDetection: DFineConfig(**DETR, **HYBRID),
    DeformableDetrForObjectDetection: DeformableDetrConfig(**DETR, encoder_layers=1),
}


@pytest.mark.parametrize("model_class", DETECTORS, ids=lambda model_class: model_class.__name__)
def test_detectors_of_transformers_train_on_the_adapter_and_open_again(model_class, tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**VISION_16))
    small = {"deformable_heads": 4, "spatial_prior_channels": 8}
    adapter = ViTPAdapter.from_backbone(vision, out_features=["stride8", "stride16", "stride32"], **small)
    config = type(DETECTORS[model_class]).from_dict(DETECTORS[model_class].to_dict() | {"backbone_config": None})
    config.backbone_config = adapter.config
    model = model_class(config)
    model.model.backbone.model.load_state_dict(adapter.state_dict())

    images = torch.randn(2, 3, 64, 64)
    objects = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]]),
    }
    loss = model(images, labels=[objects] * 2).loss
    loss.backward()
    backbone = model.model.backbone.model
    assert loss.isfinite() and backbone.encoder.layer[0].mlp.fc1.weight.grad.abs().sum() > 0
    gate = backbone.interactions[0].injector.gate
    assert torch.equal(gate, adapter.interactions[0].injector.gate) and gate.grad.isfinite().all()

    model.eval().save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is model_class and isinstance(again.model.backbone.model, ViTPAdapter)
    with torch.no_grad():
        torch.testing.assert_close(again(images).pred_boxes, model(images).pred_boxes)
