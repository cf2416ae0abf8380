"""Cost of a forward pass with and without dropped visual tokens: operations and seconds of the language model."""

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
    """Cost of one forward pass over an image and a question."""

    drop_ratio: float
    num_visual_tokens: int
    """Number of visual tokens that are kept."""
    sequence_length: int
    flops: int
    """Floating-point operations of the language model."""
    language_seconds: float
    """Measured time of the language model."""
    vision_seconds: float
    """Measured time of ViT and projector over all tiles, which does not depend on the drop ratio."""


def language_model_flops(config: PreTrainedConfig, sequence_length: int) -> int:
    """Count the floating-point operations of a forward pass over one sequence; a multiply-add counts as two.

    torch counts the matrix products in the model's code on the meta device, with attention over the full square.
    Embeddings, normalization and the LM head are not counted.

    Args:
        config: configuration of the language model, the `text_config` of [`ViTPConfig`].
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
    """Return the median time of a call of each function, over at least three rounds and `at_least` seconds.

    The functions take turns, so that other load on the machine affects all of them. The first round is not counted.
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
    """Measure the cost with all visual tokens and at a drop ratio.

    Raises:
        ValueError: if the question is empty, too long, or contains an image token.
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
