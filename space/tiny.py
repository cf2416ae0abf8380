"""Tiny model with random weights that the app opens if no other model is available."""

import torch

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.training.loading import build_model, build_tokenizer

VISION = {
    "image_size": [112, 112],
    "patch_size": [14, 14],
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "attention_bias": True,
    "layer_scale_init_value": 1.0,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(seed: int = 0) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a random model: a ViT of 3 layers for 112 pixels, a language model of 2 layers, and a byte tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(build_tokenizer([], vocab_size=0), VISION, TEXT, {"max_patches": 6})
