"""Demonstration of Visual Robustness Learning: input and attention of the language model with and without drops."""

from typing import NamedTuple

import numpy as np
import torch
from answers import answer_log_probs, check_length, decode, encode, greedy_answer, text_inputs, visual_features
from maps import draw_map, heat_of
from opened import FullModel
from PIL import Image
from visual_tokens import draw_tokens, placed, token_maps

MAX_TOKENS = 2048  # tokens of prompt and answer; the attention of 16 heads then takes 270 MB a layer
CELL, CELLS = 16, 64  # size of a position in pixels, positions in a line
TEXT, KEPT, DROPPED = (148, 163, 184), (255, 176, 0), (51, 65, 85)


class Explained(NamedTuple):
    """Answer at a drop ratio, with its attention to the visual tokens."""

    drop_ratio: float
    text: str
    probability: float
    """Probability of this answer."""
    attention: np.ndarray
    """Attention of the answer to the visual tokens: float32 over the tiles of the image, NaN for dropped tokens."""
    share: float
    """Share of the attention to visual tokens, in [0, 1]; the rest is attention to text."""
    positions: np.ndarray
    """Position ids of the sequence, ascending, int64."""
    is_visual: np.ndarray
    """bool mask of the positions that are visual tokens."""
    picture: Image.Image


@torch.no_grad()
def explain(
    full: FullModel, image: Image.Image, question: str, drop_ratio: float, seed: int, max_new_tokens: int = 16
) -> Explained:
    """Return the greedy answer at a drop ratio and its attention, averaged over layers, heads and answer tokens.

    Raises:
        ValueError: if the question is empty or too long, or the image has too many visual tokens.
    """
    model, processor = full.model, full.processor
    inputs = encode(processor, [image], [{"role": "user", "content": question}], drop_ratio, seed)
    check_length(model, inputs, max_new_tokens)
    length = inputs["input_ids"].shape[1]
    if length + max_new_tokens > MAX_TOKENS:
        raise ValueError(
            f"Prompt and answer have {length + max_new_tokens} tokens. Attention is shown for at most {MAX_TOKENS}. "
            "Use a smaller image or a shorter question."
        )
    features = visual_features(model, inputs["pixel_values"])
    answer = greedy_answer(model, inputs, features, max_new_tokens)
    log_probs, _ = answer_log_probs(model, inputs, features, answer)

    arguments = text_inputs(model, inputs, features)
    arguments["input_ids"] = torch.cat([arguments["input_ids"], answer[None]], dim=1)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    positions = inputs.get("position_ids", torch.arange(length)[None])
    if "position_ids" in arguments:
        following = positions[:, -1:] + 1 + torch.arange(len(answer))
        arguments["position_ids"] = torch.cat([positions, following], dim=1).to(model.device)
    attentions = model(**arguments, output_attentions=True, use_cache=False).attentions
    # A token is predicted at the previous position, so the attention of that position explains it.
    rows = torch.stack([layer[0, :, length - 1 : -1].float().mean((0, 1)) for layer in attentions]).mean(0).cpu()
    is_visual = (inputs["input_ids"][0] == model.config.image_token_id).cpu()

    num_tiles, kept = len(inputs["pixel_values"]), inputs.get("visual_token_indices")
    values = np.full(num_tiles * processor.image_seq_length, np.nan, np.float32)
    to_visual = rows[:length][is_visual].numpy()
    values[slice(None) if kept is None else kept.numpy()] = to_visual
    maps = token_maps(processor, image.size, num_tiles, kept)
    attention, _ = placed(values, maps.grid, num_tiles)
    return Explained(
        drop_ratio,
        decode(processor, answer),
        log_probs.sum().exp().item(),
        attention,
        float(to_visual.sum() / rows.sum()),
        positions[0].cpu().numpy(),
        is_visual.numpy(),
        draw_attention(image, attention),
    )


def draw_attention(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Draw the attention over the image; dropped tokens are dark."""
    is_kept = np.isfinite(attention)
    values = torch.from_numpy(np.where(is_kept, attention, attention[is_kept].min() if is_kept.any() else 0.0))
    return draw_tokens(draw_map(heat_of(values), np.asarray(image.convert("RGB")), opacity=0.6), is_kept)


def strip(explained: Explained) -> Image.Image:
    """Draw the positions of the sequence, line by line: text, kept visual tokens, and gaps of dropped tokens."""
    total = int(explained.positions[-1]) + 1
    lines = -(-total // CELLS)
    colors = np.zeros((lines * CELLS, 3), np.uint8)
    colors[:total] = DROPPED
    colors[explained.positions] = np.where(explained.is_visual[:, None], KEPT, TEXT)
    cells = Image.fromarray(colors.reshape(lines, CELLS, 3))
    return cells.resize((CELLS * CELL, lines * CELL), Image.Resampling.NEAREST)


def in_words(name: str, explained: Explained) -> str:
    """Describe an answer with its numbers in one line."""
    count = int(explained.is_visual.sum())
    return (
        f"{name}: {explained.text or '(no answer)'}, probability {explained.probability:.3g}, from {count} visual "
        f"tokens in a sequence of {len(explained.positions)}; {explained.share:.0%} of its attention goes to them"
    )
