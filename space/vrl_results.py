"""Results of the tab VRL: kept tokens, answers by drop ratio, and saved computation."""

from collections.abc import Iterator

import gradio as gr
import pandas as pd
from answers import Answer, answers_by_drop_ratio, encode
from computing import turn
from loading import Models
from PIL import Image
from uploading import name_of, open_upload
from visual_tokens import draw_tokens, token_maps
from vrl_cost import costs
from vrl_explained import Explained, explain

DROP_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_NEW_TOKENS = 16
THUMBNAIL_SIZE = (448, 448)  # pixels
QUESTION = "How many trees are there?"
ANSWER_COLUMNS = ["drop ratio", "seed", "visual tokens", "answer", "its probability", "… of the full answer"]
COST_COLUMNS = ["drop ratio", "visual tokens", "sequence length", "LM GFLOPs", "LM seconds", "ViT seconds"]


def kept_tokens(
    models: Models, path: str, model: str, drop_ratio: float, seed: float
) -> tuple[Image.Image, Image.Image | None, str, str]:
    """Return image and thumbnail (if any) with dropped tokens darkened, a summary, and a note on the file."""
    processor = models.full(model).processor
    reading = open_upload(path, input_spec=processor.image_processor.input_spec)
    rgb = reading.to_rgb()
    inputs = encode(processor, [rgb], [{"role": "user", "content": QUESTION}], drop_ratio, int(seed or 0))
    kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
    maps = token_maps(processor, rgb.size, num_tiles, kept)
    total = num_tiles * processor.image_seq_length
    rows, columns = maps.grid
    over = f"{rows} × {columns} tiles and a thumbnail" if num_tiles > 1 else "one tile"
    summary = f"{total if kept is None else len(kept):,} of {total:,} visual tokens are kept, over {over}."
    thumbnail = None
    if maps.thumbnail is not None:
        size = processor.image_processor.size
        seen = rgb.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
        thumbnail = draw_tokens(seen.resize(THUMBNAIL_SIZE, Image.Resampling.NEAREST), maps.thumbnail)
    return draw_tokens(rgb, maps.tiles, maps.grid), thumbnail, summary, f"{name_of(path)}: {reading.note}"


def explained_by(
    models: Models,
    path: str | None,
    model: str,
    question: str,
    drop_ratio: float,
    seed: float,
    progress: gr.Progress | None = None,
) -> Iterator[list[Explained]]:
    """Yield the answer with all visual tokens, then both this answer and the one at the drop ratio."""
    full = models.full(model)
    rgb = open_upload(path, input_spec=full.processor.image_processor.input_spec).to_rgb()
    found = []
    with turn(progress):
        for ratio in (0.0, drop_ratio):
            if progress is not None:
                progress((len(found), 2), desc=f"Answering at a drop ratio of {ratio:g}")
            found.append(explain(full, rgb, question or "", ratio, int(seed or 0), MAX_NEW_TOKENS))
            yield list(found)


def answers(
    models: Models,
    path: str | None,
    model: str,
    question: str,
    seed: float,
    num_seeds: float,
    progress: gr.Progress | None = None,
) -> Iterator[tuple[list[Answer], range, int]]:
    """Yield the answers so far, the seeds, and the total number of answers."""
    full = models.full(model)
    rgb = open_upload(path, input_spec=full.processor.image_processor.input_spec).to_rgb()
    seeds = range(int(seed or 0), int(seed or 0) + int(num_seeds))
    with turn(progress):
        stream = answers_by_drop_ratio(
            full.model, full.processor, rgb, question or "", DROP_RATIOS, seeds, MAX_NEW_TOKENS
        )
        total, found = 1 + (len(DROP_RATIOS) - 1) * len(seeds), []
        for answer in stream:
            found.append(answer)
            yield list(found), seeds, total


def curve_of(answers: list[Answer], seeds: range) -> pd.DataFrame:
    """Return the probability of the full answer for each draw, and the mean for ratios with all draws."""
    points = [(0.0, answers[0].full_probability, f"seed {seed}") for seed in seeds]
    points += [(answer.drop_ratio, answer.full_probability, f"seed {answer.seed}") for answer in answers[1:]]
    frame = pd.DataFrame(points, columns=["drop ratio", "probability", "draw"])
    by_ratio = frame.groupby("drop ratio")["probability"]
    means = by_ratio.mean()[by_ratio.count() == len(seeds)].reset_index().assign(draw="mean")
    return pd.concat([means, frame], ignore_index=True)


def table_of(answers: list[Answer]) -> pd.DataFrame:
    rows = [
        (
            f"{answer.drop_ratio:g}",
            "any" if answer.drop_ratio == 0 else answer.seed,
            answer.num_visual_tokens,
            answer.text,
            f"{answer.probability:.3g}",
            f"{answer.full_probability:.3g}",
        )
        for answer in answers
    ]
    return pd.DataFrame(rows, columns=ANSWER_COLUMNS)


def saved_by(
    models: Models,
    path: str | None,
    model: str,
    question: str,
    drop_ratio: float,
    seed: float,
    progress: gr.Progress | None = None,
) -> tuple[pd.DataFrame, str]:
    """Return the cost with all visual tokens and at the drop ratio as a table, and a summary of the difference."""
    full = models.full(model)
    rgb = open_upload(path, input_spec=full.processor.image_processor.input_spec).to_rgb()
    with turn(progress):
        if progress is not None:
            progress(0.5, desc="Measuring forward passes")
        whole, short = costs(full.model, full.processor, rgb, question or "", drop_ratio, int(seed or 0))
    rows = [
        (
            f"{cost.drop_ratio:g}",
            cost.num_visual_tokens,
            cost.sequence_length,
            f"{cost.flops / 1e9:.3g}",
            f"{cost.language_seconds:.3g}",
            f"{cost.vision_seconds:.3g}",
        )
        for cost in (whole, short)
    ]
    summary = (
        f"{name_of(path)}: at a drop ratio of {drop_ratio:g} the language model does "
        f"{1 - short.flops / whole.flops:.0%} fewer operations and takes {short.language_seconds:.3g} s instead of "
        f"{whole.language_seconds:.3g} s. The ViT always sees the whole image, {whole.vision_seconds:.3g} s. Medians "
        f"of forward passes over image and question, here on {full.model.device.type}."
    )
    return pd.DataFrame(rows, columns=COST_COLUMNS), summary
