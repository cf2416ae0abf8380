"""Load the start of a pretraining: a checkpoint, a ViT with a language model, or a model from scratch."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.utils import cached_file

from ..bands import spread_bands
from ..configuration_vitp import ViTPConfig, ViTPVisionConfig, check_keys, known_keys
from ..convert.internvl import from_internvl, internvl_processor
from ..convert.tensor_files import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import VISION_MODELS, ViTPForConditionalGeneration, ViTPVisionModel
from ..opening import check_fields, naming
from ..processing_vitp import ViTPProcessor

if TYPE_CHECKING:  # the Space builds a model without TRL
    from trl import ModelConfig

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = [TURN_START, "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>"]
SAMPLE = "The trees stand in rows."
NEEDED = ("vision_config", "text_config", "vocab_size")  # of from_scratch


def check_options(model_args: "ModelConfig", from_scratch: dict | None, model_init_kwargs: dict | None = None) -> None:
    """Raise a `ValueError` if the options of the model have one that would change nothing."""
    packed = [name for name in vars(model_args) if name.startswith(("load_in_", "bnb_", "use_bnb_"))]
    packed = [name for name in packed if getattr(model_args, name) != getattr(type(model_args)(), name)]
    if packed:
        raise ValueError(
            f"{' and '.join(packed)}: weights are trained as they are, and not in 4 or 8 bits: leave that out. Less "
            "memory is what use_peft, the options freeze_… and --dtype bfloat16 need."
        )
    if from_scratch is not None and model_args.dtype not in (None, "auto", "float32"):
        raise ValueError(
            f"dtype={model_args.dtype!r} is of a model that is loaded; one from_scratch begins in float32: leave it "
            "out; --bf16 true computes in bfloat16."
        )
    if model_init_kwargs:
        raise ValueError(
            "model_init_kwargs are of a trainer that is given the name of a model in Python: give dtype, "
            "attn_implementation and model_revision instead."
        )


def load_start(
    model_args: "ModelConfig",
    from_scratch: dict | None,
    texts: Iterable[str],
    drop_path_rate: float | None = None,
    vision_model: str | None = None,
    language_model: str | None = None,
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Load the model and processor that the arguments ask for; `texts` train the tokenizer of one from scratch.

    With `from_scratch`, a `vision_model` gives the ViT its weights and says how images are read, but for what
    `from_scratch` says of it, and the rest begins at nothing.

    Raises:
        ValueError: if not exactly one start is given, the checkpoint is of another kind, or its keys do not fit.
    """
    name = model_args.model_name_or_path
    if (vision_model is None) != (language_model is None) and (from_scratch is None or vision_model is None):
        raise ValueError("vision_model and language_model belong together: give both, or neither.")
    if sum(start is not None for start in (name, from_scratch, language_model)) != 1:
        raise ValueError(
            "Give either model_name_or_path or from_scratch in the configuration, or vision_model with language_model: "
            "where training starts. A from_scratch that the configuration has is taken back by --from_scratch '{}'."
        )
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if from_scratch is not None:
        model, processor = start_from_scratch(from_scratch, texts, drop_path_rate)
        if vision_model is not None:
            give_weights(model.model.vision_tower, vision_model)
            settings = from_scratch.get("image_processor") or {}
            size = model.config.vision_config.image_size
            processor.image_processor = image_processor_of(vision_model, size, **settings)
        if model_args.attn_implementation is not None:
            model.set_attn_implementation(model_args.attn_implementation)
        return model, processor
    if vision_model is not None:
        return compose(vision_model, language_model, drop_path_rate, **options)

    return load_checkpoint(name, drop_path_rate, revision=model_args.model_revision, **options)


