"""Settings of tiny models, and models with weights that differ from the initialization."""

import torch
from torch import nn

from modeling_vitp import ViTPAdapterConfig
from modeling_vitp.pretraining.loading import build_model

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": [56, 56],
    "patch_size": [14, 14],
    "attention_bias": True,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKENS_PER_TILE = 4  # (56 / 14 / 2) ** 2
FROM_SCRATCH = {"vision_config": VISION, "text_config": TEXT, "vocab_size": 320, "image_processor": {"max_patches": 2}}

VISION_16 = {**VISION, "num_hidden_layers": 4, "image_size": [64, 64], "patch_size": [16, 16]}
HEAD = {"hidden_size": 16, "auxiliary_channels": 16, "num_labels": 3}


def adapter_config() -> ViTPAdapterConfig:
    return ViTPAdapterConfig(**VISION_16, deformable_heads=4, spatial_prior_channels=8)


def vivid(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set random weights, including norms and layer scales, that are large enough to change the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model.eval()


def vivid_model(tokenizer, **vision):
    """Build a model with weights of order one and drop path, and its processor."""
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, {**VISION, "drop_path_rate": 0.2, **vision}, TEXT, {"max_patches": 6})
    return vivid(model, seed=1), processor
