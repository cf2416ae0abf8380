"""InternVL of transformers with the weights of our model, and VRL as an attention mask."""

import math

import torch
from tiny_models import TEXT, VISION
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from modeling_vitp import ViTPForConditionalGeneration


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set weights of order one, so that every part of the model affects its outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "lambda_" in name or (weight.ndim == 1 and name.endswith("weight")):
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1 or "position_embeddings" in name or "cls_token" in name:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
    return model


def build_native(model: ViTPForConditionalGeneration) -> InternVLForConditionalGeneration:
    """Build InternVL of transformers with the weights of `model`."""
    config = InternVLConfig(
        vision_config=VISION,
        text_config={**TEXT, "vocab_size": model.config.text_config.vocab_size},
        image_token_id=model.config.image_token_id,
        tie_word_embeddings=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    native = InternVLForConditionalGeneration(config).eval()
    native.load_state_dict(model.state_dict())
    return native


def blocked_mask(mask: torch.Tensor, survives: torch.Tensor) -> torch.Tensor:
    """Return an additive 4-D causal mask that hides padding and dropped keys."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (mask.bool() & survives)[:, None, :]
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)