def load_checkpoint(
    name: str, drop_path_rate: float | None = None, revision: str | None = None, **options
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Load a ViTP or transformers' InternVL, from a folder or the Hub, and its processor.

    Args:
        drop_path_rate: stochastic depth of the ViT; as it is configured if not given.
        revision: branch, tag or commit on the Hub.
        options: for `from_pretrained` (`dtype`, `attn_implementation` …).
    """
    revision = {"revision": revision or "main"}
    classes = {"vitp": ViTPForConditionalGeneration, "internvl": InternVLForConditionalGeneration}
    with naming(name, PreTrainedConfig):
        fields = PreTrainedConfig.get_config_dict(name, **revision)[0]
        check_fields(f"{name}/config.json", fields)
    model_type = fields.get("model_type")
    if model_type in [*VISION_MODELS]:
        raise ValueError(
            f"{name} is a backbone, without a language model: give it as --vision_model, with language_model or "
            "from_scratch."
        )
    if model_type not in [*classes]:
        raise ValueError(
            f"{name} is a {model_type!r} model; training starts from {' or '.join(classes)}. Checkpoints of InternVL's "
            f"own code are converted first: vitp convert {name} FOLDER."
        )
    with naming(name, PreTrainedConfig):
        config = AutoConfig.from_pretrained(name, **revision)
    if drop_path_rate is not None:
        config.vision_config.drop_path_rate = drop_path_rate
    model, report = classes[model_type].from_pretrained(
        name, config=config, output_loading_info=True, **options, **revision
    )
    check_report(name, report)
    check_finite(model.state_dict(), name)
    if model_type == "vitp":
        return model, ViTPProcessor.from_pretrained(name, **revision)
    return from_internvl(model), internvl_processor(name, **revision)


def check_from_scratch(settings: dict | None) -> None:
    """Raise a `ValueError` if `from_scratch` lacks something, or has a key that the model or its processor has not."""
    if settings is None:
        return
    check_keys("from_scratch", settings, [*NEEDED, "image_processor"], "a model from scratch")
    missing = [name for name in NEEDED if settings.get(name) is None]
    if missing:
        raise ValueError(f"from_scratch: there is no {' and no '.join(missing)}, and {', '.join(NEEDED)} are needed.")
    check_config("from_scratch.vision_config", settings["vision_config"], ViTPVisionConfig)
    text_config = settings["text_config"]
    check_config(
        "from_scratch.text_config", text_config, config_class_of("from_scratch.text_config", text_config, "qwen2")
    )
    # The processor's size is the ViT's.
    known = {*ViTPImageProcessor.valid_kwargs.__annotations__} - {"size"}
    check_keys("from_scratch.image_processor", settings.get("image_processor"), known, ViTPImageProcessor.__name__)


def start_from_scratch(
    settings: dict, texts: Iterable[str], drop_path_rate: float | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a model with random weights and a tokenizer trained on `texts`; see [`check_from_scratch`]."""
    check_from_scratch(settings)
    vision_config = dict(settings["vision_config"])
    if drop_path_rate is not None:
        vision_config["drop_path_rate"] = drop_path_rate
    tokenizer = build_tokenizer(texts, settings["vocab_size"])
    return build_model(tokenizer, vision_config, settings["text_config"], settings.get("image_processor"))


def give_weights(vision_tower: ViTPVisionModel, name: str) -> None:
    """Load the weights of a backbone, a folder or Hub id, into a ViT of its shape.

    Raises:
        ValueError: if it has another shape.
    """
    given = load_vision(name, None, {})
    check_finite(given.state_dict(), name)
    try:
        vision_tower.load_state_dict(given.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"The weights of vision_model {name} do not fit from_scratch.vision_config: {reason}"
        ) from error


def tiling(
    name: str | None, from_scratch: dict | None, vision_model: str | None = None, max_patches: int | None = None
) -> tuple[ViTPImageProcessor, int]:
    """The image processor of a start and the visual tokens of a tile, as far as that is known on this machine: from
    the settings of a model from scratch or the folder of a model or backbone; else InternVL2.5's.
    """
    backbone = vision_model if vision_model is not None and Path(vision_model).is_dir() else None
    if from_scratch is not None:
        config, settings = ViTPConfig(vision_config=from_scratch["vision_config"]), from_scratch.get("image_processor")
        size = config.vision_config.image_size
        if backbone is not None:
            image_processor = image_processor_of(backbone, size, **(settings or {}))
        else:
            size = {"size": dict(zip(("height", "width"), size))}
            image_processor = ViTPImageProcessor(**size, **(settings or {}))
    elif backbone is not None:
        config = ViTPConfig(vision_config=AutoConfig.from_pretrained(backbone).to_dict())
        image_processor = image_processor_of(backbone, config.vision_config.image_size)
    elif name is not None and Path(name).is_dir():
        fields = PreTrainedConfig.get_config_dict(name)[0]
        config = ViTPConfig(vision_config=fields["vision_config"], downsample_ratio=fields.get("downsample_ratio", 0.5))
        image_processor = ViTPImageProcessor.from_pretrained(name)
    else:
        config, image_processor = ViTPConfig(), ViTPImageProcessor()
    image_processor.max_patches = max_patches or image_processor.max_patches
    return image_processor, config.image_seq_length


def apply_input_spec(
    input_spec: dict, model: ViTPForConditionalGeneration, processor: ViTPProcessor, use_peft: bool = False
) -> None:
    """Has images read by an input spec. If it names bands, weights for red, green and blue are spread over them, see
    [`~modeling_vitp.spread_bands`], and so are mean and standard deviation.

    Args:
        use_peft: whether an adapter is trained, which is of use with the model that it starts from alone.

    Raises:
        ValueError: if the model is for other bands, or an adapter would be one of a model that is saved nowhere.
    """
    processor.image_processor = processor.image_processor.with_input_spec(input_spec)
    names = processor.image_processor.band_names
    if names is None:
        return
    if use_peft and model.config.vision_config.band_names is None:
        raise ValueError(
            "use_peft: an adapter needs its model as it was, and the weights of this one are spread over other bands. "
            "Save it first, vitp convert MODEL FOLDER --to vitp --input_spec JSON, and start from FOLDER."
        )
    spread_bands(model, names)


def check_compatible(model: ViTPForConditionalGeneration, processor: ViTPProcessor) -> None:
    """Raise a `ValueError` if the processor's tiles or tokens are not what the model expects."""
    if not isinstance(processor, ViTPProcessor):
        raise ValueError(f"processing_class is a {type(processor).__name__}, but a ViTPProcessor is needed.")
    config = model.config
    size = processor.image_processor.size
    pairs = {
        "image_seq_length": (config.image_seq_length, processor.image_seq_length),
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "image size": (list(config.vision_config.image_size), [size["height"], size["width"]]),
        "band_names": (config.vision_config.band_names, processor.image_processor.band_names),
    }
    for name, (expected, given) in pairs.items():
        if expected != given:
            raise ValueError(f"Model and processor do not belong together: {name} is {expected} and {given}.")
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(processor.tokenizer) > num_embeddings:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, but the model only {num_embeddings} embeddings: "
            "call model.resize_token_embeddings(len(tokenizer))."
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token: set tokenizer.pad_token.")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, with the special tokens of Qwen2.5 and InternVL2.5. Deterministic.

    All bytes are in it whatever `vocab_size` is; without texts there is nothing else.
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
    tokenizer: PreTrainedTokenizerFast, vision_config: dict, text_config: dict, image_processor: dict | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a model with random weights and its processor, with vocabulary and token ids of the tokenizer."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = ViTPConfig(
        vision_config=vision_config,
        text_config={"model_type": "qwen2", **text_config, "vocab_size": len(tokenizer), **special},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **special,
    )
    height, width = config.vision_config.image_size
    processor = ViTPProcessor(
        ViTPImageProcessor(size={"height": height, "width": width}, **(image_processor or {})),
        tokenizer,
        image_seq_length=config.image_seq_length,
    )
    return ViTPForConditionalGeneration(config), processor


