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

import backbone_tab
import gradio as gr
from loading import Models

TABS = {"Backbone": backbone_tab.build_tab}


def build_app(models: Models) -> gr.Blocks:
    """The page, not yet launched."""
    with gr.Blocks(title="ViTP", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("# See what the ViT learned")
        model_name = gr.Dropdown(
            [models.default], value=models.default, label="Model", allow_custom_value=True, elem_id="model"
        )
        for title, build_tab in TABS.items():
            with gr.Tab(title):
                build_tab(models, model_name)
    return app


if __name__ == "__main__":
    build_app(Models.from_environment()).queue(max_size=64).launch(allowed_paths=[])
