"""Generated answers to conversations in batches, and pictures of them."""

import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, IterableDataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import Cache, DynamicCache

from ..conversations import message_texts
from ..image_processing_vitp import ViTPImageProcessor
from ..images.pixels import shown
from ..instructions.boxes import read_boxes
from ..instructions.collator import ViTPDataCollator
from ..instructions.rows import images_of, sample_id_of
from ..modeling_vitp import CACHE, ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor
from ..training.callbacks import choose, component_colors, patch_maps
from .model_patches import vitp_of

MAX_NEW_TOKENS = 64
MOST_QUESTIONS = 3  # of a row, in a picture
COLORS = ("red", "green", "blue")
REFERENCE_COLOR = "#35c2ff"  # of boxes
ANSWER_COLOR = "#ffb000"
LONGEST = 360  # maximum number of characters of a text in a picture


def generate_answers(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    images_kwargs: dict[str, Any] | None = None,
    samples: int = 1,
    **generate_kwargs,
) -> list[str]:
    """Generate answers to conversations in batches, greedily by default.

    All visual tokens are kept. The mode and the device of the model do not change.

    Args:
        conversations: messages that end with a question, with images in the format of the chat template. The number of
            images may differ.
        images_kwargs: arguments of the image processor for all conversations.
        samples: number of answers per conversation; its prompt is encoded once.
        generate_kwargs: arguments of `generate`.

    Returns:
        `samples` answers to the first conversation, then to the second, and so on.
    """
    processor_kwargs = {"padding": True, "padding_side": "left", **(images_kwargs or {})}
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )
    inputs = inputs.to(model.device, model.dtype)
    options = {
        # The defaults of the model may be those of its language model, for chat: a penalty would change greedy answers.
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "pad_token_id": processor.tokenizer.pad_token_id,
        **generate_kwargs,
    }
    if samples > 1:
        inputs = prefill_prompts(model, inputs, samples)
    sequences = model.generate(**inputs, **options)
    prompt_length = inputs["input_ids"].shape[1]
    return processor.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)


