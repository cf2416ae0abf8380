"""Loading of the model to pretrain: a checkpoint, a ViT with a language model, or random weights."""

import difflib
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from ..bands import spread_bands
from ..configuration_vitp import ViTPConfig, ViTPVisionConfig, check_keys, known_keys, own_vision_config
from ..convert.export import image_processor_of
from ..convert.internvl import from_internvl, internvl_processor
from ..convert.tensor_files import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration
from ..modeling_vitp_backbone import open_vit, open_vit_config, resize_backbone
from ..opening import check_fields, check_timm, open_config, read_config_fields, without_remote_code
from ..processing_vitp import ViTPProcessor
from ..vision_parts import vision_part
from ..vision_towers import TOWERS, pair, tower_of

if TYPE_CHECKING:  # the Space loads models without TRL
    from trl import ModelConfig

    from .arguments import PretrainArguments

logger = logging.getLogger(__name__)

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
MARKS = [TURN_START, "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>"]
SAMPLE = "The trees stand in rows."
REQUIRED_KEYS = ("vision_config", "text_config", "vocab_size")  # of from_scratch
STARTS = {"vitp": ViTPForConditionalGeneration, "internvl": InternVLForConditionalGeneration}


def check_options(model_args: "ModelConfig", from_scratch: dict | None, model_init_kwargs: dict | None = None) -> None:
    """Raise a `ValueError` if an option of the model would have no effect."""
    defaults = vars(type(model_args)())
    quantization_options = []
    lora_options = []
    for name, value in vars(model_args).items():
        if value == defaults[name]:
            continue
        if name.startswith(("load_in_", "bnb_", "use_bnb_")):
            quantization_options.append(name)
        elif name.startswith(("lora_", "use_rslora", "use_dora")):
            lora_options.append(name)
    if quantization_options:
        raise ValueError(
            f"{' and '.join(quantization_options)}: training of quantized weights is not supported. Remove the "
            "option. To save memory, use use_peft, freeze or --dtype bfloat16."
        )
    if lora_options and not model_args.use_peft:
        raise ValueError(
            f"{' and '.join(lora_options)}: LoRA options have no effect without use_peft. Add --use_peft true."
        )
    if from_scratch is not None and model_args.dtype not in (None, "auto", "float32"):
        raise ValueError(
            f"dtype={model_args.dtype!r}: from_scratch creates float32 weights. Remove the option; use --bf16 true to "
            "compute in bfloat16."
        )
    if model_init_kwargs:
        raise ValueError(
            "model_init_kwargs are only supported by the trainer in Python. Set dtype, attn_implementation and "
            "model_revision instead."
        )


