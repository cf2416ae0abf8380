"""Answers of the full model about images: prompts, streamed answers and their probabilities, and drawn boxes."""

import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from typing import NamedTuple

import gradio as gr
import limits
import torch
from loading import FullModel
from PIL import Image, ImageDraw, ImageFont
from transformers import BatchFeature, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.bands import describe_bands
from modeling_vitp.instructions.boxes import GridBox

PROGRESS = gr.Progress()
"""Default of the argument by which a handler reports progress. It does nothing outside of the page and its API."""
QUESTION = "How many trees are there?"
BOX_MARKS = {"<ref>", "</ref>", "<box>", "</box>"}
MAX_LENGTH = 8192  # tokens of a prompt and its answer, so that memory is bounded
MAX_LABEL = 40  # characters
# Bright colors, distinguishable with color blindness, for black labels.
COLORS = ("#ffb000", "#35c2ff", "#ff77b6", "#4be08a", "#c9a6ff", "#f6f04a", "#ff8a5c", "#9fe3e0")


class Answer(NamedTuple):
    """Answer at a drop ratio.

    Args:
        num_visual_tokens: number of visual tokens that are kept.
        sequence_length: length of the prompt, in tokens.
        probability: probability of this answer.
        full_probability: probability, at this drop ratio, of the answer that the model gives with all visual tokens.
    """

    drop_ratio: float
    seed: int
    num_visual_tokens: int
    sequence_length: int
    text: str
    probability: float
    full_probability: float


def encode(
    processor: ViTPProcessor,
    images: Sequence[Image.Image],
    question: str,
    drop_ratio: float = 0.0,
    seed: int = 0,
) -> BatchFeature:
    """Encode 8-bit RGB images and a question for the model. The choice of the kept tokens depends on `seed` only.

    Raises:
        ValueError: if the model takes other bands, or the question is empty, too long, or contains an image token.
    """
    bands = processor.image_processor.band_names
    if bands is not None:
        raise ValueError(
            f"The model takes {describe_bands(bands)}, but this tab sends RGB images. Use the tab Look inside to "
            "see its ViT."
        )
    if not question.strip():
        raise ValueError("The question is empty. Type a question first.")
    if len(question) > limits.QUESTION:
        raise ValueError(f"The question has {len(question):,} characters. At most {limits.QUESTION:,} are accepted.")
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": question})
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(
        images=list(images) or None,
        text=prompt,
        add_special_tokens=False,
        input_spec=None,
        vrl_drop_ratio=drop_ratio,
        vrl_keys=[(seed,)],
        return_tensors="pt",
    )


def decode(processor: ViTPProcessor, ids: torch.Tensor | Sequence[int]) -> str:
    """Decode an answer, see [`readable`]."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    return readable(processor, text).strip()


def readable(processor: ViTPProcessor, text: str) -> str:
    """Remove the special tokens (end, padding, image tokens) from a text, except the marks of phrases and boxes."""
    for token in set(processor.tokenizer.all_special_tokens) - BOX_MARKS:
        text = text.replace(token, "")
    return text


@torch.no_grad()
def visual_features(model: ViTPForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the projected visual tokens of all tiles, of shape `(num_tokens, hidden_size)`."""
    outputs = model.get_image_features(pixel_values.to(model.device), return_dict=True)
    return outputs.pooler_output.flatten(0, 1)


def text_inputs(
    model: ViTPForConditionalGeneration,
    inputs: BatchFeature,
    features: torch.Tensor,
    answer: torch.LongTensor | None = None,
) -> dict:
    """Return the arguments of the model, with the output of `visual_features` in place of the tiles.

    The ViT then runs once for all drop ratios and seeds. Tokens may be dropped after the projector because the
    projector processes each token separately.

    Args:
        answer: token ids of shape `(length,)` that follow the prompt.
    """
    arguments = {}
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in inputs:
            arguments[name] = inputs[name].to(model.device)
    if answer is not None:
        answer = answer.to(model.device)[None]
        arguments["input_ids"] = torch.cat([arguments["input_ids"], answer], dim=1)
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        if "position_ids" in arguments:
            offsets = 1 + torch.arange(answer.shape[1], device=model.device)
            positions_of_answer = arguments["position_ids"][:, -1:] + offsets
            arguments["position_ids"] = torch.cat([arguments["position_ids"], positions_of_answer], dim=1)
    kept_indices = inputs.get("visual_token_indices")
    if kept_indices is not None:
        features = features[kept_indices.to(features.device)]
    # Each token is a group, as under VRL. The object is new in each call because models cache in it.
    encoded = BaseModelOutputWithPooling(pooler_output=features.unsqueeze(1))
    return {**arguments, "mm_encoder_outputs": {"image": encoded}}


