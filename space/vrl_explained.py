"""Visual Robustness Learning by doing: what the language model gets, and where its answer looks, with and without."""

from typing import NamedTuple

import numpy as np
import torch
from answers import answer_log_probs, check_length, decode, encode, greedy_answer, text_inputs, visual_features
from maps import draw_map, heat_of
from opened import FullModel
from PIL import Image
from visual_tokens import draw_tokens, placed, token_maps

MAX_TOKENS = 2048  # of a prompt and its answer: attention of 16 heads is 270 MB for a layer
CELL, CELLS = 16, 64  # pixels of a position, and positions in a line of the strip
TEXT, KEPT, DROPPED = (148, 163, 184), (255, 176, 0), (51, 65, 85)


class Explained(NamedTuple):
    """An answer under a drop ratio."""

    drop_ratio: float
    text: str
    probability: float
    """Of this answer."""
    attention: np.ndarray
    """Of the answer to the visual tokens, float32 over the tiles of the image; NaN where they are dropped."""
    share: float
    """Of its attention that goes to visual tokens, in [0, 1]; the rest goes to text."""
    positions: np.ndarray
    """Of what the language model is given, ascending, int64."""
    is_visual: np.ndarray
    """Which of these are visual tokens, bool."""
    picture: Image.Image


@torch.no_grad()
def explain(
    full: FullModel, image: Image.Image, question: str, drop_ratio: float, seed: int, max_new_tokens: int = 16
) -> Explained:
    """The greedy answer to a question at a drop ratio, and its attention, the mean over layers, heads and its tokens.

    Raises:
        ValueError: if the question is empty or too long, or the image has too many visual tokens.
    """
    model, processor = full.model, full.processor
    inputs = encode(processor, [image], [{"role": "user", "content": question}], drop_ratio, seed)
    check_length(model, inputs, max_new_tokens)
    length = inputs["input_ids"].shape[1]
    if length + max_new_tokens > MAX_TOKENS:
        raise ValueError(f"The prompt has {length} tokens, and attention is shown of up to {MAX_TOKENS}: reduce it.")
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
    # The token at a place is what the place before it looks for.
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
    """The image under the colours of attention, dark where tokens are dropped."""
    is_kept = np.isfinite(attention)
    values = torch.from_numpy(np.where(is_kept, attention, attention[is_kept].min() if is_kept.any() else 0.0))
    return draw_tokens(draw_map(heat_of(values), np.asarray(image.convert("RGB")), opacity=0.6), is_kept)


def strip(explained: Explained) -> Image.Image:
    """The positions of the sequence, line by line: text, visual tokens that are kept, and the gaps where one is not."""
    total = int(explained.positions[-1]) + 1
    lines = -(-total // CELLS)
    colors = np.zeros((lines * CELLS, 3), np.uint8)
    colors[:total] = DROPPED
    colors[explained.positions] = np.where(explained.is_visual[:, None], KEPT, TEXT)
    cells = Image.fromarray(colors.reshape(lines, CELLS, 3))
    return cells.resize((CELLS * CELL, lines * CELL), Image.Resampling.NEAREST)


def in_words(name: str, explained: Explained) -> str:
    """An answer with its figures, in one line."""
    count = int(explained.is_visual.sum())
    return (
        f"{name}: {explained.text or '(no answer)'}, probability {explained.probability:.3g}, from {count} visual "
        f"tokens in {len(explained.positions)}; {explained.share:.0%} of its attention goes to them"
    )
