"""The VRL tab: kept visual tokens of Visual Robustness Learning, answers with them, and saved computation."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
from uploading import CROWNS, ImageInput, forget, image_input, name_of, open_upload, picture_of
from url_state import Tab, slider

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor

DIMMED = 0.25  # relative brightness of the image under dropped tokens
TILE_BORDER = "#ffb000"
DROP_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_NEW_TOKENS = 16
MEASURED_SECONDS = 0.5
MAX_TOKENS = 2048  # tokens of prompt and answer; the attention of 16 heads then takes 270 MB a layer
THUMBNAIL_SIZE = (448, 448)  # pixels
ANSWER_COLUMNS = [
    "drop ratio",
    "seed",
    "visual tokens",
    "sequence length",
    "answer",
    "probability",
    "probability of the full answer",
]
COST_COLUMNS = ["drop ratio", "visual tokens", "sequence length", "LM FLOPs", "LM seconds", "ViT seconds"]
WORDS = """\
- **VRL** (Visual Robustness Learning): in training, the language model gets a random part of the image only, so that \
the vision transformer (ViT) learns to store what matters in every part.
- **Visual token**: the numbers by which a small square of the image is passed to the language model.
- **Drop ratio**: the share of the visual tokens that is dropped. Their squares are dark.
- **Attention map**: how much the answer takes from each token, from dark (least) to bright (most).
"""
COSTS = "LM FLOPs: floating-point operations of the language model's matrix products. A multiply-add counts as two."


class Controls(NamedTuple):
    image: ImageInput
    drop_ratio: gr.Slider
    question: gr.Textbox
    run_button: gr.Button
    stop_button: gr.Button
    seed: gr.Number
    draws: gr.Slider


class TokenViews(NamedTuple):
    """Views of the kept tokens, in the order of the outputs of the handler `show_tokens`."""

    tiles: gr.Image
    thumbnail: gr.Image
    summary: gr.Textbox


class AnswerViews(NamedTuple):
    """Views of the answers, in the order of the outputs of the handler `run_all`."""

    full_answer: Any = None
    full_map: Any = None
    short_answer: Any = None
    short_map: Any = None
    cost_table: Any = None
    saved: Any = None
    table: Any = None
    curve: Any = None


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    gr.Markdown("How little of the image does the model need for its answer?")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            controls = _build_controls()
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            token_views, answer_views = _build_results()
    show_tokens, run_all = _handlers(models)
    image = controls.image
    question = controls.question
    token_inputs = [model_name, controls.drop_ratio, controls.seed]
    token_outputs = list(token_views)
    inputs = [model_name, question, controls.drop_ratio, controls.seed, controls.draws]
    outputs = list(answer_views)
    tokens_changed = [*image.changes, model_name.input, controls.drop_ratio.input, controls.seed.input]
    starts = [controls.run_button.click, question.submit]
    running = image.on(starts, run_all, inputs, outputs, show_progress_on=answer_views.full_answer)
    controls.stop_button.click(None, cancels=running)
    forget([*tokens_changed, question.input, controls.draws.input], outputs, [running])
    image.on(
        tokens_changed,
        show_tokens,
        token_inputs,
        token_outputs,
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=token_views.tiles,
    )
    state = {
        "vrl_image": image.example,
        "r": controls.drop_ratio,
        "vrl_seed": controls.seed,
        "vrl_q": question,
    }
    if models.default not in models.full_names:
        return Tab(state)
    tokens_at_start = (*image.with_path(show_tokens, token_inputs), token_outputs, tokens_changed)
    answers_changed = [*tokens_changed, question.input, controls.draws.input, *starts]
    answers_at_start = (*image.with_path(run_all, inputs), outputs, answers_changed)
    return Tab(state, [tokens_at_start, answers_at_start])


def _build_controls() -> Controls:
    image = image_input("vrl-image", CROWNS)
    drop_ratio = slider(
        minimum=0,
        maximum=0.99,
        value=0.75,
        step=0.01,
        label="Drop ratio",
        elem_id="vrl-drop-ratio",
    )
    question = gr.Textbox(QUESTION, label="Question", max_length=limits.QUESTION, elem_id="vrl-question")
    run_button = gr.Button("Answer with and without", variant="primary", elem_id="vrl-run", elem_classes="run")
    stop_button = gr.Button("Stop", size="sm")
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        seed = gr.Number(0, label="Seed of the draw", precision=0, minimum=0, maximum=2**31 - 1)
        draws = slider(minimum=1, maximum=8, value=3, step=1, label="Draws at each drop ratio of the curve")
    return Controls(
        image=image,
        drop_ratio=drop_ratio,
        question=question,
        run_button=run_button,
        stop_button=stop_button,
        seed=seed,
        draws=draws,
    )


def _build_results() -> tuple[TokenViews, AnswerViews]:
    with gr.Row():
        with gr.Column(min_width=220):
            summary = text_of("Visual tokens", "vrl-summary")
            tiles = picture_of("Kept tokens are bright", "vrl-tiles")
            thumbnail = picture_of("Thumbnail of the whole image", "vrl-thumbnail", visible=False)
        with gr.Column(min_width=220):
            full_answer = text_of("Answer with all visual tokens", "vrl-whole")
            full_map = picture_of("Attention map: all visual tokens", "vrl-whole-map")
        with gr.Column(min_width=220):
            short_answer = text_of("Answer with the kept tokens", "vrl-short")
            short_map = picture_of("Attention map: the kept tokens", "vrl-short-map")
    saved = gr.Textbox(label="Saved computation", interactive=False, lines=2, elem_id="vrl-saved")
    # The chart is never set to None, because removing it raises errors in the page.
    curve = gr.LinePlot(
        pd.DataFrame(columns=[ANSWER_COLUMNS[0], ANSWER_COLUMNS[-1]], dtype=float),
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
    token_views = TokenViews(tiles=tiles, thumbnail=thumbnail, summary=summary)
    answer_views = AnswerViews(
        full_answer=full_answer,
        full_map=full_map,
        short_answer=short_answer,
        short_map=short_map,
        cost_table=cost_table,
        saved=saved,
        table=table,
        curve=curve,
    )
    return token_views, answer_views


def _handlers(models: Models) -> tuple[Callable, Callable]:
    """Return the handlers `show_tokens` and `run_all`."""

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
        if thumbnail is None:
            thumbnail_update = gr.Image(None, visible=False)
        else:
            thumbnail_update = gr.Image(write_png(thumbnail, "thumbnail.png"), visible=True)
        return tiles, thumbnail_update, f"{note}. {summary}"

    @answering
    def run_all(path, model, question, drop_ratio, seed, draws, progress=PROGRESS):
        """Yield the answers with all and with the kept tokens, then the savings, then answers at other drop ratios."""
        full, rgb = open_model_and_image(models, path, model)
        name = name_of(path)
        views = AnswerViews(curve=gr.skip())

        def explain_at(ratio: float) -> Explained:
            return explain(full, rgb, question or "", ratio, seed or 0, MAX_NEW_TOKENS)

        with turn(progress):
            progress((0, 2), desc="Answering at a drop ratio of 0")
            with_all = explain_at(0.0)
        views = views._replace(full_answer=in_words(name, with_all), full_map=with_all.picture)
        yield views

        with turn(progress):
            progress((1, 2), desc=f"Answering at a drop ratio of {drop_ratio:g}")
            with_kept = explain_at(drop_ratio)
        change = "stays" if with_all.text == with_kept.text else "changes"
        short_answer = f"{in_words(name, with_kept)} The answer {change}."
        views = views._replace(short_answer=short_answer, short_map=with_kept.picture)
        yield views

        cost_table, saved = savings(models, path, model, question, drop_ratio, seed, progress)
        views = views._replace(cost_table=cost_table, saved=saved)
        yield views

        for table, _ in answers_at(models, path, model, question, seed, draws, progress):
            views = views._replace(table=table, curve=curve_of(table))
            yield views

    return show_tokens, run_all


def text_of(label: str, elem_id: str) -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, lines=5, elem_id=elem_id)


def open_model_and_image(models: Models, image: str | None, model: str) -> tuple[FullModel, Image.Image]:
    """Return a full model and an image, read with its input spec, as 8-bit RGB."""
    full = models.full(model)
    reading = open_upload(image, input_spec=full.processor.image_processor.input_spec)
    return full, reading.to_rgb()


# Kept tokens


def kept_tokens(
    models: Models,
    image: str | None,
    model: str,
    drop_ratio: float,
    seed: int | None,
) -> tuple[Image.Image, Image.Image | None, str, str]:
    """Return image and thumbnail (if any) with dropped tokens darkened, a summary, and a note on the file."""
    processor = models.full(model).processor
    reading = open_upload(image, input_spec=processor.image_processor.input_spec)
    rgb = reading.to_rgb()
    inputs = encode(processor, [rgb], QUESTION, drop_ratio, seed or 0)
    kept_indices = inputs.get("visual_token_indices")
    num_tiles = len(inputs["pixel_values"])
    maps = token_maps(processor, rgb.size, num_tiles, kept_indices)
    num_tokens = num_tiles * processor.image_seq_length
    num_kept = num_tokens if kept_indices is None else len(kept_indices)
    rows, columns = maps.grid
    tiles = f"{rows} × {columns} tiles and a thumbnail" if num_tiles > 1 else "one tile"
    summary = f"{num_kept:,} of {num_tokens:,} visual tokens are kept, over {tiles}."
    thumbnail = None
    if maps.thumbnail is not None:
        size = processor.image_processor.size
        model_input = rgb.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
        enlarged = model_input.resize(THUMBNAIL_SIZE, Image.Resampling.NEAREST)
        thumbnail = draw_tokens(enlarged, maps.thumbnail)
    picture = draw_tokens(rgb, maps.tiles, maps.grid)
    return picture, thumbnail, summary, f"{name_of(image)}: {reading.note}"


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
    kept_indices: torch.LongTensor | None = None,
    values: np.ndarray | bool = True,
    dropped_value: float | bool = False,
) -> TokenMaps:
    """Arrange a value for each visual token, tile by tile, as maps over the image and its thumbnail.

    Args:
        size: width and height of the image, the only one of its sample.
        num_tiles: number of tiles in `pixel_values`, including the thumbnail.
        kept_indices: `visual_token_indices` of the processor. Default: all tokens are kept.
        values: values of the kept tokens.
        dropped_value: value of dropped tokens.

    Raises:
        ValueError: if an image of that size has another number of tiles.
    """
    image_processor = processor.image_processor
    width, height = size
    columns, rows = get_optimal_tiled_canvas(
        (height, width),
        (image_processor.size["height"], image_processor.size["width"]),
        image_processor.min_patches,
        image_processor.max_patches,
    )
    num_image_tiles = rows * columns
    has_thumbnail = num_image_tiles > 1
    num_expected = num_image_tiles + 1 if has_thumbnail else num_image_tiles
    if num_tiles != num_expected:
        raise ValueError(
            f"An image of {width} × {height} is cut into {rows} × {columns} tiles, got {num_tiles} tiles with the "
            "thumbnail. Pass the image that was given to the processor."
        )
    side = math.isqrt(processor.image_seq_length)
    tokens = np.full(num_tiles * side**2, dropped_value, np.result_type(values))
    if kept_indices is None:
        tokens[:] = values
    else:
        tokens[kept_indices.numpy()] = values
    tokens = tokens.reshape(num_tiles, side, side)
    tiles = tokens[:num_image_tiles].reshape(rows, columns, side, side)
    image_map = tiles.swapaxes(1, 2).reshape(rows * side, columns * side)
    return TokenMaps(image_map, tokens[-1] if has_thumbnail else None, (rows, columns))


def draw_tokens(image: Image.Image, is_kept: np.ndarray, grid: tuple[int, int] = (1, 1)) -> Image.Image:
    """Darken dropped tokens (`is_kept` is bool, by row and column) on a copy of the image, and draw tile borders."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height, width = pixels.shape[:2]
    rows, columns = is_kept.shape
    row_of_pixel = np.arange(height) * rows // height
    column_of_pixel = np.arange(width) * columns // width
    brightness_of_token = np.where(is_kept, 1.0, DIMMED)
    brightness = brightness_of_token[row_of_pixel[:, None], column_of_pixel]
    picture = Image.fromarray((pixels * brightness[..., None]).round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    line_width = max(1, round(max(width, height) / 400))
    tile_rows, tile_columns = grid
    for row in range(1, tile_rows):
        y = row * height / tile_rows
        pen.line([(0, y), (width, y)], fill=TILE_BORDER, width=line_width)
    for column in range(1, tile_columns):
        x = column * width / tile_columns
        pen.line([(x, 0), (x, height)], fill=TILE_BORDER, width=line_width)
    return picture


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
    full: FullModel,
    image: Image.Image,
    question: str,
    drop_ratio: float,
    seed: int,
    max_new_tokens: int,
) -> Explained:
    """Return the greedy answer at a drop ratio and its attention, averaged over layers, heads and answer tokens."""
    model = full.model
    processor = full.processor
    inputs = encode(processor, [image], question, drop_ratio, seed)
    check_length(model, inputs, max_new_tokens)
    prompt_length = inputs["input_ids"].shape[1]
    if prompt_length + max_new_tokens > MAX_TOKENS:
        raise ValueError(
            f"Prompt and answer have {prompt_length + max_new_tokens} tokens. Attention is shown for at most "
            f"{MAX_TOKENS}. Use a smaller image or a shorter question."
        )
    features = visual_features(model, inputs["pixel_values"])
    answer = greedy_answer(model, inputs, features, max_new_tokens)
    log_probs, _ = answer_log_probs(model, inputs, features, answer)
    weights = _attention_of_answer(model, text_inputs(model, inputs, features, answer), prompt_length)
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    visual_weights = weights[:prompt_length][is_visual.cpu()].numpy()
    attention = token_maps(
        processor,
        image.size,
        num_tiles=len(inputs["pixel_values"]),
        kept_indices=inputs.get("visual_token_indices"),
        values=visual_weights,
        dropped_value=np.nan,
    ).tiles
    return Explained(
        text=decode(processor, answer),
        probability=log_probs.sum().exp().item(),
        attention=attention,
        share=float(visual_weights.sum() / weights.sum()),
        num_visual_tokens=len(visual_weights),
        sequence_length=prompt_length,
        picture=_draw_attention(image, attention, visual_weights.min()),
    )


