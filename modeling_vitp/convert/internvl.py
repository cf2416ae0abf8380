"""InternVL in our classes."""

import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration

from ..configuration_vitp import ViTPConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration
from ..opening import naming
from ..processing_vitp import ViTPProcessor
from .video_token import drop_video_token


def from_internvl_config(config: InternVLConfig) -> ViTPConfig:
    """The configuration of transformers' own model in ours."""
    fields = config.to_dict()
    for owner in (fields, fields["vision_config"]):
        for name in ("model_type", "architectures", "auto_map"):
            owner.pop(name, None)
    return ViTPConfig(**fields)


def from_internvl(model: InternVLForConditionalGeneration) -> ViTPForConditionalGeneration:
    """The same weights, uncopied, in ViTP's classes; parameter names are the same."""
    config = from_internvl_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    converted = ViTPForConditionalGeneration(config)
    converted.load_state_dict(model.state_dict(), assign=True)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    return converted


def internvl_processor(name: str, **options) -> ViTPProcessor:
    """Our processor around the tokenizer and the image settings of a transformers InternVL checkpoint.

    A video token that the model has no embedding for is left out.
    """
    with naming(name, ViTPProcessor):
        config = from_internvl_config(AutoConfig.from_pretrained(name, **options))
        image_processor = ViTPImageProcessor.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if len(tokenizer) > config.text_config.vocab_size:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                drop_video_token(Path(folder), config.text_config.vocab_size)
                tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.name_or_path = name
        return ViTPProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
