"""Vision transformers within larger models of transformers, such as vision-language models."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .opening import read_config_fields
from .vision_towers import TOWERS


def vision_part(fields: dict[str, Any]) -> PreTrainedConfig | None:
    """Return the configuration of the ViT in a larger model, with the layers that the larger model uses.

    Args:
        fields: content of the config.json of the larger model.

    Returns:
        Configuration of any family, also of an unknown one. `None` if the model is not one of transformers with a
        `vision_config`. `None` too for a ViTP, whose ViT is exported with its license and the record of its training.
    """
    model_type = fields.get("model_type")
    if "vision_config" not in fields or model_type not in CONFIG_MAPPING or model_type == "vitp":
        return None
    config = CONFIG_MAPPING[model_type].from_dict(fields)
    vision_config = config.vision_config
    tower = TOWERS.get(vision_config.model_type)
    feature_layers = getattr(config, "vision_feature_layer", None)
    if tower is not None and feature_layers is not None:
        tower.set_depth(vision_config, num_used_layers(feature_layers, vision_config.num_hidden_layers))
    return vision_config


def cuts_images(name: str | Path, **hub_options) -> bool:
    """Return whether a folder or Hub id has a vision-language model, whose image processor cuts tiles or patches."""
    return read_config_fields(name, **hub_options).get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def num_used_layers(feature_layers: int | list[int], num_layers: int) -> int:
    """Return the number of layers up to the last one of `vision_feature_layer`, whose index 0 is the first input."""
    if isinstance(feature_layers, int):
        feature_layers = [feature_layers]
    return max(index % (num_layers + 1) for index in feature_layers)


def read_part(name: str | Path, config: PreTrainedConfig, **hub_options) -> dict[str, torch.Tensor]:
    """Read the weights of the ViT in a larger model, only from the files that hold them.

    Args:
        name: folder or Hub id of the larger model.
        config: configuration of the ViT, see [`vision_part`].
        hub_options: arguments of `from_pretrained`, such as `revision`.

    Returns:
        Weights by their names in the ViT. Layers that the larger model does not use are left out.

    Raises:
        OSError: if the weights are missing or not safetensors.
        ValueError: if the ViT is not found among the weights, or several are.
    """
    tower = TOWERS[config.model_type]
    files = weight_files(name, **hub_options)
    prefixes = [key.removesuffix(tower.patch_kernel) for key in files if key.endswith(f".{tower.patch_kernel}")]
    if len(prefixes) != 1:
        raise ValueError(
            f"{name}: expected the weights of one {config.model_type!r}, found {prefixes or 'none'} before "
            f"{tower.patch_kernel}."
        )
    prefix = prefixes[0]
    keys_by_file: dict[str, list[str]] = {}
    for key, file in files.items():
        layer = re.match(rf"{re.escape(prefix + tower.layers)}\.(\d+)\.", key)
        is_used = layer is None or int(layer[1]) < config.num_hidden_layers
        if key.startswith(prefix) and is_used and not key.removeprefix(prefix).startswith(tower.left_out):
            keys_by_file.setdefault(file, []).append(key)
    weights = {}
    for file, keys in keys_by_file.items():
        with safe_open(cached_file(name, file, **hub_options), "pt") as stored_weights:
            for key in keys:
                weights[key.removeprefix(prefix)] = stored_weights.get_tensor(key)
    return weights


def weight_files(name: str | Path, **hub_options) -> dict[str, str]:
    """Return the name of the safetensors file of each weight, from the index if there are several files."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_options)
    if index is not None:
        return json.loads(Path(index).read_text())["weight_map"]
    with safe_open(cached_file(name, SAFE_WEIGHTS_NAME, **hub_options), "pt") as stored_weights:
        return dict.fromkeys(stored_weights.keys(), SAFE_WEIGHTS_NAME)


def stated_license(name: str | Path, **hub_options) -> str | None:
    """Return the license that the card of a folder or Hub id states, `None` without one."""
    card = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False, **hub_options)
    metadata = {} if card is None else metadata_load(card) or {}
    return metadata.get("license_name") or metadata.get("license")