def _attention_of_answer(
    model: ViTPForConditionalGeneration, arguments: dict[str, Any], prompt_length: int
) -> torch.Tensor:
    """Return the attention of the answer to each token, averaged over layers, heads and the tokens of the answer."""
    attentions = model(**arguments, output_attentions=True, use_cache=False).attentions
    means_of_layers = []
    for weights in attentions:
        # A token is predicted at the previous position, so the attention of that position explains it.
        weights_of_answer = weights[0, :, prompt_length - 1 : -1].float()
        means_of_layers.append(weights_of_answer.mean((0, 1)))
    return torch.stack(means_of_layers).mean(0).cpu()


def _draw_attention(image: Image.Image, attention: np.ndarray, lowest: float) -> Image.Image:
    """Draw the attention to the kept tokens over the image; dropped tokens, which are NaN, are dark."""
    is_kept = np.isfinite(attention)
    heat = heat_of(torch.from_numpy(np.where(is_kept, attention, lowest)))
    picture = draw_map(heat, np.asarray(image.convert("RGB")), opacity=0.6)
    return draw_tokens(picture, is_kept)


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
    full, rgb = open_model_and_image(models, image, model)
    first_seed = seed or 0
    seeds = range(first_seed, first_seed + draws)
    num_answers = 1 + (len(DROP_RATIOS) - 1) * draws
    answers = []
    with turn(progress):
        for answer in answers_by_drop_ratio(full, rgb, question or "", DROP_RATIOS, seeds, MAX_NEW_TOKENS):
            answers.append(answer)
            progress((len(answers), num_answers), desc=f"Drop ratio {answer.drop_ratio:g}, seed {answer.seed}")
            yield pd.DataFrame(answers, columns=ANSWER_COLUMNS).round(4), answers[0].text


