"""`from_pretrained` with errors that name the damaged or missing file."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

CONFIG_FILES = ("config.json",)
MODEL_FILES = (*CONFIG_FILES, "generation_config.json", "*.index.json", "*.safetensors")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
# Arguments of timm's vision transformers and feature extractors. Others of `timm.create_model` name weights to open.
TIMM_ARGUMENTS = """
    act_layer attn_drop_rate attn_layer class_token depth drop_path_rate drop_rate dynamic_img_pad dynamic_img_size
    embed_dim embed_norm_layer fc_norm features_only final_norm fix_init global_pool img_size in_chans inference_mode
    init_values mlp_ratio no_embed_class norm_layer num_classes num_heads out_indices patch_drop_rate patch_size
    pool_include_prefix pos_drop_rate pos_embed pre_norm proj_bias proj_drop_rate qk_norm qkv_bias ref_feat_shape
    reg_tokens scale_attn_norm scale_mlp_norm use_post_transformer_norm weight_init
""".split()


class NamesItsFiles:
    """Mixin for models, configurations and processors whose `from_pretrained` names the file in its errors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load the object from a folder or Hub id, as in transformers.

        Raises:
            ValueError: if a file is damaged, or its content does not fit the class.
            OSError: if a file is missing, or the Hub cannot be reached.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        with naming(pretrained_model_name_or_path, cls):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class ConfigNamesItsFiles(NamesItsFiles):
    """Mixin for configurations, which also checks that config.json is complete."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read config.json. Unlike transformers, do not replace missing parts by the defaults of a large model.

        Raises:
            OSError: if config.json is missing or empty.
            ValueError: if a part's configuration is missing.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or an empty one.")
        check_fields(f"{pretrained_model_name_or_path}/config.json", fields, cls.sub_configs_defaults)
        return fields, kwargs


def check_fields(file: str, fields: dict, parts: Iterable[str] = ()) -> None:
    """Raise a `ValueError` if a part is missing, which transformers would replace by that of a large model.

    Sources of weights are errors too, see [`check_timm`].
    """
    check_timm(file, fields)
    missing_parts = []
    for name in parts:
        if not isinstance(fields.get(name), dict):
            missing_parts.append(name)
    if missing_parts:
        raise ValueError(f"{file} has no {' and no '.join(missing_parts)}.")
    vision_config = fields.get("vision_config")
    if isinstance(vision_config, dict) and "hidden_size" not in vision_config:
        raise ValueError(f"{file} has a vision_config without hidden_size.")


def check_timm(file: str, fields: Any) -> None:
    """Raise a `ValueError` if a configuration names an address, a repository or a file for timm to open.

    Args:
        file: name of the configuration for the message.
        fields: configuration, or a value of one.
    """
    if isinstance(fields, list):
        for value in fields:
            check_timm(file, value)
    if not isinstance(fields, dict):
        return
    for key in ("architecture", "backbone"):
        architecture = fields.get(key)
        if isinstance(architecture, str) and ":" in architecture:
            raise ValueError(f"{file}: expected {key} to be a name of timm's registry, got {architecture!r}.")
    for name in fields.get("model_args") or ():
        if name not in TIMM_ARGUMENTS:
            raise ValueError(f"{file}: model_args must describe the shape of a model of timm. Remove {name!r}.")
    for value in fields.values():
        check_timm(file, value)


def way_to_vit(name: str | Path, fields: dict) -> str:
    """Return a sentence for an error message that tells how to load the ViT of a model of another type.

    Args:
        name: folder or Hub id of the model.
        fields: content of its config.json.
    """
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or ["AutoModel"]
    model = f"{architectures[0]}.from_pretrained('{name}')"
    backbone_config = fields.get("backbone_config") or {}
    backbone_type = backbone_config.get("model_type")
    if model_type in ("vitp_vision", "vitp_backbone", "internvl_vision"):
        return f"It is a ViT alone: load it with from_backbone('{name}')."
    if model_type in ("vitp_adapter", "vitp_feature_pyramid"):
        if fields.get("vit_config"):
            return f"Load its ViT with {model}.vit."
        return f"Load its ViT with ViTPVisionModel.from_pretrained('{name}')."
    if backbone_type == "vitp_vision" or model_type == "vitp_image_classification":
        return f"Load its ViT with {model}.backbone."
    if backbone_type in ("vitp_adapter", "vitp_feature_pyramid"):
        vit = "ViTPVisionModel.from_pretrained('FOLDER') loads its ViT"
        if backbone_config.get("vit_config"):
            vit = f"{model}.backbone.vit is its ViT"
        return (
            f"Save its backbone with {model}.backbone.save_pretrained('FOLDER'): from_backbone('FOLDER') loads it with "
            f"its neck, and {vit}."
        )
    if model_type == "vitp":
        return f"Export its ViT with `vitp export_backbone {name} FOLDER`, and load FOLDER."
    return f"If it contains an InternViT, export that with `vitp convert {name} FOLDER --to backbone`."


@contextmanager
def naming(name: str | Path, cls: type) -> Iterator[None]:
    """Convert the libraries' errors about a checkpoint's contents into a `ValueError` that names the file.

    Args:
        name: folder or Hub id that is opened in the block.
        cls: class of the object that is loaded.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # not caused by a file
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        is_named = str(name) in str(error)
        if type(error) is ValueError and is_named:
            raise
        if torch.get_default_device().type == "meta":  # not supported by transformers for any checkpoint
            raise
        patterns = file_patterns(cls)
        damage_report = damage(Path(name), dict.fromkeys((*patterns, *CONFIG_FILES)))
        if damage_report is not None:
            raise ValueError(damage_report) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError):
            if not Path(name).exists():
                message = f"{name}: folder not found, and it cannot be loaded from the Hub: {reason}"
                raise OSError(message) from error
            if is_named:
                raise
        files = f"{name}/{patterns[0]}" if len(patterns) == 1 else f"{name} ({', '.join(patterns)})"
        if "ignore_mismatched_sizes" in reason:
            reason = "the tensors' shapes differ from those of config.json and the settings, see the report above."
        raise ValueError(f"{files} cannot be opened: {reason}") from error


