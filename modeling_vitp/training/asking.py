"""What a model answers to conversations, several at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ..modeling_vitp import ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor


def generate_answers(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images_kwargs: dict[str, Any] | None = None,
    samples: int = 1,
    **generate_kwargs,
) -> list[str]:
    """One answer to each conversation, or `samples` of them one after the other; greedy by default.

    Every visual token is kept. The model stays in the mode and on the device that it is in.

    Args:
        conversations: messages up to a question, with their images in them as the chat template takes them. They may
            have different numbers of images.
        images_kwargs: for the image processor, the same for all.
        samples: answers to each conversation, which is read once for all of them.
        generate_kwargs: for `generate`.
    """
    sides = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={**sides, **(images_kwargs or {})},
    ).to(model.device, model.dtype)
    options = {"do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id, **generate_kwargs}
    if samples > 1:
        inputs = read_once(model, inputs, samples)
    generated = model.generate(**inputs, **options)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read_once(
    model: ViTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], samples: int
) -> dict[str, torch.Tensor | Cache]:
    """For `generate`, each prompt `samples` times one after the other, with a cache of all but its last token.

    `num_return_sequences` would have the language model read the prompt, its visual tokens too, for every sample anew.
    """
    prompt = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
    positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**{**inputs, **prompt}, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(samples)
    repeated = {name: inputs[name].repeat_interleave(samples, 0) for name in prompt}
    return {**repeated, "cache": cache}
