"""Tiny backbones of several model types."""

import dense_data
import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from modeling_vitp import ViTPImageProcessor, export_backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SQUARE = {"size": {"height": 64, "width": 64}}


def save_backbone(folder, kind: str, input_spec: dict | None = None):
    """Build a tiny random backbone of 64 pixels and patches of 16, with its image processor."""
    torch.manual_seed(0)
    tile = {"image_size": 64, "patch_size": 16}
    cropped = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    if kind == "vitp":
        export_backbone(dense_data.tiny_backbone(), folder, ViTPImageProcessor(input_spec=input_spec))
        return folder
    if kind == "vit":
        model, processor = ViTModel(ViTConfig(**SMALL, **tile)), ViTImageProcessor(**SQUARE)
    elif kind == "dinov2":
        config = Dinov2WithRegistersConfig(**SMALL, **tile, num_register_tokens=3)
        model, processor = Dinov2WithRegistersModel(config), BitImageProcessor(**cropped)
    elif kind == "clip":
        config = CLIPConfig(vision_config=SMALL | tile, text_config=SMALL | {"vocab_size": 50})
        model, processor = CLIPModel(config), CLIPImageProcessor(**cropped)
    elif kind == "swin":
        config = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
        model, processor = SwinModel(config), ViTImageProcessor(**SQUARE)
    elif kind == "convnext":
        config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
        model, processor = ConvNextModel(config), ConvNextImageProcessor(size={"shortest_edge": 64})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
