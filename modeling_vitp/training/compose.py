"""Any ViT with any language model: both pretrained, a fresh projector between them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.utils import cached_file

from ..configuration_vitp import ViTPConfig
from ..convert.finite import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration, ViTPVisionModel
from ..processing_vitp import ViTPProcessor
from .from_scratch import MARKS, TURN_END

SAMPLE = "The trees stand in rows."


def compose(
    vision_model: str, language_model: str, drop_path_rate: float | None = None, **options
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """A model of a pretrained ViT and a pretrained causal LM, and its processor.

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
    """That of a backbone, a folder or Hub id, if it has one, for images of this height and width.

    Args:
        settings: what it has instead of its own.
    """
    settings["size"] = dict(zip(("height", "width"), size))
    if cached_file(vision_model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False):
        return ViTPImageProcessor.from_pretrained(vision_model, **settings)
    return ViTPImageProcessor(**settings)


def add_marks(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel) -> None:
    """Adds the marks that a tokenizer lacks, and draws their embeddings: also those that have a row already, of the
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
    """Raises a `ValueError` if loading left weights out or made them up."""
    wrong = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"The weights of {name} do not fit its configuration: {wrong}")


def stop_tokens(language: PreTrainedModel, tokenizer) -> list[int]:
    """The end of a turn, and what the language model stopped at before."""
    before = language.generation_config.eos_token_id
    before = [before] if isinstance(before, int) else list(before or [])
    return list(dict.fromkeys([tokenizer.convert_tokens_to_ids(TURN_END), *before]))


@torch.no_grad()
def check_logits(model, language: PreTrainedModel, input_ids: torch.LongTensor, name: str) -> None:
    """Some LMs scale or cap their logits in their own head class; the composed model would silently not."""
    model.eval(), language.eval()
    mask = torch.ones_like(input_ids)
    wanted = language(input_ids=input_ids, attention_mask=mask).logits
    if not torch.equal(model(input_ids=input_ids, attention_mask=mask).logits, wanted):
        raise ValueError(f"{name}, a {language.config.model_type!r}, computes its logits in a way that ViTP does not.")