def prefill_prompts(
    model: ViTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], samples: int
) -> dict[str, torch.Tensor | Cache]:
    """Return inputs of `generate` with each prompt repeated `samples` times, and a cache of all but its last token.

    With `num_return_sequences`, the language model would process each prompt and its visual tokens for every sample.
    """
    input_ids = inputs["input_ids"]
    attention_mask = inputs["attention_mask"]
    prefilled_mask = attention_mask[:, :-1]
    prefilled_inputs = {**inputs, "input_ids": input_ids[:, :-1], "attention_mask": prefilled_mask}
    positions = (prefilled_mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**prefilled_inputs, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(samples)
    return {
        "input_ids": input_ids.repeat_interleave(samples, 0),
        "attention_mask": attention_mask.repeat_interleave(samples, 0),
        CACHE: cache,
    }


def rows_to_show(dataset: Dataset | IterableDataset | dict, number: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of a data set, of the first data set of a dictionary, or of a stream; rows with images come first."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if isinstance(dataset, torch.utils.data.IterableDataset):
        rows = itertools.islice(dataset, 4 * number)
    else:
        rows = choose(dataset, 4 * number, seed)
    return sorted(rows, key=lambda row: not images_of(row))[:number]


def draw_answered_rows(
    model: ViTPForConditionalGeneration, collator: ViTPDataCollator, rows: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draw the model's answers and the features of its ViT as a PNG; its title is the name of the file."""
    answered_rows = [answer_row(model, collator, row) for row in rows]
    features = [answered.features for answered in answered_rows if answered.features is not None]
    maps = component_colors(features, path.parent)
    title = path.stem.lstrip(".").replace("-", " ")
    draw_answers(answered_rows, maps, path, title)


@dataclass
class Answered:
    """Question of a row with the model's answer.

    Args:
        name: id of the row.
        question: question.
        reference: answer of the row.
        answer: answer of the model.
        blind: answer of the model with another image, if it was generated.
        image: first image as one tile, uint8 of shape `(height, width, 3)`, or `None` without images.
        size: height and width of the original image in pixels.
        features: features of the ViT for the tile, of shape `(channels, rows, columns)`.
    """

    name: str
    question: str
    reference: str
    answer: str
    blind: str | None = None
    image: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    features: torch.Tensor | None = None


def answer_row(model: ViTPForConditionalGeneration, collator: ViTPDataCollator, row: dict[str, Any]) -> Answered:
    """Answer the first questions of a row greedily with all visual tokens.

    Each prompt has the earlier answers of the row. The mode and the device of the model do not change.
    """
    messages, _, settings = collator.conversation(row)
    prompts = []
    questions = []
    references = []
    question = ""
    for index, message in enumerate(messages):
        if message["role"] == "user":
            question = " ".join(message_texts(message))
        elif message["role"] == "assistant" and len(prompts) < MOST_QUESTIONS:
            prompts.append(messages[:index])
            questions.append(question)
            references.append(" ".join(message_texts(message)))
    processor = collator.processor
    answers = generate_answers(model, processor, prompts, settings.images_kwargs, max_new_tokens=MAX_NEW_TOKENS)
    answered = Answered(
        name=str(sample_id_of(row)),
        question=numbered(questions),
        reference=numbered(references),
        answer=numbered(answers),
    )
    image = first_image(prompts[-1])
    if image is not None:
        add_features(model, processor, image, settings.images_kwargs, answered)
    return answered


def numbered(texts: Sequence[str]) -> str:
    """Return a text, or several with their numbers."""
    if len(texts) == 1:
        return texts[0]
    return " ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))


def first_image(messages: Sequence[dict[str, Any]]) -> Any:
    """Return the first image in messages, or `None` without images."""
    for message in messages:
        if not isinstance(message["content"], list):
            continue
        for item in message["content"]:
            if item["type"] == "image":
                return item["image"]
    return None


def add_features(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, image: Any, images_kwargs: dict, answered: Answered
) -> None:
    """Add the size of an image, its tile, and the features of the ViT to an answer."""
    if isinstance(image, PIL.Image.Image):
        answered.size = (image.height, image.width)
    else:
        answered.size = tuple(image.shape[-2:])
    pixels, answered.image = tile_of(image, processor.image_processor, images_kwargs)
    vit = vitp_of(model).vision_tower
    answered.features = patch_maps(vit, pixels.to(model.device))[0]


def tile_of(
    image: Any, image_processor: ViTPImageProcessor, images_kwargs: dict[str, Any]
) -> tuple[torch.Tensor, np.ndarray]:
    """Return an image as one tile: normalized of shape `(1, channels, height, width)`, and as RGB for display."""
    options = {**images_kwargs, "max_patches": 1}
    pixels = image_processor(image, return_tensors="pt", **options)["pixel_values"][:1]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    picture = shown(pixels[0] * std + mean, image_processor.band_names or COLORS)
    return pixels, picture


def draw_answers(rows: Sequence[Answered], maps: Sequence[np.ndarray], path: Path, title: str = "") -> None:
    """Draw a figure with one row per answer: the image with boxes, the features of the ViT, and the texts.

    Args:
        maps: feature maps of the rows with an image, uint8 of shape `(rows, columns, 3)`.
        title: beginning of the title, before what boxes and colors mean.
    """
    figure = Figure(figsize=(10, 2.8 * len(rows) + 0.3), layout="constrained")
    meaning = (
        "solid box: reference, dashed box: model; backbone: first three principal components of the ViT's features"
    )
    figure.suptitle(f"{title}: {meaning}" if title else meaning, fontsize=8, parse_math=False)
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1, 1, 1.4))
    remaining_maps = iter(maps)
    for (picture_axis, backbone_axis, text_axis), row in zip(axes, rows):
        for axis in (picture_axis, backbone_axis, text_axis):
            axis.axis("off")
            axis.set_anchor("N")
        if row.image is not None:
            draw_panel(picture_axis, row.image, row.size, row.name)
            draw_panel(backbone_axis, next(remaining_maps), row.size, "backbone")
            outline_boxes(picture_axis, row.reference, row.size, REFERENCE_COLOR, "-")
            outline_boxes(picture_axis, row.answer, row.size, ANSWER_COLOR, "--")
        draw_texts(text_axis, row)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=100)


def draw_panel(axis: Axes, picture: np.ndarray, size: tuple[int, int], title: str) -> None:
    """Draw a picture in the pixel coordinates of an image of `size`."""
    height, width = size
    axis.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
    axis.set_title(title, fontsize=8, parse_math=False)


def draw_texts(axis: Axes, row: Answered) -> None:
    texts = {"question": row.question, "reference": row.reference, "model": row.answer or "(no text)"}
    if row.blind is not None:
        texts["with another image"] = row.blind or "(no text)"
    paragraphs = [textwrap.fill(f"{speaker}: {shorten(text)}", 52) for speaker, text in texts.items()]
    text_artist = axis.text(
        0,
        1,
        "\n\n".join(paragraphs),
        va="top",
        fontsize=8,
        parse_math=False,
        transform=axis.transAxes,
    )
    text_artist.set_in_layout(False)


def outline_boxes(axis: Axes, text: str, size: tuple[int, int], color: str, style: str) -> None:
    """Outline the boxes that a text names."""
    boxes, *_ = read_boxes(text)
    for box in boxes:
        left, top, right, bottom = box.in_pixels(size)
        outline = Rectangle(
            (left, top),
            width=right - left,
            height=bottom - top,
            fill=False,
            edgecolor=color,
            linestyle=style,
            linewidth=1.5,
            clip_on=False,
        )
        axis.add_patch(outline)


def shorten(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} …"
