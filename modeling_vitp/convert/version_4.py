"""What transformers 4, and servers on it, read otherwise than version 5 writes it, said in words of both."""

from pathlib import Path
from typing import Any

from ..cards.record import read_json, write_json


def rope_of_version_4(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, of a language model's `rope_parameters`.

    Nothing for a model whose layers have several bases, which version 4 said in other words for each model.
    """
    if "rope_theta" not in rope:
        return {}
    others = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_plain = rope["rope_type"] == "default"
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if is_plain else {**others, "type": rope["rope_type"]},
    }


def say_rope_in_version_4(folder: Path) -> None:
    """Adds them to the `config.json` of a folder: without, version 4 takes its default base."""
    config = read_json(folder / "config.json")
    config["text_config"] |= rope_of_version_4(config["text_config"].get("rope_parameters") or {})
    write_json(folder / "config.json", config)


def say_tokenizer_in_version_4(folder: Path) -> None:
    """Rewrites the `tokenizer_config.json` of a folder, which version 5 still reads as before.

    Version 4 has another name for the class of a tokenizer that is its `tokenizer.json` alone, gives ids of segments
    with it unless told not to, and keeps special tokens that have a name, such as the one that its InternVL processor
    puts for an image, apart from those without.
    """
    config = read_json(folder / "tokenizer_config.json")
    config.pop("backend", None)
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    if named := config.pop("model_specific_special_tokens", None):
        config["extra_special_tokens"] = named
    if config["tokenizer_class"] == "TokenizersBackend":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)