def load_start(
    args: "PretrainArguments", model_args: "ModelConfig", texts: Iterable[str]
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Load or build the model and processor that the arguments describe.

    Args:
        args: arguments of the start. With `from_scratch`, `vision_model` provides the initial weights of the ViT and
            the settings of the image processor, unless `from_scratch` overrides them.
        model_args: arguments of the model.
        texts: texts that the tokenizer of a model from scratch is trained on.

    Raises:
        ValueError: if not exactly one start is given, the checkpoint has another model type, or its keys do not match.
    """
    check_one_start(args, model_args.model_name_or_path)
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if args.from_scratch is not None:
        model, processor = start_from_scratch(args.from_scratch, texts, args.drop_path_rate)
        if args.vision_model is not None:
            load_vision_weights(model.model.vision_tower, args.vision_model)
            processor.image_processor = image_processor_of(
                args.vision_model,
                pair(model.config.vision_config.image_size),
                **(args.from_scratch.get("image_processor") or {}),
            )
        if model_args.attn_implementation is not None:
            model.set_attn_implementation(model_args.attn_implementation)
        return model, processor
    if args.vision_model is not None:
        return compose(
            args.vision_model,
            args.language_model,
            args.drop_path_rate,
            args.vision_image_size,
            **options,
        )
    return load_checkpoint(
        model_args.model_name_or_path,
        args.drop_path_rate,
        revision=model_args.model_revision,
        **options,
    )


def check_one_start(args: "PretrainArguments", name: str | None) -> None:
    """Raise a `ValueError` if the arguments describe no start or several ones.

    Args:
        name: folder or Hub id of a model, `None` for another start.
    """
    has_vision_model = args.vision_model is not None
    has_language_model = args.language_model is not None
    takes_vision_weights = has_vision_model and args.from_scratch is not None
    if has_vision_model != has_language_model and not takes_vision_weights:
        raise ValueError("vision_model and language_model belong together: set both, or neither.")
    starts = [name, args.from_scratch, args.language_model]
    if starts.count(None) != 2:
        raise ValueError(
            "Give either model_name_or_path or from_scratch in the configuration, or vision_model with language_model, "
            "the model to start from. To remove from_scratch of the configuration, add --from_scratch '{}'."
        )
    if args.vision_image_size is not None and not has_language_model:
        raise ValueError(f"vision_image_size={args.vision_image_size} needs vision_model and language_model.")


def load_checkpoint(
    name: str, drop_path_rate: float | None = None, revision: str | None = None, **options
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Load a ViTP or transformers' InternVL and its processor.

    Args:
        name: folder or Hub id.
        drop_path_rate: stochastic depth rate of the ViT, by default that of its configuration.
        revision: branch, tag or commit on the Hub.
        options: arguments of `from_pretrained` (`dtype`, `attn_implementation` …).
    """
    if not revision:
        revision = "main"
    model_type = read_start(name, revision=revision)["model_type"]
    config = open_config(name, revision=revision)
    if drop_path_rate is not None:
        tower_of(config.vision_config).set_drop_path_rate(config.vision_config, drop_path_rate)
    model, report = STARTS[model_type].from_pretrained(
        name,
        config=config,
        output_loading_info=True,
        revision=revision,
        **options,
    )
    check_report(name, report)
    check_finite(model.state_dict(), name)
    if model_type == "vitp":
        return model, ViTPProcessor.from_pretrained(name, revision=revision)
    return from_internvl(model), internvl_processor(name, revision=revision)


def read_start(name: str, revision: str = "main") -> dict[str, Any]:
    """Return the content of the config.json of a model to start from, a folder or Hub id.

    Raises:
        ValueError: if the model is neither a ViTP nor transformers' InternVL.
    """
    fields = read_config_fields(name, revision=revision)
    check_fields(f"{name}/config.json", fields)
    model_type = fields.get("model_type")
    if model_type not in STARTS and (model_type in TOWERS or vision_part(fields) is not None):
        kind = (
            "backbone without a language model" if model_type in TOWERS else f"{model_type!r}, of which the ViT is used"
        )
        raise ValueError(f"{name} is a {kind}. Set it as --vision_model, with language_model or from_scratch.")
    if model_type not in STARTS:
        remedy = f"Convert checkpoints of InternVL's own code first: vitp convert {name} FOLDER."
        if str(model_type).startswith("vitp_"):
            remedy = "Start from the backbone that it was fine-tuned from."
        raise ValueError(f"{name} is a {model_type!r} model. Expected {' or '.join(STARTS)}. {remedy}")
    return fields


def check_from_scratch(settings: dict | None) -> None:
    """Raise a `ValueError` if a key of `from_scratch` is missing or unknown."""
    if settings is None:
        return
    check_keys("from_scratch", settings, [*REQUIRED_KEYS, "image_processor"], "a model from scratch")
    check_timm("from_scratch", settings)
    missing_keys = [name for name in REQUIRED_KEYS if settings.get(name) is None]
    if missing_keys:
        raise ValueError(
            f"from_scratch: {' and '.join(missing_keys)} missing. Required keys: {', '.join(REQUIRED_KEYS)}."
        )
    if type(settings["vocab_size"]) is not int:  # a bool is an int too
        raise ValueError(f"Expected from_scratch.vocab_size to be an integer, got {settings['vocab_size']!r}.")
    place = "from_scratch.vision_config"
    vision_class = config_class_of(place, settings["vision_config"], ViTPVisionConfig.model_type)
    if vision_class.model_type not in TOWERS:
        raise ValueError(f"{place}: {vision_class.model_type!r} must be a family of ViT: {', '.join(TOWERS)}.")
    check_config(place, settings["vision_config"], vision_class)
    place = "from_scratch.text_config"
    text_class = config_class_of(place, settings["text_config"], "qwen2")
    check_config(place, settings["text_config"], text_class)
    # The size of the image processor is the image size of the ViT.
    known_keys_of_processor = set(ViTPImageProcessor.valid_kwargs.__annotations__) - {"size"}
    check_keys(
        "from_scratch.image_processor",
        settings.get("image_processor"),
        known_keys_of_processor,
        ViTPImageProcessor.__name__,
    )


def start_from_scratch(
    settings: dict, texts: Iterable[str], drop_path_rate: float | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a model with random weights and a tokenizer trained on `texts`; see [`check_from_scratch`]."""
    check_from_scratch(settings)
    fields = {"model_type": ViTPVisionConfig.model_type, **settings["vision_config"]}
    config_class = CONFIG_MAPPING[fields["model_type"]]
    vision_config = own_vision_config(config_class.from_dict(fields))
    if drop_path_rate is not None:
        tower_of(vision_config).set_drop_path_rate(vision_config, drop_path_rate)
    tokenizer = build_tokenizer(texts, settings["vocab_size"])
    return build_model(tokenizer, vision_config, settings["text_config"], settings.get("image_processor"))


def load_vision_weights(vision_tower: PreTrainedModel, name: str) -> None:
    """Load the weights of a backbone, a folder or Hub id, into a ViT.

    Raises:
        ValueError: if the shapes of the weights differ.
    """
    pretrained = open_vit(name)
    check_finite(pretrained.state_dict(), name)
    try:
        vision_tower.load_state_dict(pretrained.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"The weights of vision_model {name} do not fit from_scratch.vision_config: {reason}"
        ) from error


def tiling(
    name: str | None,
    from_scratch: dict | None,
    vision_model: str | None = None,
    max_patches: int | None = None,
    image_size: int | None = None,
) -> tuple[ViTPImageProcessor, int]:
    """Return the image processor of the model to start from, and the number of visual tokens per tile.

    Both are read from `from_scratch`, or from the local folder of a model or backbone. For models on the Hub, those of
    InternVL2.5 are returned.
    """
    has_local_vit = vision_model is not None and Path(vision_model).is_dir()
    if from_scratch is not None:
        config = ViTPConfig(vision_config=from_scratch["vision_config"])
        settings = from_scratch.get("image_processor") or {}
        height, width = pair(config.vision_config.image_size)
        if has_local_vit:
            image_processor = image_processor_of(vision_model, (height, width), **settings)
        else:
            image_processor = ViTPImageProcessor(size={"height": height, "width": width}, **settings)
    elif has_local_vit:
        config = ViTPConfig(vision_config=vision_config_of(vision_model, image_size))
        image_processor = image_processor_of(vision_model, pair(config.vision_config.image_size))
    elif name is not None and Path(name).is_dir():
        fields = read_start(name)
        config = ViTPConfig(vision_config=fields["vision_config"], downsample_ratio=fields.get("downsample_ratio", 0.5))
        image_processor = ViTPImageProcessor.from_pretrained(name)
    else:
        config = ViTPConfig()
        image_processor = ViTPImageProcessor()
    if max_patches:
        image_processor.max_patches = max_patches
    return image_processor, config.image_seq_length


def apply_input_spec(
    input_spec: dict, model: ViTPForConditionalGeneration, processor: ViTPProcessor, use_peft: bool = False
) -> None:
    """Set the input spec of the image processor, and spread RGB weights over its bands.

    If the input spec names bands, the weights, mean and standard deviation for red, green and blue are spread over the
    bands, see [`~modeling_vitp.spread_bands`].

    Args:
        use_peft: whether an adapter is trained. An adapter can only be used with a base model that is saved.

    Raises:
        ValueError: if the model has other bands, or an adapter would have a base model that is not saved.
    """
    processor.image_processor = processor.image_processor.with_input_spec(input_spec)
    names = processor.image_processor.band_names
    if names is None:
        return
    if not isinstance(model.config.vision_config, ViTPVisionConfig):
        raise ValueError(
            f"input_spec: only InternViT takes `band_names`, not {model.config.vision_config.model_type!r}."
        )
    if use_peft and model.config.vision_config.band_names is None:
        raise ValueError(
            "use_peft: an adapter needs a saved base model, but the weights are spread over other bands. Save the "
            "model first, vitp convert MODEL FOLDER --to vitp --input_spec JSON, and start from FOLDER."
        )
    spread_bands(model, names)


def check_compatible(model: ViTPForConditionalGeneration, processor: ViTPProcessor) -> None:
    """Raise a `ValueError` if the processor does not match the model."""
    if not isinstance(processor, ViTPProcessor):
        raise ValueError(f"Expected processing_class to be a ViTPProcessor, got {type(processor).__name__}.")
    config = model.config
    size = processor.image_processor.size
    of_model = {
        "image_seq_length": config.image_seq_length,
        "image_token_id": config.image_token_id,
        "image size": list(pair(config.vision_config.image_size)),
        "band_names": getattr(config.vision_config, "band_names", None),
    }
    of_processor = {
        "image_seq_length": processor.image_seq_length,
        "image_token_id": processor.image_token_id,
        "image size": [size["height"], size["width"]],
        "band_names": processor.image_processor.band_names,
    }
    for name, value in of_model.items():
        if value != of_processor[name]:
            raise ValueError(f"{name} of model and processor must match, got {value} and {of_processor[name]}.")
    num_tokens = len(processor.tokenizer)
    num_embeddings = model.get_input_embeddings().num_embeddings
    if num_tokens > num_embeddings:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens, but the model has only {num_embeddings} embeddings. Call "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token. Set tokenizer.pad_token.")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`, with the special tokens of Qwen2.5 and InternVL2.5.

    The result is deterministic. The vocabulary contains all bytes even if `vocab_size` is smaller.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_END, *MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD, additional_special_tokens=MARKS
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    vision_config: dict | PreTrainedConfig,
    text_config: dict,
    image_processor: dict | None = None,
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a model with random weights and its processor for a tokenizer."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = ViTPConfig(
        vision_config=vision_config,
        text_config={"model_type": "qwen2", **text_config, "vocab_size": len(tokenizer), **special},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **special,
    )
    height, width = pair(config.vision_config.image_size)
    processor = ViTPProcessor(
        ViTPImageProcessor(size={"height": height, "width": width}, **(image_processor or {})),
        tokenizer,
        image_seq_length=config.image_seq_length,
    )
    return ViTPForConditionalGeneration(config), processor


def compose(
    vision_model: str,
    language_model: str,
    drop_path_rate: float | None = None,
    image_size: int | None = None,
    **options,
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Combine a pretrained ViT and a pretrained causal LM with a new projector, and create their processor.

    Missing special tokens of images, turns and boxes are added to the tokenizer, with new random embeddings.

    Args:
        vision_model: folder or Hub id of a ViT of any family, see [`~modeling_vitp.register_tower`].
        language_model: folder or Hub id of a causal LM of transformers.
        drop_path_rate: stochastic depth rate of the ViT, by default that of its configuration.
        image_size: side of a tile in pixels, to which the position embeddings are interpolated. By default that of
            the ViT, or one patch less if its number of patches is odd, because two by two patches become one token.
        options: arguments of both `from_pretrained` calls (`dtype`, by default float32, `attn_implementation` …).

    Raises:
        ValueError: if a model type is not supported, weights do not match their configuration, or the combined model
            would not compute the logits of the language model.
    """
    options = {"dtype": "float32", **options}  # in half precision, small updates would be rounded away
    check_language_model(language_model)
    side, _ = pair(vision_config_of(vision_model, image_size).image_size)
    vision = open_vit(vision_model, drop_path_rate, **options)
    if side != pair(vision.config.image_size)[0]:
        vision = resize_backbone(vision, image_size=side)
    language, report = without_remote_code(
        AutoModelForCausalLM.from_pretrained, language_model, output_loading_info=True, **options
    )
    check_report(language_model, report)
    check_finite(vision.state_dict(), vision_model)
    check_finite(language.state_dict(), language_model)
    tokenizer = without_remote_code(AutoTokenizer.from_pretrained, language_model)
    extend_tokenizer(tokenizer, language)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_embeddings(language, language_model)

    model = combine(vision, language, tokenizer)
    check_logits(model, language, tokenizer(SAMPLE, return_tensors="pt")["input_ids"], language_model)
    image_processor = image_processor_of(vision_model, pair(model.config.vision_config.image_size))
    return model, ViTPProcessor(image_processor, tokenizer, image_seq_length=model.config.image_seq_length)


def check_embeddings(language: PreTrainedModel, name: str) -> None:
    """Raise a `ValueError` if the embeddings or the head of a language model cannot be those of a ViTP."""
    head = language.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"Expected {name} to have a linear LM head without bias, found {head}.")
    if language.config.tie_word_embeddings and not hasattr(language.base_model, "embed_tokens"):
        raise ValueError(
            f"{name}, a {language.config.model_type!r}, must tie its LM head to embeddings named embed_tokens, the "
            "only name that transformers' InternVL supports."
        )


def combine(
    vision: PreTrainedModel, language: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> ViTPForConditionalGeneration:
    """Return a model of a ViT and a causal LM, which it shares, with a new projector."""
    config = ViTPConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    with torch.device("meta"):
        model = ViTPForConditionalGeneration(config)
    projector = InternVLMultiModalProjector(config)
    projector.apply(model._init_weights)
    model.model.vision_tower = vision
    model.model.multi_modal_projector = projector.to(vision.dtype)
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.tie_weights()
    model.generation_config = language.generation_config
    model.generation_config.eos_token_id = stop_tokens(language, tokenizer)
    return model


def vision_config_of(vision_model: str, image_size: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a ViT with the size of its tiles, see [`compose`]."""
    try:
        config = open_vit_config(vision_model)
    except ValueError as error:
        raise ValueError(f"vision_model {error}") from error
    side, _ = pair(config.image_size)
    patch, _ = pair(config.patch_size)
    token_side = 2 * patch  # two by two patches become one token
    if not image_size:
        image_size = side // token_side * token_side
    if image_size % token_side:
        raise ValueError(
            f"Expected vision_image_size in multiples of {token_side}, two patches of {vision_model}, got {image_size}."
        )
    if image_size == side:
        return config
    return tower_of(config).resize(config, (image_size, image_size), (patch, patch))


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel) -> None:
    """Add missing special tokens to a tokenizer, and draw their embeddings.

    Embedding tables are often padded with untrained rows. New tokens that use such rows get new embeddings too. They
    are drawn as in a new model. Around the mean of the others, they would be nearly equal, and LoRA, which does not
    train them, could never tell the new tokens apart.
    """
    vocabulary = tokenizer.get_vocab()
    missing_tokens = [token for token in (TURN_END, *MARKS) if token not in vocabulary]
    if not missing_tokens:
        return
    tokenizer.add_special_tokens({"extra_special_tokens": missing_tokens}, replace_extra_special_tokens=False)
    num_tokens_before = 1 + max(vocabulary.values())
    num_tokens = 1 + max(tokenizer.get_vocab().values())
    num_embeddings = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(min(num_tokens_before, num_embeddings))
    language.resize_token_embeddings(max(num_tokens, num_embeddings), mean_resizing=False)


def check_language_model(name: str) -> None:
    """Raise a `ValueError` if a folder or Hub id has a ViT."""
    model_type = open_config(name).model_type
    if model_type in TOWERS:
        raise ValueError(f"Expected language_model {name} to be a causal LM, found a ViT ({model_type!r}).")


def check_report(name: str, report: dict) -> None:
    """Raise a `ValueError` if loading reported missing, unexpected or mismatched weights."""
    wrong_weights = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong_weights:
        raise ValueError(f"The weights of {name} do not match its configuration: {wrong_weights}")


def stop_tokens(language: PreTrainedModel, tokenizer) -> list[int]:
    """Return the token ids that end generation: the end of a turn, and the stop tokens of the language model."""
    stop_tokens_of_language = language.generation_config.eos_token_id or []
    if isinstance(language.generation_config.eos_token_id, int):
        stop_tokens_of_language = [language.generation_config.eos_token_id]
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
    return list(dict.fromkeys([turn_end, *stop_tokens_of_language]))  # without duplicates


@torch.no_grad()
def check_logits(model, language: PreTrainedModel, input_ids: torch.LongTensor, name: str) -> None:
    """Raise a `ValueError` if the combined model computes other logits than the LM, such as an LM that caps logits."""
    model.eval()
    language.eval()
    mask = torch.ones_like(input_ids)
    expected_logits = language(input_ids=input_ids, attention_mask=mask).logits
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    if not torch.equal(logits, expected_logits):
        raise ValueError(f"{name}, a {language.config.model_type!r}, computes its logits differently from ViTP.")


def check_config(place: str, settings: Any, config_class: type[PreTrainedConfig], taken: Collection[str] = ()) -> None:
    """Check that a configuration class and its sub-configurations have all keys; values are not checked.

    Args:
        place: location of the settings in the recipe's configuration, such as `from_scratch.vision_config`.
        settings: mapping of settings, or `None`.
        config_class: configuration class.
        taken: names of fields that must not be set.

    Raises:
        ValueError: if a key is unknown; the message has the location, the key and the closest known key.
    """
    check_keys(place, settings, known_keys(config_class).difference(taken), config_class.__name__)
    if not settings:
        return
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict):
        check_rope(f"{place}.rope_parameters", rope)
    for name, spec in config_class.sub_configs_defaults.items():
        sub_settings = settings.get(name)
        if not isinstance(sub_settings, dict):
            continue
        sub_class = spec.config_class
        if not issubclass(sub_class, PreTrainedConfig):
            sub_class = config_class_of(f"{place}.{name}", sub_settings, spec.model_type)
        check_config(f"{place}.{name}", sub_settings, sub_class)


def check_rope(place: str, rope: dict) -> None:
    """Check the keys of the parameters of rotary embeddings."""
    class_name = "transformers' RopeParameters"
    if not all(isinstance(parameters, dict) for parameters in rope.values()):
        check_keys(place, rope, RopeParameters.__annotations__, class_name)
        return
    # The parameters of models with several types of layers are mappings by the type of the layer.
    for layer_type, parameters in rope.items():
        check_keys(f"{place}.{layer_type}", parameters, RopeParameters.__annotations__, class_name)


def config_class_of(place: str, settings: Any, model_type: str) -> type[PreTrainedConfig]:
    """Return the class of a sub-configuration, by its `model_type` if it has one."""
    if isinstance(settings, dict):
        model_type = settings.get("model_type", model_type)
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), [*CONFIG_MAPPING], n=1, cutoff=0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else " in transformers."
        raise ValueError(f"{place}: unknown model_type {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]
