"""What the full model answers about images: the prompt, the probability of an answer, and answers as they are made."""

import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.bands import describe_bands

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")
BOX_MARKS = {"<ref>", "</ref>", "<box>", "</box>"}
MAX_QUESTION = 2000  # characters
MAX_LENGTH = 8192  # tokens of a prompt and its answer, so that memory is bounded


class Answer(NamedTuple):
    """An answer under a drop ratio, beside the one that the model gives with all visual tokens."""

    drop_ratio: float
    seed: int
    num_visual_tokens: int
    """That are kept."""
    sequence_length: int
    """Of the prompt, in tokens."""
    text: str
    probability: float
    """Of this answer."""
    full_probability: float
    """Of the answer that is given with all visual tokens."""


def encode(
    processor: ViTPProcessor,
    images: Sequence[Image.Image],
    messages: list[dict[str, str]],
    drop_ratio: float = 0.0,
    seed: int = 0,
) -> BatchFeature:
    """A conversation as the model takes it, with the images before its first question.

    Args:
        images: 8-bit RGB. They are taken as they are: the processor's own input spec belongs to reading the file.
        messages: `{"role", "content"}`, both text; the last one is the question.
        drop_ratio: r of Visual Robustness Learning; which tokens are kept depends on `seed` alone.

    Raises:
        ValueError: if the model takes other bands, the question is empty or too long, or a message holds an image
            token literally.
    """
    bands = processor.image_processor.band_names
    if bands is not None:
        raise ValueError(
            f"The model takes {describe_bands(bands)}, and questions here are about red, green and blue: its ViT can "
            "be seen in the tab Backbone."
        )
    question = messages[-1]["content"]
    if not question.strip():
        raise ValueError("The question is empty: type one first.")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are the most.")
    places = [{"type": "image"} for _ in images]
    first, *others = messages
    first = {"role": first["role"], "content": [*places, {"type": "text", "text": first["content"]}]}
    text = processor.apply_chat_template([first, *others], add_generation_prompt=True)
    return processor(
        images=list(images) or None,
        text=text,
        input_spec=None,
        vrl_drop_ratio=drop_ratio,
        vrl_keys=[(seed,)],
        return_tensors="pt",
    )


def decode(processor: ViTPProcessor, ids: torch.Tensor | Sequence[int]) -> str:
    """The text of an answer, with its marks for phrases and boxes, without other special tokens."""
    return readable(processor, processor.tokenizer.decode(ids, skip_special_tokens=False)).strip()


def readable(processor: ViTPProcessor, text: str) -> str:
    """Without special tokens (ends, padding, image tokens) but for the marks of phrases and boxes."""
    for token in set(processor.tokenizer.all_special_tokens) - BOX_MARKS:
        text = text.replace(token, "")
    return text


@torch.no_grad()
def visual_features(model: ViTPForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """All projected visual tokens of some tiles, of shape `(num_tokens, hidden_size)`."""
    return model.get_image_features(pixel_values.to(model.device), return_dict=True).pooler_output.flatten(0, 1)


def text_inputs(model: ViTPForConditionalGeneration, inputs: BatchFeature, features: torch.Tensor) -> dict:
    """The model's arguments without the tiles, which are encoded already: `features` as `visual_features` gives them.

    So the ViT runs once for all drop ratios and seeds; the projector works token by token, so that dropping after it
    is the same as dropping before it.
    """
    kept = inputs.get("visual_token_indices")
    features = features if kept is None else features[kept.to(features.device)]
    # A group of its own for each token, as under VRL; a new object for each call, because models cache in it.
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features.unsqueeze(1))}
    return {
        **{name: inputs[name].to(model.device) for name in TEXT_INPUTS if name in inputs},
        "mm_encoder_outputs": encoded,
    }


