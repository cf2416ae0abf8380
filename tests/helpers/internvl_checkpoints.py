"""Checkpoints of InternVL in each naming scheme, with independently listed names."""

import json
from pathlib import Path

import original_checkpoint
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, VISION, vivid
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

FIXTURE = original_checkpoint.FOLDER
# The names in each kind of checkpoint; {} is the number of a layer.
LANGUAGE_MODEL = """
model.embed_tokens.weight
model.norm.weight
model.layers.{}.input_layernorm.weight
model.layers.{}.post_attention_layernorm.weight
model.layers.{}.self_attn.q_proj.weight
model.layers.{}.self_attn.q_proj.bias
model.layers.{}.self_attn.k_proj.weight
model.layers.{}.self_attn.k_proj.bias
model.layers.{}.self_attn.v_proj.weight
model.layers.{}.self_attn.v_proj.bias
model.layers.{}.self_attn.o_proj.weight
model.layers.{}.mlp.gate_proj.weight
model.layers.{}.mlp.up_proj.weight
model.layers.{}.mlp.down_proj.weight
lm_head.weight
"""
BACKBONE = """
embeddings.cls_token
embeddings.position_embeddings
embeddings.patch_embeddings.projection.weight
embeddings.patch_embeddings.projection.bias
encoder.layer.{}.lambda_1
encoder.layer.{}.lambda_2
encoder.layer.{}.layernorm_before.weight
encoder.layer.{}.layernorm_before.bias
encoder.layer.{}.layernorm_after.weight
encoder.layer.{}.layernorm_after.bias
encoder.layer.{}.attention.q_proj.weight
encoder.layer.{}.attention.q_proj.bias
encoder.layer.{}.attention.k_proj.weight
encoder.layer.{}.attention.k_proj.bias
encoder.layer.{}.attention.v_proj.weight
encoder.layer.{}.attention.v_proj.bias
encoder.layer.{}.attention.projection_layer.weight
encoder.layer.{}.attention.projection_layer.bias
encoder.layer.{}.mlp.fc1.weight
encoder.layer.{}.mlp.fc1.bias
encoder.layer.{}.mlp.fc2.weight
encoder.layer.{}.mlp.fc2.bias
"""
ORIGINAL_VISION = """
embeddings.class_embedding
embeddings.position_embedding
embeddings.patch_embedding.weight
embeddings.patch_embedding.bias
encoder.layers.{}.ls1
encoder.layers.{}.ls2
encoder.layers.{}.norm1.weight
encoder.layers.{}.norm1.bias
encoder.layers.{}.norm2.weight
encoder.layers.{}.norm2.bias
encoder.layers.{}.attn.qkv.weight
encoder.layers.{}.attn.qkv.bias
encoder.layers.{}.attn.proj.weight
encoder.layers.{}.attn.proj.bias
encoder.layers.{}.mlp.fc1.weight
encoder.layers.{}.mlp.fc1.bias
encoder.layers.{}.mlp.fc2.weight
encoder.layers.{}.mlp.fc2.bias
"""
PROJECTOR = ["layer_norm.weight", "layer_norm.bias", "linear_1.weight", "linear_1.bias"]
PROJECTOR += ["linear_2.weight", "linear_2.bias"]
MLP1 = ["mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight", "mlp1.1.bias", "mlp1.3.weight", "mlp1.3.bias"]


def names(template: str, num_layers: int, prefix: str = "") -> set[str]:
    return {prefix + line.format(index) for line in template.split() for index in range(num_layers)}


def expected_keys(kind: str, vision_layers: int = 3, text_layers: int = 2) -> set[str]:
    """Return the keys of the fixture's architecture: QKV bias, LayerNorm, no QK norm, Qwen2 with an untied head."""
    language_model = names(LANGUAGE_MODEL, text_layers)
    if kind == "backbone":
        return names(BACKBONE, vision_layers)
    if kind == "original_vision":
        return names(ORIGINAL_VISION, vision_layers)
    if kind == "original":
        keys = names(ORIGINAL_VISION, vision_layers, "vision_model.") | set(MLP1)
        return keys | {f"language_model.{key}" for key in language_model}
    if kind == "internvl":
        keys = names(BACKBONE, vision_layers, "vision_tower.") | {f"multi_modal_projector.{key}" for key in PROJECTOR}
        return keys | {f"language_model.{key}" for key in language_model}
    keys = names(BACKBONE, vision_layers, "model.vision_tower.")
    keys |= {f"model.multi_modal_projector.{key}" for key in PROJECTOR} | {"lm_head.weight"}
    return keys | {f"model.language_model.{key.removeprefix('model.')}" for key in language_model - {"lm_head.weight"}}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a folder and check that no name is repeated."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not weights.keys() & part.keys()
        weights |= part
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert all(key in safe_open(folder / name, "pt").keys() for key, name in weight_map.items())
        assert weight_map.keys() == weights.keys()
    return weights


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def native_model(
    vision: dict | None = None,
    text: dict | None = None,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    vocab_size: int = 320,
    image_token_id: int = 5,
) -> InternVLForConditionalGeneration:
    """Build the model of transformers with random weights."""
    text_config = {**TEXT, "tie_word_embeddings": tied, "vocab_size": vocab_size, **(text or {})}
    text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
    config = InternVLConfig(
        vision_config={**VISION, **(vision or {})},
        text_config=text_config.to_dict(),
        image_token_id=image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return vivid(InternVLForConditionalGeneration(config)).to(dtype)


def save_original(model: InternVLForConditionalGeneration, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Save a checkpoint in the original format, with the adapted configuration of the fixture."""
    vision, text = model.config.vision_config, model.config.text_config
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    state = original_checkpoint.as_original(state, vision.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(state, folder, max_shard_size)
    config = json.loads((FIXTURE / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "qkv_bias": vision.attention_bias,
        "qk_normalization": vision.use_qk_norm,
        "norm_type": vision.norm_type,
    }
    same = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
    config["llm_config"] |= {name: getattr(text, name) for name in same}
    config["llm_config"]["rope_theta"] = text.rope_parameters["rope_theta"]
    config |= {"force_image_size": vision.image_size[0], "hidden_size": text.hidden_size}
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_shards(state: dict[str, torch.Tensor], folder: Path, max_shard_size: str = "5GB") -> None:
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, **changes) -> None:
    """Set fields of a JSON file, and remove those that are `None`."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
