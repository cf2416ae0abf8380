"""Whether a model is one that may be opened: its configuration before anything is built, its weights once they are."""

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
"""Names of the files that a model is opened from: no code, no template, nothing that is unpickled, no folder."""
# The regular expressions by which GPT-2, Qwen2, Llama 3 and ours cut text; another may take a lifetime over a line.
SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+",
)


class UnavailableModel(ValueError):
    """A model that cannot be opened; the message is one line for the person who asked for it."""


def check_files(name: str, folder: Path) -> None:
    """Raises [`UnavailableModel`] if a file of a folder lies elsewhere, or is too large for what it is.

    Args:
        name: of the model, for the message.
        folder: a plain one, or a snapshot in the cache of the Hub's client, whose files are links to its blobs.
    """
    blobs = folder.resolve().parent.parent / "blobs"
    for path in sorted(folder.iterdir()):
        if not FILES.fullmatch(path.name):
            continue
        where = path.resolve()
        if not (where.is_relative_to(folder.resolve()) or where.parent == blobs):
            raise UnavailableModel(f"{name}: {path.name} is a link to a place outside of the model: copy the file.")
        most = most_bytes(path.name)
        if most is not None and where.stat().st_size > most:
            raise UnavailableModel(f"{name}: {path.name} has more than {most / 1e6:g} MB.")
    for path in folder.glob("*.index.json"):
        shards = read_json(name, path).get("weight_map")
        if not isinstance(shards, dict) or any(not FILES.fullmatch(str(shard)) for shard in shards.values()):
            raise UnavailableModel(f"{name}: {path.name} names what is no file of weights beside it.")


def most_bytes(file: str) -> int | None:
    """Of a file of a model by its name; `None` for weights, which are limited together."""
    if file.endswith(".safetensors"):
        return None
    return limits.CONFIG_BYTES if file == "config.json" else limits.JSON_BYTES


def check_settings(name: str, folder: Path, is_trusted: bool) -> dict[str, Any]:
    """The configuration of a model, whose numbers are within `limits.NUMBERS`, like those of its image processor.

    Args:
        is_trusted: whether who runs the app has named it, so that its tokenizer may be any.

    Raises:
        UnavailableModel: which names the first number that is not.
    """
    config = read_json(name, folder / "config.json")
    for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            check_numbers(name, file, read_json(name, folder / file))
    if "quantization_config" in config:
        raise UnavailableModel(f"{name} is quantised, which needs libraries that are not here.")
    if not is_trusted and (folder / "tokenizer.json").is_file():
        for value in strings(read_json(name, folder / "tokenizer.json"), "Regex"):
            if value not in SPLITS:
                raise UnavailableModel(f"{name}: its tokenizer cuts text by a regular expression that is not known.")
        for step in parts(read_json(name, folder / "tokenizer.json")):
            pattern = step.get("pattern") if step.get("type") == "Replace" else None
            old = pattern.get("String", "") if isinstance(pattern, dict) else ""
            if pattern is not None and len(str(step.get("content", ""))) > len(str(old)):
                raise UnavailableModel(f"{name}: its tokenizer makes text longer, and a few steps of it endless.")
    return config


def check_numbers(name: str, file: str, fields: Any) -> None:
    """Looks at each number of a JSON file, by the key that it is under."""
    for key, number in numbers(name, file, fields):
        low, high = next((low, high) for pattern, low, high in limits.NUMBERS if re.search(pattern, key))
        if not low <= number <= high:
            raise UnavailableModel(f"{name}: {file} says {key} = {number:g}; from {low:,} to {high:,} is opened.")
    for part in parts(fields):
        sides, patches = (pair(part.get(key)) for key in ("image_size", "patch_size"))
        if sides and patches and max(sides[0] / patches[0], sides[1] / patches[1]) > limits.PATCHES_A_SIDE:
            raise UnavailableModel(
                f"{name}: {file} has {sides[0] // patches[0]:,} patches a side; {limits.PATCHES_A_SIDE} are the most."
            )


def numbers(name: str, file: str, value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Every number of a JSON file that is none of a list of names, with the nearest key above it."""
    if isinstance(value, (dict, list)):
        if len(value) > limits.ENTRIES or depth > 20:
            raise UnavailableModel(f"{name}: {file} has too much under {key!r}.")
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
    """A side, or height and width, as numbers above 0."""
    sides = value if isinstance(value, list) else [value, value]
    good = len(sides) == 2 and all(isinstance(side, (int, float)) and side > 0 for side in sides)
    return tuple(sides) if good else None


def strings(value: Any, wanted: str) -> Iterator[str]:
    """Every string under a key, however deep."""
    for item in parts(value):
        if isinstance(item.get(wanted), str):
            yield item[wanted]


def read_json(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnavailableModel(f"{name} has no {path.name}: it is no model that can be opened here.")
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UnavailableModel(f"{name}: {path.name} cannot be read, it is no JSON.") from error
    if not isinstance(fields, dict):
        raise UnavailableModel(f"{name}: {path.name} holds no settings.")
    return fields


def check_memory(name: str, model_class: Any, config: Any) -> None:
    """Raises [`UnavailableModel`] if a model in float32 would take more than its share of memory; it is built without
    memory.
    """
    with torch.device("meta"):
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        model = build(config, dtype=torch.float32)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > limits.model_bytes():
        raise UnavailableModel(
            f"{name} would take {size / 1e9:.1f} GB of memory; {limits.model_bytes() / 1e9:.1f} GB are for one model."
        )


def check_weights(name: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """Raises [`UnavailableModel`] if weights were missing, which are then random, or are no numbers.

    Args:
        loading: what `from_pretrained` tells with `output_loading_info=True`.
    """
    missing = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    if missing:
        raise UnavailableModel(
            f"{name} has not the weights that its config.json asks for: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}."
        )
    wrong = not_finite(dict(model.named_parameters()))
    if wrong:
        raise UnavailableModel(f"{name} has weights that are NaN or infinite, such as {wrong[0]}.")