def curve_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean probability of the full answer over the draws at each drop ratio."""
    drop_ratio_column = ANSWER_COLUMNS[0]
    probability_column = ANSWER_COLUMNS[-1]
    return table.groupby(drop_ratio_column, as_index=False)[[probability_column]].mean()


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
def costs(
    full: FullModel,
    image: Image.Image,
    question: str,
    drop_ratio: float,
    seed: int = 0,
) -> list[Cost]:
    """Measure the cost with all visual tokens and at a drop ratio."""
    model = full.model
    drop_ratios = (0.0, drop_ratio)
    inputs_of_ratios = [encode(full.processor, [image], question, ratio, seed) for ratio in drop_ratios]
    full_inputs = inputs_of_ratios[0]
    check_length(model, full_inputs, max_new_tokens=0)
    features = visual_features(model, full_inputs["pixel_values"])

    def prefill(inputs: BatchFeature) -> None:
        model(**text_inputs(model, inputs, features), logits_to_keep=1, use_cache=False)

    def seconds(function: Callable, *arguments) -> float:
        start = time.perf_counter()
        function(*arguments)
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        return time.perf_counter() - start

    # The functions take turns, so that other load on the machine affects all of them. The first round is not counted.
    rounds = []
    end = time.monotonic() + MEASURED_SECONDS
    while len(rounds) < 4 or (time.monotonic() < end and len(rounds) < 100):
        times = [seconds(visual_features, model, full_inputs["pixel_values"])]
        for inputs in inputs_of_ratios:
            times.append(seconds(prefill, inputs))
        rounds.append(times)
    vision_seconds, *language_seconds = np.median(rounds[1:], axis=0).tolist()
    costs_of_ratios = []
    for ratio, inputs, language_time in zip(drop_ratios, inputs_of_ratios, language_seconds):
        is_visual = inputs["input_ids"] == model.config.image_token_id
        with FlopCounterMode(display=False) as counter:
            prefill(inputs)
        cost = Cost(
            drop_ratio=ratio,
            num_visual_tokens=is_visual.sum().item(),
            sequence_length=inputs["input_ids"].shape[1],
            flops=counter.get_total_flops(),
            language_seconds=language_time,
            vision_seconds=vision_seconds,
        )
        costs_of_ratios.append(cost)
    return costs_of_ratios


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
    full, rgb = open_model_and_image(models, image, model)
    with turn(progress):
        progress(0.5, desc="Measuring forward passes")
        costs_of_ratios = costs(full, rgb, question or "", drop_ratio, seed or 0)
    full_cost, short_cost = costs_of_ratios
    summary = (
        f"{name_of(image)}: at a drop ratio of {drop_ratio:g} the language model does "
        f"{1 - short_cost.flops / full_cost.flops:.0%} fewer operations and takes {short_cost.language_seconds:.3g} s "
        f"instead of {full_cost.language_seconds:.3g} s. The ViT always sees the whole image, "
        f"{full_cost.vision_seconds:.3g} s. Medians of forward passes on {full.model.device.type}."
    )
    return pd.DataFrame(costs_of_ratios, columns=COST_COLUMNS).round(4), summary
