"""Opening what was saved: whatever is wrong with a file of it is an error of one kind, which names the file."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_FILES = ("config.json",)
MODEL_FILES = (*CONFIG_FILES, "generation_config.json", "*.index.json", "*.safetensors")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
PROCESSOR_FILES += ("chat_template.jinja",)
MOST_LAYERS = 1000


class NamesItsFiles:
    """`from_pretrained` with errors that name the file, for models, configurations and processors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: if a file is damaged, or what it says is not what the class can be made of.
            OSError: if a file is missing, or the Hub cannot be reached.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        with naming(pretrained_model_name_or_path, cls):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class ConfigNamesItsFiles(NamesItsFiles):
    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As in transformers, which takes the defaults, those of a large model, for whatever is missing.

        Raises:
            OSError: if there is no config.json.
            ValueError: if it lacks the configuration of a part of the model, or has one of absurdly many layers.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or nothing in it.")
        check_fields(f"{pretrained_model_name_or_path}/config.json", fields, cls.sub_configs_defaults)
        return fields, kwargs


def check_fields(file: str, fields: dict, parts: Iterable[str] = ()) -> None:
    """Raises a `ValueError` if a configuration lacks one of its parts, for which the library takes those of a large
    model, or would be built until memory ends."""
    missing = [name for name in parts if not isinstance(fields.get(name), dict)]
    if missing:
        raise ValueError(f"{file} has no {' and no '.join(missing)}.")
    vision_config = fields.get("vision_config")
    if isinstance(vision_config, dict) and "hidden_size" not in vision_config:
        raise ValueError(f"{file} has a vision_config without hidden_size.")
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        depth = part.get("num_hidden_layers")
        if isinstance(depth, int) and depth > MOST_LAYERS:
            raise ValueError(f"{file} has num_hidden_layers={depth}, and no model has more than {MOST_LAYERS}.")


def way_to_vit(name: str | Path, fields: dict) -> str:
    """How the ViT of a model is had, a sentence of an error about a folder or Hub id of another kind than is expected.

    Args:
        fields: of its config.json.
    """
    found = fields.get("model_type")
    model = f"{(fields.get('architectures') or ['AutoModel'])[0]}.from_pretrained('{name}')"
    backbone = (fields.get("backbone_config") or {}).get("model_type")
    if found in ("vitp_vision", "vitp_backbone", "internvl_vision"):
        return f"It is a ViT alone, which from_backbone('{name}') takes."
    if found in ("vitp_adapter", "vitp_feature_pyramid"):
        return f"Its ViT is ViTPVisionModel.from_pretrained('{name}')."
    if backbone == "vitp_vision":
        return f"Its ViT is {model}.backbone."
    if backbone in ("vitp_adapter", "vitp_feature_pyramid"):
        return (
            f"Save its backbone, {model}.backbone.save_pretrained('FOLDER'): from_backbone takes FOLDER with its neck, "
            "and its ViT is ViTPVisionModel.from_pretrained('FOLDER')."
        )
    if found == "vitp":
        return f"Take its ViT out, `vitp export_backbone {name} FOLDER`, and open FOLDER."
    return f"A ViT of InternVL's is taken out with `vitp convert {name} FOLDER --to backbone`."


@contextmanager
def naming(name: str | Path, cls: type) -> Iterator[None]:
    """Turns what the libraries raise about the contents of a checkpoint into a `ValueError` that names the file.

    Args:
        name: folder or Hub id that is opened in the block.
        cls: what is made of it.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # which no file is to blame for
        raise
    except Exception as error:  # tokenizers raises no narrower one
        if torch.get_default_device().type == "meta":  # which transformers refuses, whatever the files
            raise
        patterns = file_patterns(cls)
        is_named = str(name) in str(error)
        if type(error) is ValueError and is_named:
            raise
        found = damage(Path(name), patterns)
        if patterns is PROCESSOR_FILES and Path(name).is_dir() and not holds(Path(name), patterns):
            found = f"{name} has no processor: none of {', '.join(patterns)} is there."
        if found is None and isinstance(error, OSError) and (is_named or not Path(name).exists()):
            raise
        files = f"{name}/{patterns[0]}" if len(patterns) == 1 else f"{name} ({', '.join(patterns)})"
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "tensors have other shapes than config.json asks for, see the report above."
        raise ValueError(found or f"{files} cannot be opened: {reason}") from error


def file_patterns(cls: type) -> tuple[str, ...]:
    """The files, as patterns, that an object of a class is made of."""
    if issubclass(cls, PreTrainedConfig):
        return CONFIG_FILES
    return MODEL_FILES if issubclass(cls, PreTrainedModel) else PROCESSOR_FILES


def holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a folder has a file of one of these names."""
    return any(any(folder.glob(pattern)) for pattern in patterns)


def damage(folder: Path, patterns: tuple[str, ...]) -> str | None:
    """What is wrong with the first of a folder's files that cannot be read by itself, in one line, or `None`."""
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        try:
            read_checkpoint_file(path)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            return f"{path} cannot be read: it is damaged or cut short ({' '.join(str(error).split())})."
    return None


def read_checkpoint_file(path: Path) -> None:
    """Reads a file of a checkpoint as what its name says, of weights the header."""
    if path.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(error) from error
    elif path.suffix == ".json":
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds {fields!r:.40} and no fields")
        if path.name.endswith(".index.json"):
            check_index(path, fields.get("weight_map"))
    elif path.suffix == ".jinja":
        path.read_text(encoding="utf-8")
    elif path.suffix == ".safetensors":
        with path.open("rb"), safe_open(path, "pt"):
            pass


def check_index(index: Path, weight_map: object) -> None:
    """Raises a `ValueError` if the index of a checkpoint's shards names none, or some that are not there."""
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError("it has no weight_map of names")
    missing = sorted({name for name in weight_map.values() if not index.with_name(name).is_file()})
    if missing:
        raise ValueError(f"it names {', '.join(missing)}, which is missing")
