import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from from_scratch import build_model, build_tokenizer
from PIL import Image

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


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(["How many trees are there? There are 12 trees in the top left quarter."], vocab_size=400)


@pytest.fixture
def model_and_processor(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer, VISION, TEXT, {"max_patches": 6})


@pytest.fixture
def model(model_and_processor):
    return model_and_processor[0]


@pytest.fixture
def processor(model_and_processor):
    return model_and_processor[1]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random RGB image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