def read_config_fields(name: str | Path, **kwargs) -> dict:
    """Return the content of the config.json of a folder or Hub id, see [`check_timm`]. An error names the file.

    Args:
        kwargs: arguments of `from_pretrained`, such as `revision`.
    """
    with naming(name, PreTrainedConfig):
        fields, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        check_timm(f"{name}/config.json", fields)
        return fields


def open_config(name: str | Path, **kwargs) -> PreTrainedConfig:
    """Return the configuration of a folder or Hub id by its model type, checked as by [`read_config_fields`]."""
    read_config_fields(name, **kwargs)
    with naming(name, PreTrainedConfig):
        return without_remote_code(AutoConfig.from_pretrained, name, **kwargs)


def without_remote_code(from_pretrained: Callable[..., Any], name: str | Path, *args, **kwargs) -> Any:
    """Call a `from_pretrained` of transformers, which runs code of a repository only with `trust_remote_code=True`.

    Without the argument, transformers would ask on the terminal, and any input in a pipe could answer.

    Raises:
        ValueError: if the code is needed, and the argument is not set.
    """
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    try:
        return from_pretrained(name, *args, **kwargs)
    except ValueError as error:
        if kwargs["trust_remote_code"] or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} needs the Python code of its repository, which is not run here. If you trust it, run it in Python "
            "by transformers' `from_pretrained` with `trust_remote_code=True`."
        ) from error


def file_patterns(cls: type) -> tuple[str, ...]:
    """Return the file patterns of a saved object of a class."""
    if issubclass(cls, PreTrainedConfig):
        return CONFIG_FILES
    return MODEL_FILES if issubclass(cls, PreTrainedModel) else PROCESSOR_FILES


def damage(folder: Path, patterns: Iterable[str]) -> str | None:
    """Return a message about the first file of a folder that cannot be read, or `None`."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            try:
                read_checkpoint_file(path)
            except (OSError, ValueError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                return f"{path} cannot be read: it is damaged or cut short ({reason})."
    return None


def read_checkpoint_file(path: Path) -> None:
    """Read a file of a checkpoint according to its name; of a weights file only the header."""
    if path.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # of this class itself
            raise ValueError(error) from error
    elif path.suffix == ".json":
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {fields!r:.40}")
        if path.name.endswith(".index.json"):
            check_index(path, fields.get("weight_map"))
    elif path.suffix == ".jinja":
        path.read_text(encoding="utf-8")
    elif path.suffix == ".safetensors":
        with path.open("rb"), safe_open(path, "pt"):
            pass


def check_index(index: Path, weight_map: object) -> None:
    """Raise a `ValueError` if the index of a checkpoint's shards has no file names, or a named file is missing."""
    if not isinstance(weight_map, dict):
        raise ValueError("expected a `weight_map` with file names")
    missing_shards = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if not index.with_name(name).is_file():
            missing_shards.append(name)
    if missing_shards:
        raise ValueError(f"missing shards: {', '.join(missing_shards)}")