@torch.no_grad()
def answer_log_probs(
    model: ViTPForConditionalGeneration, inputs: BatchFeature, features: torch.Tensor, answer: torch.LongTensor
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Args:
        answer: token ids of shape `(length,)`, with the end of turn where it was reached.

    Returns:
        The log-probability of each token after the prompt and the tokens before it, float32 of shape `(length,)`, and
        the likeliest token in the place of each, as `greedy_answer` would choose it.
    """
    arguments = text_inputs(model, inputs, features)
    answer = answer.to(model.device)
    arguments["input_ids"] = torch.cat([arguments["input_ids"], answer[None]], dim=1)
    arguments["attention_mask"] = F.pad(arguments["attention_mask"], (0, len(answer)), value=1)
    if "position_ids" in arguments:
        following = arguments["position_ids"][:, -1:] + 1 + torch.arange(len(answer), device=model.device)
        arguments["position_ids"] = torch.cat([arguments["position_ids"], following], dim=1)
    logits = model(**arguments, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1].float()
    log_probs = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    logits[:, model.config.image_token_id] = -torch.inf
    return log_probs, logits.argmax(-1)


def greedy(model: ViTPForConditionalGeneration, max_new_tokens: int) -> dict:
    """Options of `generate`: the likeliest token each time, but never an image token, which stands for an image."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }


@torch.no_grad()
def greedy_answer(
    model: ViTPForConditionalGeneration, inputs: BatchFeature, features: torch.Tensor, max_new_tokens: int
) -> torch.LongTensor:
    """Token ids of the likeliest answer, token by token, with the end of turn if it was reached."""
    generated = model.generate(**text_inputs(model, inputs, features), **greedy(model, max_new_tokens))
    return generated[0, inputs["input_ids"].shape[1] :]


def answers_by_drop_ratio(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    image: Image.Image,
    question: str,
    drop_ratios: Sequence[float],
    seeds: Sequence[int],
    max_new_tokens: int = 16,
) -> Iterator[Answer]:
    """The greedy answers at each drop ratio, ascending, for each seed; first the one with all visual tokens.

    A generator, so that the caller can show progress and results as they come, and can stop.

    Raises:
        ValueError: if the question is empty, too long, or holds an image token literally.
    """
    messages = [{"role": "user", "content": question}]
    inputs = encode(processor, [image], messages)
    check_length(model, inputs, max_new_tokens)
    features = visual_features(model, inputs["pixel_values"])
    full = greedy_answer(model, inputs, features, max_new_tokens)
    probability = answer_log_probs(model, inputs, features, full)[0].sum().exp().item()
    length = inputs["input_ids"].shape[1]
    yield Answer(0.0, seeds[0], len(features), length, decode(processor, full), probability, probability)

    for drop_ratio in sorted(set(drop_ratios) - {0.0}):
        for seed in seeds:
            inputs = encode(processor, [image], messages, drop_ratio, seed)
            log_probs, likeliest = answer_log_probs(model, inputs, features, full)
            answer, own = full, log_probs
            if not likeliest.equal(full.to(likeliest.device)):
                answer = greedy_answer(model, inputs, features, max_new_tokens)
                own, _ = answer_log_probs(model, inputs, features, answer)
            yield Answer(
                drop_ratio,
                seed,
                len(inputs["visual_token_indices"]),
                inputs["input_ids"].shape[1],
                decode(processor, answer),
                own.sum().exp().item(),
                log_probs.sum().exp().item(),
            )


class StopOn(StoppingCriteria):
    """Ends a generation once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def check_length(model: ViTPForConditionalGeneration, inputs: BatchFeature, max_new_tokens: int) -> None:
    """Raises `ValueError` if prompt and answer may not fit into the language model."""
    length = inputs["input_ids"].shape[1]
    limit = min(MAX_LENGTH, model.config.text_config.max_position_embeddings)
    if length + max_new_tokens > limit:
        raise ValueError(
            f"Images, conversation and an answer of up to {max_new_tokens} tokens come to {length + max_new_tokens} "
            f"tokens, of at most {limit}: start a new conversation, or ask for shorter answers."
        )


def stream_answer(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, inputs: BatchFeature, max_new_tokens: int = 256
) -> Iterator[str]:
    """The greedy answer so far, each time that it grows.

    Closing the generator, or dropping it, ends the generation after its next token.
    """
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=False)
    stopped, errors = threading.Event(), []

    def generate():
        try:
            model.generate(
                **inputs.to(model.device),
                **greedy(model, max_new_tokens),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopOn(stopped)]),
            )
        except Exception as error:  # of the other thread; raised in this one
            errors.append(error)
            streamer.end()

    thread = threading.Thread(target=copy_context().run, args=(generate,))  # in which the answer's time is known
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield readable(processor, text).lstrip()
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]
