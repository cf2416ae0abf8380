"""The VRL tab: kept visual tokens of Visual Robustness Learning, answers with them, and saved computation."""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gradio as gr
import limits
import numpy as np
import pandas as pd
import torch
from answers import (
    PROGRESS,
    QUESTION,
    answer_log_probs,
    answers_by_drop_ratio,
    check_length,
    decode,
    encode,
    greedy_answer,
    text_inputs,
    visual_features,
)
from checking import UnavailableModel
from computing import answering, turn, write_png
from loading import FullModel, Models
from maps import draw_map, heat_of
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from uploading import CROWNS, forget, image_input, name_of, open_upload, picture_of
from url_state import Tab, slider

from modeling_vitp import ViTPProcessor

DIMMED = 0.25  # relative brightness of the image under dropped tokens
TILE_BORDER = "#ffb000"
DROP_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_NEW_TOKENS = 16
MEASURED_SECONDS = 0.5
MAX_TOKENS = 2048  # tokens of prompt and answer; the attention of 16 heads then takes 270 MB a layer
THUMBNAIL_SIZE = (448, 448)  # pixels
ANSWER_COLUMNS = ["drop ratio", "seed", "visual tokens", "sequence length", "answer", "probability"]
ANSWER_COLUMNS += ["probability of the full answer"]
COST_COLUMNS = ["drop ratio", "visual tokens", "sequence length", "LM FLOPs", "LM seconds", "ViT seconds"]
WORDS = """\
- **VRL** (Visual Robustness Learning): in training, the language model gets a random part of the image only, so that \
the vision transformer (ViT) learns to store what matters in every part.
- **Visual token**: the numbers by which a small square of the image is passed to the language model.
- **Drop ratio**: the share of the visual tokens that is dropped. Their squares are dark.
- **Attention map**: how much the answer takes from each token, from dark (least) to bright (most).
"""
COSTS = "LM FLOPs: floating-point operations of the language model's matrix products. A multiply-add counts as two."


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    gr.Markdown("How little of the image does the model need for its answer?")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("vrl-image", CROWNS)
            drop_ratio = slider(0, 0.99, value=0.75, step=0.01, label="Drop ratio", elem_id="vrl-drop-ratio")
            question = gr.Textbox(QUESTION, label="Question", max_length=limits.QUESTION, elem_id="vrl-question")
            run = gr.Button("Answer with and without", variant="primary", elem_id="vrl-run", elem_classes="run")
            stop = gr.Button("Stop", size="sm")
            with gr.Accordion("More settings", open=False, elem_classes="more"):
                seed = gr.Number(0, label="Seed of the draw", precision=0, minimum=0, maximum=2**31 - 1)
                draws = slider(1, 8, value=3, step=1, label="Draws at each drop ratio of the curve")
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            with gr.Row():
                with gr.Column(min_width=220):
                    summary = text_of("Visual tokens", "vrl-summary")
                    tiles = picture_of("Kept tokens are bright", "vrl-tiles")
                    thumbnail = picture_of("Thumbnail of the whole image", "vrl-thumbnail", visible=False)
                both = []
                for label, elem_id in (("all visual tokens", "vrl-whole"), ("the kept tokens", "vrl-short")):
                    with gr.Column(min_width=220):
                        both.append(text_of(f"Answer with {label}", elem_id))
                        both.append(picture_of(f"Attention map: {label}", f"{elem_id}-map"))
            saved = gr.Textbox(label="Saved computation", interactive=False, lines=2, elem_id="vrl-saved")
            # The chart is never set to None, because removing it raises errors in the page.
            curve = gr.LinePlot(
                pd.DataFrame(columns=ANSWER_COLUMNS[::6], dtype=float),
                x=ANSWER_COLUMNS[0],
                y=ANSWER_COLUMNS[-1],
                y_title="probability",
                y_lim=[0, None],
                height=220,
                label="Probability of the answer with all tokens, by drop ratio (mean of the draws)",
                elem_id="vrl-curve",
            )
            with gr.Accordion("The numbers", open=False):
                table = gr.Dataframe(headers=ANSWER_COLUMNS, interactive=False, label="Answers by drop ratio and seed")
                cost_table = gr.Dataframe(headers=COST_COLUMNS, interactive=False, label="One forward pass")
                gr.Markdown(COSTS)
            gr.Markdown(WORDS)

    @answering(gpu=False)
    def show_tokens(path, model, drop_ratio, seed):
        """Return image and thumbnail with the kept tokens, and a summary."""
        if path is None:
            return None, gr.Image(visible=False), "No image is selected."
        try:
            models.full(model)
        except UnavailableModel as error:
            return None, gr.Image(visible=False), str(error)
        tiles, thumbnail, summary, note = kept_tokens(models, path, model, drop_ratio, seed)
        small = thumbnail and write_png(thumbnail, "thumbnail.png")
        return tiles, gr.Image(small, visible=thumbnail is not None), f"{note}. {summary}"

    @answering
    def run_all(path, model, question, drop_ratio, seed, draws, progress=PROGRESS):
        """Yield the answers with all and with the kept tokens, then the savings, then answers at other drop ratios."""
        results, (full, rgb), answers = [*[None] * 7, gr.skip()], opened(models, path, model), []
        for index, ratio in enumerate((0.0, drop_ratio)):
            with turn(progress):
                progress((index, 2), desc=f"Answering at a drop ratio of {ratio:g}")
                found = explain(full, rgb, question or "", ratio, seed or 0, MAX_NEW_TOKENS)
            answers.append(found.text)
            change = f" The answer {'stays' if answers[0] == found.text else 'changes'}." if index else ""
            results[2 * index : 2 * index + 2] = in_words(name_of(path), found) + change, found.picture
            yield tuple(results)
        results[4:6] = savings(models, path, model, question, drop_ratio, seed, progress)
        yield tuple(results)
        for table, _ in answers_at(models, path, model, question, seed, draws, progress):
            results[6:] = table, curve_of(table)
            yield tuple(results)

    tokens, inputs = [model_name, drop_ratio, seed], [model_name, question, drop_ratio, seed, draws]
    shown, outputs = [tiles, thumbnail, summary], [*both, cost_table, saved, table, curve]
    running = image.on([run.click, question.submit], run_all, inputs, outputs, show_progress_on=both[0])
    stop.click(None, cancels=running)
    changes = [*image.changes, model_name.input, drop_ratio.input, seed.input]
    forget([*changes, question.input, draws.input], outputs, [running])
    options = {"trigger_mode": "always_last", "show_progress": "minimal", "show_progress_on": tiles}
    image.on(changes, show_tokens, tokens, shown, **options)
    state = {"vrl_image": image.example, "r": drop_ratio, "vrl_seed": seed, "vrl_q": question}
    if models.default not in models.full_names:
        return Tab(state)
    return Tab(state, [(*image.with_path(show_tokens, tokens), shown), (*image.with_path(run_all, inputs), outputs)])


