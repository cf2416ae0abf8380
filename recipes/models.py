"""Where training starts: a ViTP checkpoint, a transformers InternVL checkpoint, or a small model from scratch."""

from collections.abc import Iterable

from from_scratch import build_model, build_tokenizer
from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration
from trl import ModelConfig

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration, ViTPImageProcessor, ViTPProcessor


def load_start(
    model_args: ModelConfig, from_scratch: dict | None, texts: Iterable[str], drop_path_rate: float | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """The model and processor that the arguments ask for; `texts` train the tokenizer of a model from scratch.

    Raises:
        ValueError: if not exactly one start is given, the checkpoint is of another kind, or its keys do not fit.
    """
    name = model_args.model_name_or_path
    if (name is None) == (from_scratch is None):
        raise ValueError("Give either model_name_or_path or from_scratch in the configuration: where training starts.")
    if name is None:
        return start_from_scratch(from_scratch, texts, drop_path_rate)

    options = {"revision": model_args.model_revision}
    config = AutoConfig.from_pretrained(name, **options)
    classes = {"vitp": ViTPForConditionalGeneration, "internvl": InternVLForConditionalGeneration}
    if config.model_type not in classes:
        raise ValueError(f"{name} is a {config.model_type!r} model; training starts from {' or '.join(classes)}.")
    if drop_path_rate is not None:
        config.vision_config.drop_path_rate = drop_path_rate
    model, report = classes[config.model_type].from_pretrained(
        name,
        config=config,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        output_loading_info=True,
        **options,
    )
    wrong = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"The weights of {name} do not fit its configuration: {wrong}")
    if config.model_type == "vitp":
        return model, ViTPProcessor.from_pretrained(name, **options)
    return from_internvl(model), internvl_processor(name, **options)


def start_from_scratch(
    settings: dict, texts: Iterable[str], drop_path_rate: float | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """A randomly initialised model with a tokenizer trained on `texts`."""
    known = {"vision_config", "text_config", "vocab_size", "image_processor"}
    missing, unknown = {"vision_config", "text_config", "vocab_size"} - set(settings), set(settings) - known
    if missing or unknown:
        raise ValueError(f"from_scratch: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}.")
    vision_config = dict(settings["vision_config"])
    if drop_path_rate is not None:
        vision_config["drop_path_rate"] = drop_path_rate
    tokenizer = build_tokenizer(texts, settings["vocab_size"])
    return build_model(tokenizer, vision_config, settings["text_config"], settings.get("image_processor"))


def from_internvl(model: InternVLForConditionalGeneration) -> ViTPForConditionalGeneration:
    """The same weights, uncopied, in ViTP's classes; parameter names are the same."""
    fields = model.config.to_dict()
    for owner in (fields, fields["vision_config"]):
        owner.pop("model_type")
        owner.pop("architectures", None)
    config = ViTPConfig(**fields)
    config._attn_implementation = model.config._attn_implementation
    converted = ViTPForConditionalGeneration(config)
    converted.load_state_dict(model.state_dict(), assign=True)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    return converted


def internvl_processor(name: str, **options) -> ViTPProcessor:
    """Our processor around the tokenizer and the image settings of a transformers InternVL checkpoint."""
    config = AutoConfig.from_pretrained(name, **options)
    image_processor = ViTPImageProcessor.from_pretrained(name, **options)
    return ViTPProcessor(
        image_processor, AutoTokenizer.from_pretrained(name, **options), image_seq_length=config.image_seq_length
    )
