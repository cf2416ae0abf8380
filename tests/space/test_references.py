"""Backbones of other libraries with their own processors, compared with plain transformers."""

import numpy as np
import pytest
import torch
from loading import RANDOM, TINY, Models
from maps import attention_heads, patch_features
from other_backbones import save_backbone
from pictures import picture
from transformers import (
    AutoModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
)
from vision_families import library_features, save_vit

from modeling_vitp import ViTPFeaturePyramid, ViTPImageProcessor
from modeling_vitp.images.pixels import principal_scores

KINDS = ("vit", "dinov2", "dinov3", "clip", "siglip", "vit_mae")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    torch.manual_seed(0)
    for kind in ("vit", "dinov2", "clip"):
        save_backbone(folder / kind, kind)
    tile = SMALL | {"image_size": 64, "patch_size": 16}
    DINOv3ViTModel(DINOv3ViTConfig(**tile, num_register_tokens=3)).save_pretrained(folder / "dinov3")
    SiglipVisionModel(SiglipVisionConfig(**tile)).save_pretrained(folder / "siglip")
    ViTMAEModel(ViTMAEConfig(**tile)).save_pretrained(folder / "vit_mae")
    processors = {"dinov3": ViTImageProcessor, "siglip": SiglipImageProcessor, "vit_mae": ViTImageProcessor}
    for kind, processor in processors.items():
        processor(size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD).save_pretrained(folder / kind)
    return folder, Models(TINY, [str(folder / kind) for kind in KINDS])


@pytest.mark.parametrize("kind", KINDS)
def test_reference_features_equal_transformers(models, kind):
    folder, models = models
    backbone = models.backbone(kind)
    image = np.asarray(picture(96, 64))
    encoder = AutoModel.from_pretrained(folder / kind, attn_implementation="eager").get_encoder(modality="image").eval()
    own = backbone.image_processor
    assert kind not in ("dinov3", "siglip") or (list(own.image_mean), list(own.image_std)) == (MEAN, STD)
    pixels = torch.from_numpy((image / 255 - own.image_mean) / own.image_std).movedim(-1, 0)[None].float()
    options = {} if kind == "dinov3" else {"interpolate_pos_encoding": True}
    if kind == "vit_mae":
        encoder.config.mask_ratio, options["noise"] = 0.0, torch.arange(24)[None]
    with torch.no_grad():
        outputs = encoder(pixels, output_hidden_states=True, output_attentions=True, **options)
    for layer, states in ((1, outputs.hidden_states[1]), (2, outputs.last_hidden_state)):
        expected = states[0, -24:].T.reshape(32, 4, 6)
        np.testing.assert_allclose(patch_features(backbone, image, 6, layer), expected, atol=1e-5)
    weights = outputs.attentions[1][0, 1, -24 + 8, -24:].reshape(4, 6)
    np.testing.assert_allclose(attention_heads(backbone, image, 6, 2, (1, 2))[1], weights, atol=1e-6)
    if kind == "siglip":
        with pytest.raises(ValueError, match="has no CLS token"):
            attention_heads(backbone, image, 6, 2)


def test_references_share_a_grid(models):
    _, models = models
    image = np.asarray(picture(96, 64))
    maps = [principal_scores(patch_features(models.backbone(kind), image, 12)) for kind in KINDS]
    assert {one.shape for one in maps} == {(3, 8, 12)}
    twin = models.backbone("dinov2" + RANDOM)
    assert twin.name == "dinov2" + RANDOM and type(twin.model) is type(models.backbone("dinov2").model)
    assert (patch_features(twin, image, 6) - patch_features(models.backbone("dinov2"), image, 6)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["siglip2_vision_model", "timm_wrapper"])
def test_vit_in_a_model_with_maps_is_shown(family, tmp_path):
    vit, is_timm, image = save_vit(tmp_path / "vit", family), family == "timm_wrapper", np.asarray(picture(96, 64))
    ViTPFeaturePyramid.from_backbone(tmp_path / "vit", pyramid_channels=8).save_pretrained(tmp_path / "maps")
    ViTPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path / "maps")
    models = Models(str(tmp_path / "maps"), [] if is_timm else [str(tmp_path / "vit")])
    for name in models.names:
        backbone = models.backbone(name)
        pixels = (image / 255 - backbone.image_processor.image_mean) / backbone.image_processor.image_std
        expected = library_features(vit, torch.from_numpy(pixels).movedim(-1, 0)[None].float())[0].T.reshape(32, 4, 6)
        np.testing.assert_allclose(patch_features(backbone, image, 6), expected, atol=1e-5)
        if is_timm:
            for compute in (patch_features, attention_heads):
                with pytest.raises(ValueError, match="of timm"):
                    compute(backbone, image, 6, 1)
        else:
            assert attention_heads(backbone, image, 6, 1, (1, 2)).shape == (2, 4, 6)
            assert patch_features(backbone, image, 6, 1).shape == (32, 4, 6)
