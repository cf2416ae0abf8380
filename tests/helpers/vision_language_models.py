"""Tiny random vision-language models of transformers, as published models lie in folders."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)
from vision_families import MEAN, MLP, QWEN3_VL, SHAPE, SIZE, STD

CLIP = {"model_type": "clip_vision_model", **SHAPE, **MLP, **SIZE}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **SHAPE, **MLP, **SIZE}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"intermediate_size": 24, "vocab_size": 50, "pad_token_id": 0}
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MERGED = {"image_token_id": 5, "scale_factor": 2}
# By name: model class, configuration, image processor, path of the ViT, and path of the module that takes its features.
VLMS = {
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(vision_config=CLIP, text_config=LLAMA),
        CLIPImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "llava_next": (
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(vision_config=CLIP, text_config=LLAMA, image_grid_pinpoints=[[64, 64]]),
        LlavaNextImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "llava_onevision": (
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(vision_config=SIGLIP, text_config=QWEN2, image_grid_pinpoints=[[64, 64]]),
        LlavaOnevisionImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "paligemma": (
        PaliGemmaForConditionalGeneration,
        PaliGemmaConfig(vision_config=SIGLIP, text_config={"model_type": "gemma", **TEXT}, projection_dim=16),
        SiglipImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(vision_config=SIGLIP, text_config={"model_type": "gemma3_text", **TEXT}, mm_tokens_per_image=4),
        Gemma3ImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "idefics3": (
        Idefics3ForConditionalGeneration,
        Idefics3Config(vision_config=SHAPE | MLP | SIZE, text_config=LLAMA, **MERGED),
        Idefics3ImageProcessor,
        "model.vision_model",
        "model.connector",
    ),
    "smolvlm": (
        SmolVLMForConditionalGeneration,
        SmolVLMConfig(vision_config=SHAPE | MLP | SIZE, text_config=LLAMA, **MERGED),
        SmolVLMImageProcessor,
        "model.vision_model",
        "model.connector",
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(vision_config=QWEN3_VL, text_config=TEXT | {"rope_parameters": MROPE}),
        Qwen2VLImageProcessor,
        "model.visual",
        "model.visual.merger",
    ),
    "internvl": (
        InternVLForConditionalGeneration,
        InternVLConfig(vision_config={**SHAPE, **MLP, "image_size": [64, 64], "patch_size": [16, 16]},
                       text_config=QWEN2, image_seq_length=4),
        GotOcr2ImageProcessor,
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
}  # fmt: skip


def save_vlm(folder: Path, name: str, max_shard_size: str = "50GB", license: str | None = "gemma") -> PreTrainedModel:
    """Write a random vision-language model with its image processor and its card, and return it."""
    model_class, config, processor_class, *_ = VLMS[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.05)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor_class(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    if license is not None:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n\nA model.\n")
    return model


def save_unknown(folder: Path) -> None:
    """Write a vision-language model whose ViT is of no family of this package."""
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 16}
    text = {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": MROPE}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
