"""The tab on Visual Robustness Learning: which visual tokens are kept, what the model still says, what is saved."""

from collections.abc import Iterator

import gradio as gr
import pandas as pd
from answers import MAX_QUESTION, Answer, answers_by_drop_ratio, encode
from computing import PRIVATE, QUEUE, answering, turn
from loading import Models
from PIL import Image
from uploading import forget, image_input, name_of, open_upload
from url_state import Tab
from visual_tokens import draw_tokens, token_maps
from vrl_cost import costs

DROP_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_NEW_TOKENS = 16
THUMBNAIL_SIZE = (448, 448)  # pixels
QUESTION = "How many trees are there?"
ANSWER_COLUMNS = ["drop ratio", "seed", "visual tokens", "answer", "its probability", "… of the full answer"]
ANSWER_WIDTHS = ["110px", "80px", "130px", "300px", "160px", "220px"]  # a phone scrolls
COST_WIDTHS = ["110px", "130px", "150px", "110px", "110px", "110px"]
COST_COLUMNS = ["drop ratio", "visual tokens", "sequence length", "LM GFLOPs", "LM seconds", "ViT seconds"]
INTRODUCTION = """\
In training, ViTP lets only a random part of an image's visual tokens reach the language model, so that the ViT learns \
to put into every token what the answer needs. Bright tokens are kept; the draw is the processor's own, over all tiles \
and the thumbnail together."""


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """See `app.py`."""

    @answering
    def show_tokens(path: str | None, model: str, drop_ratio: float, seed: float) -> tuple:
        """The image and its thumbnail with the tokens that are kept, how many these are, and how the image was read."""
        if path is None:
            return None, None, "", "There is no image yet."
        tiles, thumbnail, summary, note = kept_tokens(models, path, model, drop_ratio, seed)
        return tiles, gr.update(value=thumbnail, visible=thumbnail is not None), summary, note

    @answering
    def draw_curve(
        path: str | None,
        model: str,
        question: str,
        seed: float,
        num_seeds: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        for found, seeds, total in answers(models, path, model, question, seed, num_seeds, progress):
            progress((len(found), total), desc=f"Drop ratio {found[-1].drop_ratio:g}, seed {found[-1].seed}")
            yield curve_of(found, seeds), table_of(found), f"{name_of(path)}: {found[0].text}"

    @answering
    def measure(
        path: str | None,
        model: str,
        question: str,
        drop_ratio: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        return saved_by(models, path, model, question, drop_ratio, seed, progress)

    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="inputs"):
            image = image_input("vrl-image")
            note = gr.Textbox(label="What was opened", interactive=False)
            drop_ratio = gr.Slider(0, 0.99, value=0.75, step=0.01, label="Drop ratio", elem_id="vrl-drop-ratio")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        with gr.Column(scale=2, min_width=280):
            tiles = gr.Image(
                label="Tiles: kept tokens are bright",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="vrl-tiles",
                alt_text="The image with borders of tiles; visual tokens that are dropped are dark.",
            )
            thumbnail = gr.Image(
                label="Thumbnail: kept tokens are bright",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                height=240,
                alt_text="The thumbnail of the image; visual tokens that are dropped are dark.",
            )
            summary = gr.Textbox(label="Visual tokens", interactive=False, elem_id="vrl-summary")

    gr.Markdown("## The answer as the ratio grows")
    with gr.Row():
        question = gr.Textbox(
            QUESTION, label="Question", lines=1, max_length=MAX_QUESTION, scale=3, min_width=280, elem_id="vrl-question"
        )
        num_seeds = gr.Slider(1, 8, value=3, step=1, label="Draws at each ratio", min_width=160)
    with gr.Row():
        ask = gr.Button("Ask at growing drop ratios", variant="primary", elem_id="vrl-ask")
        stop = gr.Button("Stop", variant="stop")
    full_answer = gr.Textbox(label="Answer with all visual tokens", interactive=False, elem_id="vrl-answer")
    curve = gr.LinePlot(
        x="drop ratio",
        y="probability",
        color="draw",
        x_lim=[0, 1],
        y_lim=[0, None],
        y_axis_format=".3~g",
        label="Probability of that answer by drop ratio (the table has the same numbers)",
    )
    table = gr.Dataframe(
        headers=ANSWER_COLUMNS,
        datatype="str",
        interactive=False,
        column_widths=ANSWER_WIDTHS,
        label="Answers by drop ratio and seed",
    )

    gr.Markdown("## What is saved")
    measure_button = gr.Button("Measure on this machine", elem_id="vrl-measure")
    saved = gr.Textbox(label="Saved", interactive=False, lines=2, elem_id="vrl-saved")
    cost_table = gr.Dataframe(
        headers=COST_COLUMNS,
        datatype="str",
        interactive=False,
        column_widths=COST_WIDTHS,
        label="One forward pass, whole and shortened",
    )
    gr.Markdown(
        "LM GFLOPs are billions of floating-point operations of the language model, counted by torch in its own code "
        "(matrix products; a multiplication and an addition are two)."
    )

    shown = [tiles, thumbnail, summary, note]
    options = {**QUEUE, **PRIVATE, "show_progress": "minimal", "show_progress_on": tiles}
    image.changed(show_tokens, [model_name, drop_ratio, seed], shown, **options)
    gr.on(
        [drop_ratio.input, seed.input, model_name.input],
        show_tokens,
        [image.upload, model_name, drop_ratio, seed],
        shown,
        trigger_mode="always_last",
        **options,
    )
    running = ask.click(
        draw_curve,
        [image.upload, model_name, question, seed, num_seeds],
        [curve, table, full_answer],
        show_progress_on=table,
        **QUEUE,
        **PRIVATE,
    )
    measuring = measure_button.click(
        measure,
        [image.upload, model_name, question, drop_ratio, seed],
        [cost_table, saved],
        show_progress_on=cost_table,
        **QUEUE,
        **PRIVATE,
    )
    stop.click(None, cancels=[running, measuring])
    changes = [image.upload.upload, image.upload.clear, image.upload.delete, image.example.input, model_name.input]
    forget(changes, shown, [None, None, "", ""])
    changes += [question.input, seed.input]
    forget([*changes, num_seeds.input], [curve, table, full_answer], [None, empty_of(ANSWER_COLUMNS), ""], [running])
    forget([*changes, drop_ratio.input], [cost_table, saved], [empty_of(COST_COLUMNS), ""], [measuring])
    state = {"vrl_image": image.example, "r": drop_ratio, "vrl_seed": seed, "vrl_q": question}
    return Tab(state, [image.restored(show_tokens, [model_name, drop_ratio, seed], shown)])


def empty_of(columns: list[str]) -> dict:
    """A table without rows, as the page has it."""
    return {"headers": columns, "data": [], "metadata": None}


def kept_tokens(
    models: Models, path: str, model: str, drop_ratio: float, seed: float
) -> tuple[Image.Image, Image.Image | None, str, str]:
    """The image and its thumbnail, if it has one, bright where visual tokens are kept; two lines in words."""
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


def answers(
    models: Models,
    path: str | None,
    model: str,
    question: str,
    seed: float,
    num_seeds: float,
    progress: gr.Progress | None = None,
) -> Iterator[tuple[list[Answer], range, int]]:
    """The answers so far, the seeds, and how many answers there will be."""
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


def saved_by(
    models: Models,
    path: str | None,
    model: str,
    question: str,
    drop_ratio: float,
    seed: float,
    progress: gr.Progress | None = None,
) -> tuple[pd.DataFrame, str]:
    """What dropping saves: a row with all visual tokens and one at the ratio, and the difference in words."""
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


def curve_of(answers: list[Answer], seeds: range) -> pd.DataFrame:
    """Points of the curve: the probability of the full answer for each draw and, of complete ratios, the mean."""
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
