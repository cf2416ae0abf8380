"""The Space: a Gradio page to look at what a ViT has learned.

    vitp space
    python space/app.py

The environment variables that name the models are described in `loading.py`. Each tab is a module with one function,

    build_tab(models: Models, model_name: gr.Dropdown) -> Tab

which is called inside its `gr.Tab`. `model_name` is the model selector at the top of the page. Handlers take it as an
input and call `models.full(name)`, `models.backbone(name)` or `models.fine_tuned(name)`. Each model is opened once, in
a thread of its own.

Rules for a tab:

- Images come from `uploading.image_input`, whose `on` calls handlers with the paths. `uploading.open_upload` opens them
  as a `Reading`: the image and the input spec for the processor, `to_rgb()` for display, and a note to show.
- Handlers that run a model are decorated with `@computing.answering` and use `computing.turn(progress)` around the
  computation. Their events get `**computing.QUEUE`. Slow handlers report progress and have a button that cancels them.
- One action is one request. A result names its input, and `uploading.forget` clears it when the input changes.
- Errors are raised as `computing.message(text)` or as a `ValueError` of one line.
- Events of the page get `**computing.PRIVATE`; `api.py` has the functions for programs.
- Every component has a label, every image an `alt_text`. Sliders are created by `url_state.slider`.
- Downloads are written on request, to `saving.new_file`. A picture in an update (`gr.Image(…)`, `gr.update(…)`) is
  written by `saving.write_png`.
"""

from functools import partial
from pathlib import Path

import api
import apply_tab
import ask_tab
import backbone_tab
import compare_tab
import gradio as gr
import limits
import vrl_tab
from about import about
from computing import PRIVATE, QUEUE, answering
from loading import Models
from uploading import thumbnails
from url_state import keep_in_url

HERE = Path(__file__).parent
TABS = {
    "Backbone": backbone_tab.build_tab,
    "VRL": vrl_tab.build_tab,
    "Ask": ask_tab.build_tab,
    "Compare": compare_tab.build_tab,
    "Apply": apply_tab.build_tab,
}
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # The contrast of text and background is at least 4.5 to 1.
    color_accent="#0f766e",
    button_primary_background_fill="#0f766e",
    button_primary_background_fill_dark="#0f766e",
    button_primary_background_fill_hover="#115e59",
    button_primary_background_fill_hover_dark="#115e59",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_hover_dark="#991b1b",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_500",
)


def build_app(models: Models) -> gr.Blocks:
    """Build the page without launching it."""
    with gr.Blocks(title="ViTP: see what the ViT learned", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# See what the ViT learned\nLook at a ViT that was pretrained inside a vision-language model (ViTP, "
            "[arXiv 2509.17562](https://arxiv.org/abs/2509.17562)), and at the full model."
        )
        model_name = gr.Dropdown(
            models.names, value=models.default, label="Model (any Hub id)", allow_custom_value=True, elem_id="model"
        )
        state, at_start = {"model": model_name}, []
        with gr.Tabs() as tabs:
            for title, build_tab in TABS.items():
                with gr.Tab(title, id=title.lower()):
                    built = build_tab(models, model_name)
                    state |= built.state
                    at_start += built.at_start
        with gr.Accordion("About", open=False, elem_id="about"):
            box = gr.Markdown(about(models, models.default))
        with gr.Accordion("For programs", open=False, elem_id="programs"):
            gr.Markdown(api.EXAMPLE)
        model_name.input(answering(partial(about, models)), model_name, box, show_progress="hidden", **QUEUE, **PRIVATE)
        api.build_api(models)
        keep_in_url(app, tabs, state, at_start)
    return app.queue(max_size=None)  # `computing.Line` limits the number of waiting visitors.


def launch_options() -> dict:
    """Return the options of `launch`. Only uploads and files written by handlers can be downloaded."""
    return {
        "allowed_paths": [],
        "max_file_size": "200mb",
        "theme": THEME,
        "css_paths": HERE / "style.css",
        "css": thumbnails(),
        "head": f"<script>{(HERE / 'page.js').read_text()}</script>",
        "footer_links": ["api", "gradio", "settings"],
        "run_history": False,
        "state_session_capacity": limits.SESSIONS,
        "ssr_mode": False,
    }


if __name__ == "__main__":
    build_app(Models.from_environment()).launch(**launch_options())
