"""What dropping visual tokens saves: floating-point operations and seconds of the language model."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from answers import check_length, encode, text_inputs, visual_features
from computing import BUILDING
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BatchFeature, PreTrainedConfig

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor


class Cost(NamedTuple):
    """Of one forward pass over an image and a question."""

    drop_ratio: float
    num_visual_tokens: int
    """That are kept."""
    sequence_length: int
    flops: int
    """Floating-point operations of the language model."""
    language_seconds: float
    """Of the language model, as measured here."""
    vision_seconds: float
    """Of ViT and projector over all tiles, as measured here: the same at all ratios."""


def language_model_flops(config: PreTrainedConfig, sequence_length: int) -> int:
    """Floating-point operations, a multiplication and an addition counted as two, of a forward pass of one sequence.

    Counted by torch in the model's own code, without its weights. Matrix products are counted, those of attention over
    the whole square; embeddings, normalisation and the LM head are not.

    Args:
        config: of the language model, [`ViTPConfig`]'s `text_config`.
    """
    with torch.device("meta"), torch.no_grad():
        with BUILDING:
            model = AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            model(
                inputs_embeds=torch.empty(1, sequence_length, config.hidden_size, dtype=model.dtype),
                attention_mask=torch.ones(1, sequence_length, dtype=torch.long),
                position_ids=torch.arange(sequence_length)[None],
                use_cache=False,
            )
    return counter.get_total_flops()


def median_seconds(functions: Sequence[Callable], device: torch.device, at_least: float = 0.5) -> list[float]:
    """Of one call of each function: the median of three calls or, of short ones, as many as take half a second.

    They take turns, so that what else the machine does meets all of them; the first turn is not counted.
    """
    seconds = []
    while len(seconds) < 4 or (sum(map(sum, seconds)) < at_least and len(seconds) < 100):
        seconds.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds[-1].append(time.perf_counter() - start)
    return [median(values) for values in zip(*seconds[1:])]


@torch.no_grad()
def costs(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    image: Image.Image,
    question: str,
    drop_ratio: float,
    seed: int = 0,
) -> list[Cost]:
    """With all visual tokens, and at a drop ratio.

    Raises:
        ValueError: if the question is empty, too long, or holds an image token literally.
    """
    messages = [{"role": "user", "content": question}]
    both = [encode(processor, [image], messages, ratio, seed) for ratio in (0.0, drop_ratio)]
    check_length(model, both[0], max_new_tokens=0)
    pixel_values = both[0]["pixel_values"]
    features = visual_features(model, pixel_values)

    def prefill(inputs: BatchFeature) -> Callable:
        return lambda: model(**text_inputs(model, inputs, features), logits_to_keep=1, use_cache=False)

    functions = [lambda: visual_features(model, pixel_values), *map(prefill, both)]
    vision_seconds, *language_seconds = median_seconds(functions, model.device)
    result = []
    for ratio, inputs, seconds in zip((0.0, drop_ratio), both, language_seconds):
        length = inputs["input_ids"].shape[1]
        kept = (inputs["input_ids"] == model.config.image_token_id).sum().item()
        flops = language_model_flops(model.config.text_config, length)
        result.append(Cost(ratio, kept, length, flops, seconds, vision_seconds))
    return result
