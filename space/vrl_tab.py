"""The VRL tab: kept visual tokens of Visual Robustness Learning, answers with them, and saved computation."""

from collections.abc import Iterator

import gradio as gr
from answers import MAX_QUESTION
from charts import answer_chart
from computing import QUEUE, answering
from loading import Models
from saving import write_png
from uploading import forget, image_input, name_of
from url_state import Tab, slider
from vrl_explained import in_words, strip
from vrl_results import (
    ANSWER_COLUMNS,
    COST_COLUMNS,
    QUESTION,
    answers,
    curve_of,
    explained_by,
    kept_tokens,
    saved_by,
    table_of,
)

ANSWER_WIDTHS = ["110px", "80px", "130px", "300px", "160px", "220px"]  # A phone scrolls the table.
COST_WIDTHS = ["110px", "130px", "150px", "110px", "110px", "110px"]
INTRODUCTION = """\
During training, only a random subset of the visual tokens of an image is passed to the language model, so that the \
ViT learns to encode the information for the answer in every token. Kept tokens are bright. The processor draws them \
from all tiles and the thumbnail together."""


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""

    @answering
    def show_tokens(path: str | None, model: str, drop_ratio: float, seed: float) -> tuple:
        """Return image and thumbnail with the kept tokens, a summary, and a note on the file."""
        if path is None:
            return None, None, "", "No image is selected."
        tiles, thumbnail, summary, note = kept_tokens(models, path, model, drop_ratio, seed)
        small = thumbnail and write_png(thumbnail, "thumbnail.png")
        return tiles, gr.update(value=small, visible=thumbnail is not None), summary, note

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
            yield answer_chart(curve_of(found, seeds)), table_of(found), f"{name_of(path)}: {found[0].text}"

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

    @answering
    def with_and_without(
        path: str | None,
        model: str,
        question: str,
        drop_ratio: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        for found in explained_by(models, path, model, question, drop_ratio, seed, progress):
            shown = [part for one in found for part in (in_words(name_of(path), one), one.picture)]
            yield *shown, *([None] * (4 - len(shown))), strip(found[-1])

    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="inputs"):
            image = image_input("vrl-image")
            note = gr.Textbox(label="What was opened", interactive=False, elem_id="vrl-note")
            drop_ratio = slider(0, 0.99, value=0.75, step=0.01, label="Drop ratio", elem_id="vrl-drop-ratio")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        with gr.Column(scale=2, min_width=280, elem_classes="results"):
            tiles = gr.Image(
                label="Tiles: kept tokens are bright",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="vrl-tiles",
                elem_classes="found",
                alt_text="The image with tile borders; dropped visual tokens are dark.",
            )
            thumbnail = gr.Image(
                label="Thumbnail: kept tokens are bright",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                height=240,
                elem_classes="found",
                alt_text="The thumbnail of the image; dropped visual tokens are dark.",
            )
            summary = gr.Textbox(label="Visual tokens", interactive=False, elem_id="vrl-summary")

    gr.Markdown("## Answer with all tokens and with the kept tokens")
    with gr.Row():
        both = gr.Button("Answer with and without", variant="primary", elem_id="vrl-both")
        end_both = gr.Button("Stop", variant="stop")
    with gr.Row():
        whole = [
            gr.Textbox(label="With all visual tokens", interactive=False, lines=2, elem_id="vrl-whole"),
            attention_view("Attention: all tokens", "vrl-whole-map"),
        ]
        short = [
            gr.Textbox(label="With the kept tokens", interactive=False, lines=2, elem_id="vrl-short"),
            attention_view("Attention: kept tokens", "vrl-short-map"),
        ]
    sequence = gr.Image(
        label="Input of the language model: text (gray), kept tokens (bright), dropped tokens (dark)",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="sharp",
        elem_id="vrl-sequence",
        alt_text="The positions of the sequence: text, kept visual tokens, and gaps of dropped tokens.",
    )

    gr.Markdown("## Answers at growing drop ratios")
    with gr.Row():
        question = gr.Textbox(
            QUESTION, label="Question", lines=1, max_length=MAX_QUESTION, scale=3, min_width=280, elem_id="vrl-question"
        )
        num_seeds = slider(1, 8, value=3, step=1, label="Draws at each ratio", min_width=160)
    with gr.Row():
        ask = gr.Button("Ask at growing drop ratios", variant="primary", elem_id="vrl-ask")
        stop = gr.Button("Stop", variant="stop")
    full_answer = gr.Textbox(label="Answer with all visual tokens", interactive=False, elem_id="vrl-answer")
    curve = gr.HTML(label="Probability of that answer by drop ratio", elem_id="vrl-curve")
    table = gr.Dataframe(
        headers=ANSWER_COLUMNS,
        datatype="str",
        interactive=False,
        column_widths=ANSWER_WIDTHS,
        label="Answers by drop ratio and seed",
    )

    gr.Markdown("## Saved computation")
    measure_button = gr.Button("Measure on this machine", elem_id="vrl-measure")
    saved = gr.Textbox(label="Savings", interactive=False, lines=2, elem_id="vrl-saved")
    cost_table = gr.Dataframe(
        headers=COST_COLUMNS,
        datatype="str",
        interactive=False,
        column_widths=COST_WIDTHS,
        label="One forward pass, whole and shortened",
    )
    gr.Markdown(
        "LM GFLOPs are billions of floating-point operations of the language model: its matrix products, counted by "
        "torch. A multiply-add counts as two operations."
    )

    shown = [tiles, thumbnail, summary, note]
    running = image.on(
        [ask.click],
        draw_curve,
        [model_name, question, seed, num_seeds],
        [curve, table, full_answer],
        show_progress_on=table,
        **QUEUE,
    )
    measuring = image.on(
        [measure_button.click],
        measure,
        [model_name, question, drop_ratio, seed],
        [cost_table, saved],
        show_progress_on=cost_table,
        **QUEUE,
    )
    explaining = image.on(
        [both.click],
        with_and_without,
        [model_name, question, drop_ratio, seed],
        [*whole, *short, sequence],
        show_progress_on=sequence,
        **QUEUE,
    )
    end_both.click(None, cancels=explaining)
    stop.click(None, cancels=[running, measuring])
    changes = [*image.changes, model_name.input]
    forget(changes, shown, [None, None, "", ""])
    changes += [question.input, seed.input]
    forget([*changes, num_seeds.input], [curve, table, full_answer], ["", empty_of(ANSWER_COLUMNS), ""], [running])
    forget([*changes, drop_ratio.input], [*whole, *short, sequence], ["", None, "", None, None], [explaining])
    forget([*changes, drop_ratio.input], [cost_table, saved], [empty_of(COST_COLUMNS), ""], [measuring])
    tokens_of = [model_name, drop_ratio, seed]
    image.on(
        [*image.changes, drop_ratio.input, seed.input, model_name.input],
        show_tokens,
        tokens_of,
        shown,
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=tiles,
        **QUEUE,
    )
    state = {"vrl_image": image.example, "r": drop_ratio, "vrl_seed": seed, "vrl_q": question}
    return Tab(state, [(*image.with_path(show_tokens, tokens_of), shown)])


def attention_view(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes="found",
        alt_text=f"{label}; dropped tokens are dark.",
    )


def empty_of(columns: list[str]) -> dict:
    """Return the value of an empty table in the page."""
    return {"headers": columns, "data": [], "metadata": None}