def compose(
    vision_model: str, language_model: str, drop_path_rate: float | None = None, **options
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Join a pretrained ViT and a pretrained causal LM, and make their processor.

    The tokens that mark images, turns and boxes are added to the tokenizer where it lacks them, with embeddings drawn
    around the mean of the others.

    Args:
        vision_model: folder or Hub id of a backbone (`internvl_vision` or `vitp_vision`).
        language_model: folder or Hub id of a causal LM of transformers.
        drop_path_rate: stochastic depth of the ViT; as it is configured if not given.
        options: for both `from_pretrained` (`dtype`, `attn_implementation` …).

    Raises:
        ValueError: if one is of another kind, its weights do not fit its configuration, or the composed model would
            not compute the logits of the language model.
    """
    vision, language = load_vision(vision_model, drop_path_rate, options), load_language(language_model, options)
    for name, part in ((vision_model, vision), (language_model, language)):
        check_finite(part.state_dict(), name)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    add_marks(tokenizer, language)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = language.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"{language_model} has no plain linear LM head (it has {head}), which ViTP needs.")
    if language.config.tie_word_embeddings and not hasattr(language.base_model, "embed_tokens"):
        raise ValueError(
            f"{language_model}, a {language.config.model_type!r}, ties its LM head to embeddings of another name than "
            "embed_tokens, which is the only one that transformers' InternVL ties."
        )

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
    model.lm_head = head
    model.tie_weights()
    model.generation_config = language.generation_config
    model.generation_config.eos_token_id = stop_tokens(language, tokenizer)
    check_logits(model, language, tokenizer(SAMPLE, return_tensors="pt")["input_ids"], language_model)

    image_processor = image_processor_of(vision_model, config.vision_config.image_size)
    return model, ViTPProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def image_processor_of(vision_model: str, size: Sequence[int], **settings: Any) -> ViTPImageProcessor:
    """Return the image processor of a backbone, or a new one, for images of this height and width.

    Args:
        settings: what it has instead of its own.
    """
    settings["size"] = dict(zip(("height", "width"), size))
    if cached_file(vision_model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False):
        return ViTPImageProcessor.from_pretrained(vision_model, **settings)
    return ViTPImageProcessor(**settings)


def add_marks(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel) -> None:
    """Add the marks that a tokenizer lacks, and draws their embeddings: also those that have a row already, of the
    many that a table is often padded with, which nothing was learned in.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (TURN_END, *MARKS) if token not in vocabulary]
    if not missing:
        return
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    known, needed = (1 + max(some.values()) for some in (vocabulary, tokenizer.get_vocab()))
    size = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(min(known, size))
    language.resize_token_embeddings(max(needed, size))


