"""Tiny checkpoint in InternVL's original naming under our names, converted independently of the package."""

import json
import re

import torch
from paths import FIXTURES
from safetensors.torch import load_file

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration, ViTPVisionModel

FOLDER = FIXTURES / "internvl_tiny_original"
IMAGE_TOKEN_ID = 7

RENAMES = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^vision_model\.", "model.vision_tower."),
    (r"embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
]

PROJECTOR = ("layer_norm", "linear_1", "linear_2")
LAYER = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def renamed(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in original.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3)):
                state[key.replace(".attn.qkv.", f".attention.{name}_proj.")] = part
        else:
            state[key] = value
    return state


def as_original(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Convert a state dict of transformers to the names of the original code, layer by layer, and empty `state`."""
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    moves = {
        f"{tower}embeddings.cls_token": "vision_model.embeddings.class_embedding",
        f"{tower}embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
        f"{tower}embeddings.patch_embeddings.projection.weight": "vision_model.embeddings.patch_embedding.weight",
        f"{tower}embeddings.patch_embeddings.projection.bias": "vision_model.embeddings.patch_embedding.bias",
    }
    for kind in ("weight", "bias"):
        moves |= {f"{projector}{ours}.{kind}": f"mlp1.{index}.{kind}" for ours, index in zip(PROJECTOR, (0, 1, 3))}
    original = {}
    for index in range(num_layers):
        ours, theirs = f"{tower}encoder.layer.{index}.", f"vision_model.encoder.layers.{index}."
        for kind in ("weight", "bias"):
            fused = [state.pop(f"{ours}attention.{name}_proj.{kind}", None) for name in "qkv"]
            if fused[0] is not None:
                original[f"{theirs}attn.qkv.{kind}"] = torch.cat(fused)
            for name, other in LAYER.items():
                moves[f"{ours}{name}.{kind}"] = f"{theirs}{other}.{kind}"
        moves |= {f"{ours}lambda_{number}": f"{theirs}ls{number}" for number in (1, 2)}
    for name, other in moves.items():
        if name in state:
            original[other] = state.pop(name)
    for name in list(state):
        prefix = "language_model.lm_head." if name.startswith("lm_head.") else "language_model.model."
        original[prefix + name.removeprefix("lm_head.").removeprefix("model.language_model.")] = state.pop(name)
    return original


def original_config() -> ViTPConfig:
    config = json.loads((FOLDER / "config.json").read_text())
    vision, text = config["vision_config"], config["llm_config"]
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    return ViTPConfig(
        vision_config={
            **{name: vision[name] for name in (*same, "layer_norm_eps")},
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
        },
        text_config={
            **{name: text[name] for name in (*same, "num_key_value_heads", "vocab_size", "rms_norm_eps")},
            "model_type": "qwen2",
            "max_position_embeddings": text["max_position_embeddings"],
            "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_theta"]},
            "tie_word_embeddings": text["tie_word_embeddings"],
        },
        image_token_id=IMAGE_TOKEN_ID,
        downsample_ratio=config["downsample_ratio"],
    )


def original_model() -> ViTPForConditionalGeneration:
    model = ViTPForConditionalGeneration(original_config())
    model.load_state_dict(renamed(load_file(FOLDER / "model.safetensors")))
    return model.eval()


def original_vision_model() -> ViTPVisionModel:
    model = ViTPVisionModel(original_config().vision_config)
    model.load_state_dict(renamed(load_file(FOLDER / "vision_only.safetensors")))
    return model.eval()


def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")
