"""The Space: what the ViT learned, to look at in a browser.

    vitp space
    python space/app.py

`loading.py` says which environment variables name the models. Each tab is a module with one function,

    build_tab(models: Models, model_name: gr.Dropdown) -> Tab

called inside of its `gr.Tab`. `model_name` is the choice of the model at the top of the page: handlers take it as an
input and call `models.full(name)`, `models.backbone(name)` or `models.fine_tuned(name)`, each opened once and beside
the serving of others.

What a tab keeps to:

- images come in through `uploading.image_input`, whose `on` calls handlers with their paths, and are opened with
  `uploading.open_upload` (a `Reading`: the image and the input spec for the processor, `to_rgb()` for display, and a
  note to be shown);
- handlers that run a model are marked `@computing.answering`, with `computing.turn(progress)` around what takes the
  machine; their events get `**computing.QUEUE`; slow ones report each step, and have a button that cancels them;
- one action is one request; a result names its input, and `uploading.forget` takes it away when that changes;
- what is wrong is raised as `computing.message(text)` or a `ValueError` in one line;
- events of the page are `**computing.PRIVATE`, and `api.py` has the functions for programs;
- every component has a label, images an `alt_text`; sliders are those of `url_state.slider`;
- downloads are made when they are asked for, and lie where `saving.new_file` says; a picture in an update
  (`gr.Image(…)`, `gr.update(…)`) is given by `saving.write_png`.
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
).set(  # text against what is behind it: 4.5 to 1 at least
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
    """The page, not yet launched."""
    with gr.Blocks(title="ViTP: see what the ViT learned", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# See what the ViT learned\nA ViT that was trained inside of a vision-language model (ViTP, "
            "[arXiv 2509.17562](https://arxiv.org/abs/2509.17562)), and the model that it was trained in."
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
    return app.queue(max_size=None)  # a full line is told by `computing.Line`


def launch_options() -> dict:
    """How the page is served; no file but uploads and what handlers made of them can be fetched."""
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
