"""Checks of a model that a visitor names: files and configuration before it is built, weights after loading."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limits
import torch
from torch import nn

from modeling_vitp.convert.tensor_files import not_finite

FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config|vocab|added_tokens|"
    r"special_tokens_map)\.json|merges\.txt|tokenizer\.model|[\w.-]+\.safetensors(\.index\.json)?"
)
"""Names of the files that a model may be opened from. Code, templates, pickles and folders are excluded."""
# Pre-tokenization patterns of GPT-2, Qwen2, Llama 3 and this package. Other patterns may backtrack without end.
SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+",
)


class UnavailableModel(ValueError):
    """Error for a model that cannot be opened. The message is one line for the visitor."""


def check_files(name: str, folder: Path) -> None:
    """Raise [`UnavailableModel`] if a file of the model is a link to another place or is too large.

    Args:
        name: name of the model, for the message.
        folder: plain folder, or snapshot in the Hub cache, whose files are links to blobs.
    """
    blobs = folder.resolve().parent.parent / "blobs"
    for path in sorted(folder.iterdir()):
        if not FILES.fullmatch(path.name):
            continue
        where = path.resolve()
        if not (where.is_relative_to(folder.resolve()) or where.parent == blobs):
            raise UnavailableModel(f"{name}: {path.name} is a link out of the model's folder. Copy the file instead.")
        most = most_bytes(path.name)
        if most is not None and where.stat().st_size > most:
            raise UnavailableModel(f"{name}: {path.name} is larger than {most / 1e6:g} MB.")
    for path in folder.glob("*.index.json"):
        shards = read_json(name, path).get("weight_map")
        if not isinstance(shards, dict) or any(not FILES.fullmatch(str(shard)) for shard in shards.values()):
            raise UnavailableModel(f"{name}: {path.name} must name only safetensors files in the same folder.")


def most_bytes(file: str) -> int | None:
    """Return the size limit of a file, in bytes; `None` for weights, whose total size is limited."""
    if file.endswith(".safetensors"):
        return None
    return limits.CONFIG_BYTES if file == "config.json" else limits.JSON_BYTES


def check_settings(name: str, folder: Path, is_trusted: bool) -> dict[str, Any]:
    """Read the configuration of a model and check that all numbers are within `limits.NUMBERS`.

    Args:
        is_trusted: whether the model was named when the app was started. Its tokenizer is then not checked.

    Raises:
        UnavailableModel: if a number, the quantization or the tokenizer is not accepted.
    """
    config = read_json(name, folder / "config.json")
    for file in ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            check_numbers(name, file, read_json(name, folder / file))
    if "quantization_config" in config:
        raise UnavailableModel(f"{name} is quantized, which this app does not support.")
    if not is_trusted and (folder / "tokenizer.json").is_file():
        for value in strings(read_json(name, folder / "tokenizer.json"), "Regex"):
            if value not in SPLITS:
                raise UnavailableModel(f"{name}: its tokenizer splits text by an unknown regular expression.")
        for step in parts(read_json(name, folder / "tokenizer.json")):
            pattern = step.get("pattern") if step.get("type") == "Replace" else None
            old = pattern.get("String", "") if isinstance(pattern, dict) else ""
            if pattern is not None and len(str(step.get("content", ""))) > len(str(old)):
                raise UnavailableModel(f"{name}: its tokenizer replaces text by longer text, which is not accepted.")
            is_addition = step.get("type") in ("Prepend", "TemplateProcessing")
            if is_addition and (size := len(json.dumps(step))) > limits.ADDED_TEXT:
                raise UnavailableModel(f"{name}: its tokenizer adds too much to each text ({size:,} characters).")
    return config


def check_numbers(name: str, file: str, fields: Any) -> None:
    """Check each number of a JSON file against the limits of its key."""
    for key, number in numbers(name, file, fields):
        low, high = next((low, high) for pattern, low, high in limits.NUMBERS if re.search(pattern, key))
        if not low <= number <= high:
            raise UnavailableModel(f"{name}: expected {key} of {file} from {low:,} to {high:,}, got {number:g}.")
    for part in parts(fields):
        sides, patches = (pair(part.get(key)) for key in ("image_size", "patch_size"))
        if sides and patches and max(sides[0] / patches[0], sides[1] / patches[1]) > limits.PATCHES_A_SIDE:
            raise UnavailableModel(
                f"{name}: {file} has {sides[0] // patches[0]:,} patches a side, more than {limits.PATCHES_A_SIDE}."
            )


def numbers(name: str, file: str, value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Yield every number of a JSON file with its nearest key, except those in the lists of class names."""
    if isinstance(value, (dict, list)):
        if len(value) > limits.ENTRIES or depth > 20:
            raise UnavailableModel(f"{name}: {file} has too many entries or levels under {key!r}.")
        items = value.items() if isinstance(value, dict) else ((key, item) for item in value)
        for inner, item in items:
            if inner not in ("id2label", "label2id"):
                yield from numbers(name, file, item, str(inner)[:80], depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def parts(value: Any) -> Iterator[dict]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(item)
    if isinstance(value, dict):
        yield value


def pair(value: Any) -> tuple[float, float] | None:
    """Return a side, or height and width, as two positive numbers; `None` if the value is not valid."""
    sides = value if isinstance(value, list) else [value, value]
    good = len(sides) == 2 and all(isinstance(side, (int, float)) and side > 0 for side in sides)
    return tuple(sides) if good else None


def strings(value: Any, wanted: str) -> Iterator[str]:
    """Yield every string under a key, at any depth."""
    for item in parts(value):
        if isinstance(item.get(wanted), str):
            yield item[wanted]


def read_json(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnavailableModel(f"{name} has no {path.name}, so it cannot be opened.")
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UnavailableModel(f"{name}: {path.name} is not valid JSON.") from error
    if not isinstance(fields, dict):
        raise UnavailableModel(f"{name}: {path.name} must contain a JSON object.")
    return fields


def check_memory(name: str, model_class: Any, config: Any) -> None:
    """Raise [`UnavailableModel`] if a float32 model would exceed its share of memory, estimated on the meta device."""
    with torch.device("meta"):
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        model = build(config, dtype=torch.float32)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > limits.model_bytes():
        raise UnavailableModel(
            f"{name} would take {size / 1e9:.1f} GB of memory, more than the limit of "
            f"{limits.model_bytes() / 1e9:.1f} GB for one model."
        )


def check_weights(name: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """Raise [`UnavailableModel`] if weights are missing (and therefore random), NaN or infinite.

    Args:
        loading: loading info of `from_pretrained` with `output_loading_info=True`.
    """
    missing = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    if missing:
        raise UnavailableModel(
            f"{name}: the weights do not match config.json. {len(missing)} are missing or of another shape, such as "
            f"{missing[0]}."
        )
    wrong = not_finite(dict(model.named_parameters()))
    if wrong:
        raise UnavailableModel(f"{name} has weights that are NaN or infinite, such as {wrong[0]}.")