def text_of(label: str, elem_id: str) -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, lines=5, elem_id=elem_id)


def opened(models: Models, image: str | None, model: str) -> tuple[FullModel, Image.Image]:
    """Return a full model and an image, read with its input spec, as 8-bit RGB."""
    full = models.full(model)
    return full, open_upload(image, input_spec=full.processor.image_processor.input_spec).to_rgb()


# Kept tokens


def kept_tokens(
    models: Models, image: str | None, model: str, drop_ratio: float, seed: int | None
) -> tuple[Image.Image, Image.Image | None, str, str]:
    """Return image and thumbnail (if any) with dropped tokens darkened, a summary, and a note on the file."""
    processor = models.full(model).processor
    reading = open_upload(image, input_spec=processor.image_processor.input_spec)
    rgb = reading.to_rgb()
    inputs = encode(processor, [rgb], QUESTION, drop_ratio, seed or 0)
    kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
    maps = token_maps(processor, rgb.size, num_tiles, kept)
    total = num_tiles * processor.image_seq_length
    over = "{} × {} tiles and a thumbnail".format(*maps.grid) if num_tiles > 1 else "one tile"
    summary = f"{total if kept is None else len(kept):,} of {total:,} visual tokens are kept, over {over}."
    thumbnail = None
    if maps.thumbnail is not None:
        size = processor.image_processor.size
        seen = rgb.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
        thumbnail = draw_tokens(seen.resize(THUMBNAIL_SIZE, Image.Resampling.NEAREST), maps.thumbnail)
    return draw_tokens(rgb, maps.tiles, maps.grid), thumbnail, summary, f"{name_of(image)}: {reading.note}"


class TokenMaps(NamedTuple):
    """Values of the visual tokens of one image, by row and column.

    Args:
        tiles: tokens of the tiles, over the whole image.
        thumbnail: tokens of the thumbnail; `None` if the image is a single tile.
        grid: rows and columns of tiles.
    """

    tiles: np.ndarray
    thumbnail: np.ndarray | None
    grid: tuple[int, int]


