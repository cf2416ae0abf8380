"""Conversion of transformers' InternVL to our classes, and compatibility of its folders with transformers 4."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration

from ..cards.record import read_json, write_json
from ..configuration_vitp import ViTPConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration
from ..opening import naming, open_config, without_remote_code
from ..processing_vitp import ViTPProcessor

VIDEO_TOKEN = "<video>"


def from_internvl_config(config: InternVLConfig) -> ViTPConfig:
    """Return the configuration of transformers' own model in our class."""
    fields = config.to_dict()
    for owner in (fields, fields["vision_config"]):
        for name in ("model_type", "architectures", "auto_map"):
            owner.pop(name, None)
    return ViTPConfig(**fields)


def from_internvl(model: InternVLForConditionalGeneration) -> ViTPForConditionalGeneration:
    """Return the model in our class with the same weights (not copied) under the same names."""
    config = from_internvl_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    converted = ViTPForConditionalGeneration(config)
    converted.load_state_dict(model.state_dict(), assign=True)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    return converted


def internvl_processor(name: str, **options) -> ViTPProcessor:
    """Return our processor with the tokenizer and the image settings of a transformers InternVL checkpoint.

    A video token without an embedding in the model is removed.
    """
    with naming(name, ViTPProcessor):
        config = from_internvl_config(open_config(name, **options))
        image_processor = ViTPImageProcessor.from_pretrained(name, **options)
        tokenizer = without_remote_code(AutoTokenizer.from_pretrained, name, **options)
        if len(tokenizer) > config.text_config.vocab_size:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                drop_video_token(Path(folder), config.text_config.vocab_size)
                tokenizer = without_remote_code(AutoTokenizer.from_pretrained, folder)
            tokenizer.name_or_path = name
        return ViTPProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def drop_video_token(folder: Path, vocab_size: int) -> None:
    """Remove the video token from the tokenizer saved in `folder` if the model has no embedding for it.

    transformers' InternVL processor reads this token from its tokenizer and replaces it before encoding. In our
    processor, a text with this token would cause an index error in the model.
    """
    state = read_json(folder / "tokenizer.json")
    usable_tokens = []
    for token in state["added_tokens"]:
        has_embedding = token["id"] < vocab_size
        if token["content"] != VIDEO_TOKEN or has_embedding:
            usable_tokens.append(token)
    if usable_tokens == state["added_tokens"]:
        return
    state["added_tokens"] = usable_tokens
    write_json(folder / "tokenizer.json", state, ensure_ascii=False)
    config = read_json(folder / "tokenizer_config.json")
    for name in config.pop("model_specific_special_tokens", {}):
        config.pop(name, None)
    if "extra_special_tokens" in config:
        config["extra_special_tokens"] = [token for token in config["extra_special_tokens"] if token != VIDEO_TOKEN]
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)


def rope_of_version_4(rope: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` of transformers 4 for the `rope_parameters` of version 5.

    Return `{}` for a model whose layers have several bases, which version 4 wrote differently for each model.
    """
    if "rope_theta" not in rope:
        return {}
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {**rope, "type": rope["rope_type"]}
        del scaling["rope_theta"]
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def write_rope_for_version_4(folder: Path) -> None:
    """Add `rope_theta` to the `config.json` of a folder; without it, version 4 uses its default base."""
    config = read_json(folder / "config.json")
    config["text_config"] |= rope_of_version_4(config["text_config"].get("rope_parameters") or {})
    write_json(folder / "config.json", config)


def write_tokenizer_config_for_version_4(folder: Path) -> None:
    """Rewrite the `tokenizer_config.json` of a folder for transformers 4; version 5 still reads it.

    Version 4 has another class name for a tokenizer that consists of its `tokenizer.json`, returns token type ids with
    it by default, and keeps named special tokens, such as the image token of its InternVL processor, apart from the
    others.
    """
    config = read_json(folder / "tokenizer_config.json")
    config.pop("backend", None)
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    named_tokens = config.pop("model_specific_special_tokens", None)
    if named_tokens:
        config["extra_special_tokens"] = named_tokens
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)
