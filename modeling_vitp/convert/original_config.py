"""The configuration of InternVL's own code, and ours: what each says in its words about the same model."""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..configuration_vitp import ViTPConfig, ViTPVisionConfig
from .version_4 import rope_of_version_4

LANGUAGE_MODELS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
TEMPLATE = "internvl2_5"  # their name for the chat template that our processor writes
# Heads cannot be seen from the tensors; these are the ViTs that InternVL has published, by their width.
INTERN_VIT_HEADS = {1024: 16, 3200: 25}
NORM_TYPES = ("layer_norm", "rms_norm")
# ours -> theirs
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "attention_dropout": "attention_dropout",
    "drop_path_rate": "drop_path_rate",
    "initializer_range": "initializer_range",
    "layer_scale_init_value": "initializer_factor",
}
REQUIRED_VISION_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
REQUIRED_VISION_FIELDS += ("norm_type", "qkv_bias", "qk_normalization", "image_size", "patch_size")
# What their code assumes where a configuration does not say, and the only value that is the same model in ours.
CHAT_SETTINGS = {
    "ps_version": ("v1", "v2"),
    "select_layer": (-1, -1),
    "pad2square": (False, False),
    "use_backbone_lora": (0, 0),
    "use_llm_lora": (0, 0),
}


def refuse_differences(config: dict, settings: dict[str, tuple], what: str) -> None:
    for name, (default, needed) in settings.items():
        value = config.get(name, default)
        if value != needed:
            raise ValueError(f"{what} has {name}={value!r}, but only {needed!r} can be converted exactly.")


def vision_from_original(config: dict[str, Any]) -> ViTPVisionConfig:
    """InternViT's configuration in ours.

    Raises:
        ValueError: if a field is missing or says what our model cannot do.
    """
    missing = [name for name in REQUIRED_VISION_FIELDS if name not in config]
    if missing:
        raise ValueError(f"The configuration of the ViT lacks {missing}.")
    refuse_differences(config, {"dropout": (0.0, 0.0), "hidden_act": ("gelu", "gelu")}, "vision_config")
    if config["norm_type"] not in NORM_TYPES:
        raise ValueError(f"vision_config has norm_type={config['norm_type']!r}, but one of {NORM_TYPES} is needed.")
    if config["qk_normalization"] and config.get("layer_norm_eps", 1e-6) != 1e-6:
        raise ValueError(
            f"vision_config has QK norm with layer_norm_eps={config['layer_norm_eps']}, but transformers' has 1e-6."
        )
    fields = {ours: config[theirs] for ours, theirs in VISION_FIELDS.items() if theirs in config}
    return ViTPVisionConfig(**fields, image_size=config["image_size"], patch_size=config["patch_size"])


def vision_to_original(config: ViTPVisionConfig) -> dict[str, Any]:
    """Our ViT's configuration as InternViT's; see [`vision_from_original`] for what is refused."""
    settings = config.to_dict()
    needed = {"use_mask_token": False, "use_absolute_position_embeddings": True, "use_mean_pooling": True}
    needed |= {"hidden_dropout_prob": 0, "projection_dropout": 0, "hidden_act": "gelu"}
    refuse_differences(settings, {name: (None, value) for name, value in needed.items()}, "vision_config")
    if config.use_qk_norm and config.layer_norm_eps != 1e-6:
        raise ValueError(f"vision_config has QK norm, which the original code computes with {config.layer_norm_eps=}.")
    for name in ("image_size", "patch_size"):
        if len(set(settings[name])) != 1:
            raise ValueError(f"vision_config has {name}={list(settings[name])}, but the original code needs a square.")
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **{theirs: settings[ours] for ours, theirs in VISION_FIELDS.items()},
        "image_size": settings["image_size"][0],
        "patch_size": settings["patch_size"][0],
        "dropout": 0.0,
        "use_flash_attn": False,
    }


def chat_from_original(config: dict[str, Any]) -> ViTPConfig:
    """InternVL's configuration in ours. It does not name the image token, which stays the default.

    Raises:
        ValueError: if a field is missing or says what our model cannot do.
    """
    for name in ("vision_config", "llm_config"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"config.json has no {name}, but an original InternVL checkpoint needs it.")
    refuse_differences(config, CHAT_SETTINGS, "config.json")
    if config.get("dynamic_image_size", False):
        refuse_differences(config, {"use_thumbnail": (False, True)}, "config.json with dynamic_image_size")
    refuse_differences(config, {"template": (TEMPLATE, TEMPLATE)}, "config.json")
    vision_config, llm_config = config["vision_config"], config["llm_config"]
    if config.get("force_image_size") not in (None, vision_config.get("image_size")):
        raise ValueError(
            f"config.json has force_image_size={config['force_image_size']}, but position embeddings for "
            f"{vision_config.get('image_size')} pixels."
        )
    return ViTPConfig(
        vision_config=vision_from_original(vision_config),
        text_config=text_from_original(llm_config),
        downsample_ratio=config.get("downsample_ratio", 0.5),
    )


def chat_to_original(config: ViTPConfig, min_patches: int, max_patches: int) -> dict[str, Any]:
    """Our configuration as InternVL's own; see [`chat_from_original`] for what is refused."""
    needed = {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    refuse_differences(config.to_dict(), {name: (None, value) for name, value in needed.items()}, "config.json")
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        **{name: needed for name, (_, needed) in CHAT_SETTINGS.items()},
        "downsample_ratio": config.downsample_ratio,
        "template": TEMPLATE,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": min_patches,
        "max_dynamic_patch": max_patches,
        "force_image_size": config.vision_config.image_size[0],
        "hidden_size": config.text_config.hidden_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": vision_to_original(config.vision_config),
        "llm_config": {**text_to_original(config.text_config), "tie_word_embeddings": config.tie_word_embeddings},
    }


def text_from_original(config: dict[str, Any]) -> PreTrainedConfig:
    """The language model's configuration, without the fields that old transformers wrote for every model."""
    check_language_model(config.get("model_type"))
    config_class = type(AutoConfig.for_model(config["model_type"]))
    own = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    fields = {name: value for name, value in config.items() if name in own | {"rope_theta", "rope_scaling"}}
    return config_class(**copy.deepcopy({"tie_word_embeddings": False, **fields}))


def text_to_original(config: PreTrainedConfig) -> dict[str, Any]:
    """The language model's configuration as transformers wrote it before version 5."""
    check_language_model(config.model_type)
    fields = config.to_dict()
    for name in ("transformers_version", "dtype"):
        fields.pop(name, None)
    rope = rope_of_version_4(fields.pop("rope_parameters"))
    return {**fields, **rope, "architectures": [LANGUAGE_MODELS[config.model_type]]}


def check_language_model(model_type: str | None) -> None:
    if model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"The language model is of type {model_type!r}, but the original code and transformers have only "
            f"{', '.join(LANGUAGE_MODELS)} in common."
        )
