"""The Space: what the ViT learned, to look at in a browser.

    python space/app.py

`loading.py` says which environment variables name the models. Each tab is a module with one function,

    build_tab(models: Models, model_name: gr.Dropdown) -> dict[str, gr.components.Component]

called inside of its `gr.Tab`. `model_name` is the choice of the full model at the top of the page: handlers take it as
an input and call `models.full(name)`, which gives model and processor (loaded once, on the device), or
`models.backbone(name)`. The dictionary names the components whose values are kept in the page's URL, by their keys
there: short, unlike those of other tabs; values are strings and numbers.

What a tab keeps to:

- images come in through `uploading.image_upload` and are opened with `uploading.open_upload` (a `Reading`: the image
  and the input spec for the processor, `to_rgb()` for display, and a note to be shown);
- handlers that run a model are marked `@computing.gpu`, their events get `**computing.QUEUE`; slow ones report through
  `gr.Progress()` or are generators, and have a button that cancels them;
- what is wrong is raised as `computing.message(text)`; `UnavailableModel` of `models` has a message fit for it;
- every event that a client may call has an `api_name`, every component a label, images an `alt_text`;
- downloads are written into a folder of `tempfile.mkdtemp(dir=gradio.utils.get_upload_folder())`, which is cleared.
"""

from functools import partial
from pathlib import Path

import api
import apply_tab
import ask_tab
import backbone_tab
import compare_tab
import gradio as gr
import vrl_tab
from about import about
from computing import PRIVATE, told
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
        model_name.input(partial(_about, models), model_name, box, show_progress="hidden", **PRIVATE)
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
        "ssr_mode": False,
    }


def _about(models: Models, model: str) -> str:
    """What a model is: Markdown."""
    with told():
        return about(models, model)


if __name__ == "__main__":
    build_app(Models.from_environment()).launch(**launch_options())