def token_maps(
    processor: ViTPProcessor,
    size: tuple[int, int],
    num_tiles: int,
    kept: torch.LongTensor | None = None,
    values: np.ndarray | bool = True,
    dropped: float | bool = False,
) -> TokenMaps:
    """Arrange a value for each visual token, tile by tile, as maps over the image and its thumbnail.

    Args:
        size: width and height of the image, the only one of its sample.
        num_tiles: number of tiles in `pixel_values`, including the thumbnail.
        kept: `visual_token_indices` of the processor. Default: all tokens are kept.
        values: values of the kept tokens.
        dropped: value of dropped tokens.

    Raises:
        ValueError: if an image of that size has another number of tiles.
    """
    own = processor.image_processor
    tile = own.size["height"], own.size["width"]
    columns, rows = get_optimal_tiled_canvas(size[::-1], tile, own.min_patches, own.max_patches)
    if num_tiles != rows * columns + (rows * columns > 1):
        raise ValueError(
            f"An image of {size[0]} × {size[1]} is cut into {rows} × {columns} tiles, got {num_tiles} tiles with the "
            "thumbnail. Pass the image that was given to the processor."
        )
    side = math.isqrt(processor.image_seq_length)
    tokens = np.full(num_tiles * side**2, dropped, np.result_type(values))
    tokens[slice(None) if kept is None else kept.numpy()] = values
    tokens = tokens.reshape(num_tiles, side, side)
    tiles = tokens[: rows * columns].reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, -1)
    return TokenMaps(tiles, tokens[-1] if num_tiles > 1 else None, (rows, columns))


def draw_tokens(image: Image.Image, kept: np.ndarray, grid: tuple[int, int] = (1, 1)) -> Image.Image:
    """Darken dropped tokens (`kept` is bool, by row and column) on a copy of the image, and draw borders of tiles."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    (height, width), (rows, columns) = pixels.shape[:2], kept.shape
    brightness = np.where(kept, 1.0, DIMMED)
    brightness = brightness[np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width]
    drawn = Image.fromarray((pixels * brightness[..., None]).round().astype(np.uint8))
    draw, line = ImageDraw.Draw(drawn), max(1, round(max(width, height) / 400))
    for row in range(1, grid[0]):
        draw.line([(0, row * height / grid[0]), (width, row * height / grid[0])], fill=TILE_BORDER, width=line)
    for column in range(1, grid[1]):
        draw.line([(column * width / grid[1], 0), (column * width / grid[1], height)], fill=TILE_BORDER, width=line)
    return drawn


# Answers with all tokens and with the kept tokens


class Explained(NamedTuple):
    """Answer at a drop ratio, with its attention to the visual tokens.

    Args:
        probability: probability of this answer.
        attention: attention of the answer to the visual tokens, float32 over the tiles; NaN for dropped tokens.
        share: share of the attention to visual tokens, in [0, 1]; the rest is attention to text.
        picture: the attention over the image.
    """

    text: str
    probability: float
    attention: np.ndarray
    share: float
    num_visual_tokens: int
    sequence_length: int
    picture: Image.Image


@torch.no_grad()
def explain(
    full: FullModel, image: Image.Image, question: str, drop_ratio: float, seed: int, max_new_tokens: int
) -> Explained:
    """Return the greedy answer at a drop ratio and its attention, averaged over layers, heads and answer tokens."""
    model, processor = full.model, full.processor
    inputs = encode(processor, [image], question, drop_ratio, seed)
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
    arguments = text_inputs(model, inputs, features, answer)
    attentions = model(**arguments, output_attentions=True, use_cache=False).attentions
    # A token is predicted at the previous position, so the attention of that position explains it.
    rows = torch.stack([layer[0, :, length - 1 : -1].float().mean((0, 1)) for layer in attentions]).mean(0).cpu()
    to_visual = rows[:length][(inputs["input_ids"][0] == model.config.image_token_id).cpu()].numpy()
    kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
    attention = token_maps(processor, image.size, num_tiles, kept, to_visual, np.nan).tiles
    is_kept = np.isfinite(attention)
    heat = heat_of(torch.from_numpy(np.where(is_kept, attention, to_visual.min())))
    picture = draw_tokens(draw_map(heat, np.asarray(image.convert("RGB")), opacity=0.6), is_kept)
    probability, share = log_probs.sum().exp().item(), float(to_visual.sum() / rows.sum())
    return Explained(decode(processor, answer), probability, attention, share, len(to_visual), length, picture)


def in_words(name: str, explained: Explained) -> str:
    """Describe an answer with its numbers in one line."""
    return (
        f"{name}: {explained.text or '(no answer)'}, probability {explained.probability:.3g}, from "
        f"{explained.num_visual_tokens} visual tokens in a sequence of {explained.sequence_length}; "
        f"{explained.share:.0%} of its attention goes to them."
    )


def answers_at(
    models: Models,
    image: str | None,
    model: str,
    question: str | None,
    seed: int | None,
    draws: int,
    progress: gr.Progress = PROGRESS,
) -> Iterator[tuple[pd.DataFrame, str]]:
    """Yield a table of the answers at growing drop ratios so far, and the answer with all visual tokens."""
    full, rgb = opened(models, image, model)
    seeds, rows = range(seed or 0, (seed or 0) + draws), []
    with turn(progress):
        for one in answers_by_drop_ratio(full, rgb, question or "", DROP_RATIOS, seeds, MAX_NEW_TOKENS):
            rows.append(one)
            done = len(rows), 1 + (len(DROP_RATIOS) - 1) * draws
            progress(done, desc=f"Drop ratio {one.drop_ratio:g}, seed {one.seed}")
            yield pd.DataFrame(rows, columns=ANSWER_COLUMNS).round(4), rows[0].text


def curve_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean probability of the full answer over the draws at each drop ratio."""
    return table.groupby(ANSWER_COLUMNS[0], as_index=False)[[ANSWER_COLUMNS[-1]]].mean()


