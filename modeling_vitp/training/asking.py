"""What a model answers to conversations, several at a time."""

from collections.abc import Sequence
from typing import Any

from ..modeling_vitp import ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor


def generate_answers(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images_kwargs: dict[str, Any] | None = None,
    **generate_kwargs,
) -> list[str]:
    """One answer to each conversation, or `num_return_sequences` of them one after the other; greedy by default.

    Every visual token is kept. The model stays in the mode and on the device that it is in.

    Args:
        conversations: messages up to a question, with their images in them as the chat template takes them. They may
            have different numbers of images.
        images_kwargs: for the image processor, the same for all.
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
    generated = model.generate(**inputs, **options)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