@torch.no_grad()
def answer_log_probs(
    model: ViTPForConditionalGeneration,
    inputs: BatchFeature,
    features: torch.Tensor,
    answer: torch.LongTensor,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Return the log-probability of each token of an answer given the tokens before it, and the choice of the model.

    Both have the shape `(length,)` of the answer. The choice at each position is that of `greedy_answer`.
    """
    arguments = text_inputs(model, inputs, features, answer)
    outputs = model(**arguments, logits_to_keep=len(answer) + 1, use_cache=False)
    logits = outputs.logits[0, :-1].float()
    log_probs = logits.log_softmax(-1).gather(1, answer.to(logits.device)[:, None])[:, 0]
    logits[:, model.config.image_token_id] = -torch.inf
    return log_probs, logits.argmax(-1)


def greedy(model: ViTPForConditionalGeneration, max_new_tokens: int) -> dict:
    """Return the options of `generate` for greedy decoding without image tokens."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }


@torch.no_grad()
def greedy_answer(
    model: ViTPForConditionalGeneration,
    inputs: BatchFeature,
    features: torch.Tensor,
    max_new_tokens: int,
) -> torch.LongTensor:
    """Return the token ids of the greedy answer, including the end of turn if it was generated."""
    generated = model.generate(**text_inputs(model, inputs, features), **greedy(model, max_new_tokens))
    prompt_length = inputs["input_ids"].shape[1]
    return generated[0, prompt_length:]


def answers_by_drop_ratio(
    full: FullModel,
    image: Image.Image,
    question: str,
    drop_ratios: Sequence[float],
    seeds: Sequence[int],
    max_new_tokens: int = 16,
) -> Iterator[Answer]:
    """Yield the greedy answer with all visual tokens, then those at each drop ratio (ascending) and seed."""
    model = full.model
    processor = full.processor
    inputs = encode(processor, [image], question)
    check_length(model, inputs, max_new_tokens)
    features = visual_features(model, inputs["pixel_values"])
    full_answer = greedy_answer(model, inputs, features, max_new_tokens)
    for drop_ratio in sorted({0.0, *drop_ratios}):
        # All seeds keep the same tokens at a drop ratio of 0.
        for seed in seeds if drop_ratio else seeds[:1]:
            inputs = encode(processor, [image], question, drop_ratio, seed)
            full_log_probs, likeliest = answer_log_probs(model, inputs, features, full_answer)
            answer = full_answer
            log_probs = full_log_probs
            if drop_ratio and not likeliest.equal(full_answer.to(likeliest.device)):
                answer = greedy_answer(model, inputs, features, max_new_tokens)
                log_probs, _ = answer_log_probs(model, inputs, features, answer)
            yield Answer(
                drop_ratio=drop_ratio,
                seed=seed,
                num_visual_tokens=len(inputs["visual_token_indices"]) if drop_ratio else len(features),
                sequence_length=inputs["input_ids"].shape[1],
                text=decode(processor, answer),
                probability=log_probs.sum().exp().item(),
                full_probability=full_log_probs.sum().exp().item(),
            )


def check_length(model: ViTPForConditionalGeneration, inputs: BatchFeature, max_new_tokens: int) -> None:
    """Raise `ValueError` if prompt and answer may exceed the context of the language model."""
    length = inputs["input_ids"].shape[1] + max_new_tokens
    limit = min(MAX_LENGTH, model.config.text_config.max_position_embeddings)
    if length > limit:
        raise ValueError(
            f"Images, question and an answer of up to {max_new_tokens} tokens have {length} tokens, more than the "
            f"limit of {limit}. Use a smaller image, or ask for shorter answers."
        )


def stream_answer(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    inputs: BatchFeature,
    max_new_tokens: int = 256,
) -> Iterator[str]:
    """Yield the greedy answer so far after each token.

    Closing or deleting the generator ends the generation after its next token.
    """
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=False)
    stopped = threading.Event()
    errors = []

    def is_stopped(input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], stopped.is_set(), dtype=torch.bool, device=input_ids.device)

    def generate():
        try:
            model.generate(
                **inputs.to(model.device),
                **greedy(model, max_new_tokens),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([is_stopped]),
            )
        except Exception as error:  # Raised again in the thread that reads the stream.
            errors.append(error)
            streamer.end()

    # The copied context holds the deadline of the answer, which `check_time` reads.
    thread = threading.Thread(target=copy_context().run, args=(generate,))
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


def draw_boxes(image: Image.Image, boxes: Sequence[GridBox]) -> Image.Image:
    """Draw boxes on a copy of an image, each with its phrase or number. Boxes of one phrase have the same color."""
    picture = image.convert("RGB")
    width, height = image.size
    phrases = list(dict.fromkeys(box.phrase for box in boxes))
    for number, box in enumerate(boxes, start=1):
        left, top, right, bottom = box.in_pixels((height, width))
        right = max(left, right - 1)
        bottom = max(top, bottom - 1)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        color = COLORS[phrases.index(box.phrase) % len(COLORS)]
        draw_outline(picture, corners, color, box.phrase[:MAX_LABEL] or str(number))
    return picture


def draw_outline(
    image: Image.Image,
    corners: Sequence[tuple[float, float]],
    color: str | tuple[int, int, int],
    label: str,
) -> None:
    """Draw a polygon on an image, with its label above it, or inside at the top of the image."""
    pen = ImageDraw.Draw(image)
    longest_side = max(image.size)
    line_width = max(2, round(longest_side / 300))
    font = ImageFont.load_default(max(11, round(longest_side / 50)))
    pen.polygon(corners, outline=color, width=line_width)
    _, _, text_width, text_height = pen.textbbox((0, 0), label, font=font, anchor="lt")
    label_width = text_width + 2 * line_width
    label_height = text_height + 2 * line_width
    left = min(x for x, _ in corners)
    top = min(y for _, y in corners)
    x = min(max(left, 0), max(image.width - label_width, 0))
    y = top - label_height
    if y < 0:
        y = max(top, 0)
    pen.rectangle((x, y, x + label_width, y + label_height), fill=color)
    pen.text((x + line_width, y + line_width), label, fill="black", font=font, anchor="lt")