# Saved computation


class Cost(NamedTuple):
    """Cost of one forward pass over an image and a question.

    Args:
        flops: operations of the language model; a multiply-add counts as two.
        language_seconds: median time of the language model.
        vision_seconds: median time of ViT and projector over all tiles, which does not depend on the drop ratio.
    """

    drop_ratio: float
    num_visual_tokens: int
    sequence_length: int
    flops: int
    language_seconds: float
    vision_seconds: float


@torch.no_grad()
def costs(full: FullModel, image: Image.Image, question: str, drop_ratio: float, seed: int = 0) -> list[Cost]:
    """Measure the cost with all visual tokens and at a drop ratio."""
    model = full.model
    both = [encode(full.processor, [image], question, ratio, seed) for ratio in (0.0, drop_ratio)]
    check_length(model, both[0], max_new_tokens=0)
    features = visual_features(model, both[0]["pixel_values"])

    def prefill(inputs: BatchFeature) -> None:
        model(**text_inputs(model, inputs, features), logits_to_keep=1, use_cache=False)

    def seconds(function: Callable, *arguments) -> float:
        start = time.perf_counter()
        function(*arguments)
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        return time.perf_counter() - start

    # The functions take turns, so that other load on the machine affects all of them. The first round is not counted.
    rounds, end = [], time.monotonic() + MEASURED_SECONDS
    while len(rounds) < 4 or (time.monotonic() < end and len(rounds) < 100):
        vision = seconds(visual_features, model, both[0]["pixel_values"])
        rounds.append([vision, *(seconds(prefill, inputs) for inputs in both)])
    vision_seconds, *language_seconds = np.median(rounds[1:], axis=0).tolist()
    result = []
    for ratio, inputs, language in zip((0.0, drop_ratio), both, language_seconds):
        kept = (inputs["input_ids"] == model.config.image_token_id).sum().item()
        with FlopCounterMode(display=False) as counter:
            prefill(inputs)
        flops, length = counter.get_total_flops(), inputs["input_ids"].shape[1]
        result.append(Cost(ratio, kept, length, flops, language, vision_seconds))
    return result


def savings(
    models: Models,
    image: str | None,
    model: str,
    question: str | None,
    drop_ratio: float,
    seed: int | None,
    progress: gr.Progress = PROGRESS,
) -> tuple[pd.DataFrame, str]:
    """Return the cost with and without dropped tokens as a table, and a summary of the difference."""
    full, rgb = opened(models, image, model)
    with turn(progress):
        progress(0.5, desc="Measuring forward passes")
        whole, short = found = costs(full, rgb, question or "", drop_ratio, seed or 0)
    summary = (
        f"{name_of(image)}: at a drop ratio of {drop_ratio:g} the language model does "
        f"{1 - short.flops / whole.flops:.0%} fewer operations and takes {short.language_seconds:.3g} s instead of "
        f"{whole.language_seconds:.3g} s. The ViT always sees the whole image, {whole.vision_seconds:.3g} s. Medians "
        f"of forward passes on {full.model.device.type}."
    )
    return pd.DataFrame(found, columns=COST_COLUMNS).round(4), summary