def load_vision(name: str, drop_path_rate: float | None, options: dict) -> ViTPVisionModel:
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type not in ("internvl_vision", "vitp_vision"):
        raise ValueError(
            f"vision_model {name} is a {model_type!r}, but a backbone is expected: take it out of a whole model with "
            "vitp convert MODEL FOLDER --to backbone."
        )
    if drop_path_rate is not None:
        options = {**options, "drop_path_rate": drop_path_rate}
    model, report = ViTPVisionModel.from_pretrained(name, output_loading_info=True, **options)
    check_report(name, report)
    return model


def load_language(name: str, options: dict) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    check_report(name, report)
    return model


def check_report(name: str, report: dict) -> None:
    """Raise a `ValueError` if loading left weights out or made them up."""
    wrong = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"The weights of {name} do not fit its configuration: {wrong}")


def stop_tokens(language: PreTrainedModel, tokenizer) -> list[int]:
    """Return the end of a turn, and what the language model stopped at before."""
    before = language.generation_config.eos_token_id
    before = [before] if isinstance(before, int) else list(before or [])
    return list(dict.fromkeys([tokenizer.convert_tokens_to_ids(TURN_END), *before]))


@torch.no_grad()
def check_logits(model, language: PreTrainedModel, input_ids: torch.LongTensor, name: str) -> None:
    """Raise a `ValueError` if the LM scales or caps its logits in its own class, which the composed model would not."""
    model.eval(), language.eval()
    mask = torch.ones_like(input_ids)
    wanted = language(input_ids=input_ids, attention_mask=mask).logits
    if not torch.equal(model(input_ids=input_ids, attention_mask=mask).logits, wanted):
        raise ValueError(f"{name}, a {language.config.model_type!r}, computes its logits in a way that ViTP does not.")


def check_config(place: str, settings: Any, config_class: type[PreTrainedConfig], taken: Collection[str] = ()) -> None:
    """Look whether a configuration has all of these settings, those of its parts too; their values are not looked at.

    Args:
        place: of the settings in the recipe's configuration, such as `from_scratch.vision_config`.
        settings: a mapping, or `None` for none.
        config_class: what is made of them.
        taken: names of its fields that are not set here.

    Raises:
        ValueError: names the place, the key and the nearest that there is.
    """
    check_keys(place, settings, known_keys(config_class) - {*taken}, config_class.__name__)
    for name, spec in config_class.sub_configs_defaults.items():
        part = (settings or {}).get(name)
        if isinstance(part, dict):
            is_one = issubclass(spec.config_class, PreTrainedConfig)
            check_config(
                f"{place}.{name}",
                part,
                spec.config_class if is_one else config_class_of(f"{place}.{name}", part, spec.model_type),
            )


def config_class_of(place: str, settings: Any, model_type: str) -> type[PreTrainedConfig]:
    """Return the class of a part's configuration, by its `model_type` where it names one."""
    model_type = settings.get("model_type", model_type) if isinstance(settings, dict) else model_type
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), [*CONFIG_MAPPING], 1, 0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else " in transformers."
        raise ValueError(f"{place}: there is no model_type {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]
