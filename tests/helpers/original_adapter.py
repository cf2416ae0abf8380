"""Tiny ViT-Adapters of the original code under our names, converted independently of the package."""

import re
from pathlib import Path

import torch
from paths import FIXTURES
from safetensors.torch import load_file

FOLDER = FIXTURES / "vit_adapter_tiny_original"
MMCV_FOLDER = FIXTURES / "vit_adapter_mmcv_tiny_original"  # computed with mmcv's deformable attention
RENAMED = [
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^layers\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.projection_layer."),
    (r"^layers\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^layers\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^layers\.(\d+)\.ls", r"encoder.layer.\1.lambda_"),
    (r"^layers\.", "encoder.layer."),
    (r"^spm\.stem\.", "spatial_prior.stem."),
    (r"^spm\.conv(\d)\.", lambda match: f"spatial_prior.stages.{int(match[1]) - 2}."),
    (r"^spm\.fc(\d)\.", lambda match: f"spatial_prior.projections.{int(match[1]) - 1}."),
    (r"\.extractor\.", ".extractors.0."),
    (r"\.extra_extractors\.(\d)\.", lambda match: f".extractors.{int(match[1]) + 1}."),
    (r"^(interactions.*)\.attn\.", r"\1.attention."),
    (r"\.feat_norm\.", ".feature_norm."),
    (r"\.ffn_norm\.", ".feed_forward_norm."),
    (r"\.ffn\.dwconv\.dwconv\.", ".feed_forward.depthwise."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.gamma$", ".gate"),
    (r"^level_embed$", "level_embeddings"),
    (r"^up\.", "upsample."),
    (r"^norm(\d)\.", lambda match: f"norms.{int(match[1]) - 1}."),
]


def original_weights(folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """Load the original checkpoint under our names."""
    weights = {}
    for name, tensor in load_file(folder / "adapter.safetensors").items():
        fused = re.fullmatch(r"layers\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if fused:
            for letter, part in zip("qkv", tensor.chunk(3)):
                weights[f"encoder.layer.{fused[1]}.attention.{letter}_proj.{fused[2]}"] = part
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    return weights
