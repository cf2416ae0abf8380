"""The tab on Visual Robustness Learning: which visual tokens are kept, what the model still says, what is saved."""

from collections.abc import Iterator

import gradio as gr
import pandas as pd
from answers import MAX_QUESTION, Answer, answers_by_drop_ratio, encode
from computing import QUEUE, gpu, told
from loading import Models
from PIL import Image
from uploading import example_choice, image_upload, open_upload
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


def build_tab(models: Models, model_name: gr.Dropdown) -> dict[str, gr.components.Component]:
    """See `app.py`."""

    def show_tokens(model: str, image: str | None, drop_ratio: float, seed: int) -> tuple:
        if image is None:
            return None, gr.update(value=None, visible=True), "", "There is no image yet."
        with told():
            processor = models.full(model).processor
            reading = open_upload(image, input_spec=processor.image_processor.input_spec)
            rgb = reading.to_rgb()
            inputs = encode(processor, [rgb], [{"role": "user", "content": QUESTION}], drop_ratio, int(seed or 0))
        kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
        maps = token_maps(processor, rgb.size, num_tiles, kept)
        total = num_tiles * processor.image_seq_length
        rows, columns = maps.grid
        tiles = f"{rows} × {columns} tiles and a thumbnail" if num_tiles > 1 else "one tile"
        summary = f"{total if kept is None else len(kept):,} of {total:,} visual tokens are kept, over {tiles}."
        thumbnail = None
        if maps.thumbnail is not None:
            size = processor.image_processor.size
            seen = rgb.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
            thumbnail = draw_tokens(seen.resize(THUMBNAIL_SIZE, Image.Resampling.NEAREST), maps.thumbnail)
        return (
            draw_tokens(rgb, maps.tiles, maps.grid),
            gr.update(value=thumbnail, visible=num_tiles > 1),
            summary,
            reading.note,
        )

    @gpu
    def draw_curve(
        model: str,
        image: str | None,
        question: str,
        seed: int,
        num_seeds: int,
        progress=gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        progress(0, desc="All visual tokens")
        with told():
            full = models.full(model)
            rgb = open_upload(image, input_spec=full.processor.image_processor.input_spec).to_rgb()
            seeds = range(int(seed or 0), int(seed or 0) + int(num_seeds))
            stream = answers_by_drop_ratio(
                full.model, full.processor, rgb, question or "", DROP_RATIOS, seeds, MAX_NEW_TOKENS
            )
            total, found = 1 + (len(DROP_RATIOS) - 1) * len(seeds), []
            for answer in stream:
                found.append(answer)
                progress((len(found), total), desc=f"Drop ratio {answer.drop_ratio:g}, seed {answer.seed}")
                yield curve_of(found, seeds), table_of(found), found[0].text

    @gpu
    def measure(model: str, image: str | None, question: str, drop_ratio: float, seed: int) -> tuple:
        with told():
            full = models.full(model)
            rgb = open_upload(image, input_spec=full.processor.image_processor.input_spec).to_rgb()
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
            f"At a drop ratio of {drop_ratio:g} the language model does {1 - short.flops / whole.flops:.0%} fewer "
            f"operations and takes {short.language_seconds:.3g} s instead of {whole.language_seconds:.3g} s. The ViT "
            f"always sees the whole image, {whole.vision_seconds:.3g} s. Medians of forward passes over image and "
            f"question, here on {full.model.device.type}."
        )
        return pd.DataFrame(rows, columns=COST_COLUMNS), summary

    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column(min_width=280):
            upload = image_upload(elem_id="vrl-image")
            example = example_choice(upload)
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

    gr.on(
        [upload.change, drop_ratio.change, seed.change, model_name.change],
        show_tokens,
        [model_name, upload, drop_ratio, seed],
        [tiles, thumbnail, summary, note],
        api_name="vrl_tokens",
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=tiles,
    )
    running = ask.click(
        draw_curve,
        [model_name, upload, question, seed, num_seeds],
        [curve, table, full_answer],
        api_name="vrl_curve",
        **QUEUE,
    )
    measuring = measure_button.click(
        measure,
        [model_name, upload, question, drop_ratio, seed],
        [cost_table, saved],
        api_name="vrl_cost",
        **QUEUE,
    )
    stop.click(None, cancels=[running, measuring])
    return {"vrl_image": example, "r": drop_ratio, "vrl_seed": seed, "vrl_q": question}


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
