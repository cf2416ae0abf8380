"""The Apply tab: what a fine-tuned model finds in an image, drawn on it."""

import html
from functools import partial

import gradio as gr
import numpy as np
from applied import Applied, Objects, apply
from checking import UnavailableModel
from compare_tab import check_shapes
from computing import PRIVATE, QUEUE, answering, message, told, turn
from kinds import FINE_TUNED
from loading import Models
from maps import DISPLAY_SIDE
from PIL import Image
from uploading import forget, image_input, image_upload, open_pixels
from url_state import Tab, slider

MAX_SIDE = 1024
BEGIN = "Choose a fine-tuned model and an image, then apply."
KEPT = 3600  # seconds that a result can be drawn anew, as uploads are


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """See `app.py`."""
    gr.Markdown(
        "What a model that was **fine-tuned** for detection, segmentation, change detection or classification finds in "
        f"an image, which it sees as a whole and at no more than {MAX_SIDE} pixels a side; larger ones are for `vitp "
        "predict_large`."
    )
    names = models.fine_tuned_names
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            name = gr.Dropdown(
                names,
                value=names[0] if names else None,
                label="Fine-tuned model (any Hub id)",
                allow_custom_value=True,
                elem_id="apply_model",
            )
            image = image_input("apply_image")
            later = image_upload("Second image, for changes", elem_id="apply_second_image")
            run = gr.Button("Apply", variant="primary", elem_id="run_apply")
            cancel = gr.Button("Cancel", size="sm")
            threshold = slider(0, 1, 0.3, step=0.01, label="Objects: drawn above this score", elem_id="threshold")
            opacity = slider(0, 1, 0.5, step=0.01, label="Classes and changes: opacity", elem_id="opacity")
        with gr.Column(scale=3, elem_classes="results"):
            picture = gr.Image(
                label="What was found",
                alt_text="The image, with what the model found in it.",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                min_width=240,
                elem_id="apply_picture",
                elem_classes="found",
            )
            legend = gr.HTML(label="Legend", elem_id="apply_legend")
            note = gr.Markdown(BEGIN, label="Note", elem_id="apply_note")
    found = gr.State(time_to_live=KEPT)

    @answering
    def apply_model(
        path: str | None,
        second_path: str | None,
        model: str | None,
        threshold: float,
        opacity: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """What a fine-tuned model finds: for drawing it anew, the picture, the legend, and a note."""
        result, note = found_by(models, path, second_path, model, progress)
        return result, *shown(result, threshold, opacity), note

    running = image.on(
        [run.click],
        apply_model,
        [later, name, threshold, opacity],
        [found, picture, legend, note],
        show_progress_on=picture,
        **QUEUE,
    )
    cancel.click(None, cancels=running)
    gr.on(
        [threshold.input, opacity.input],
        shown,
        [found, threshold, opacity],
        [picture, legend],
        trigger_mode="always_last",
        show_progress="hidden",
        **PRIVATE,
    )
    changes = [*image.changes, later.upload, later.clear, later.delete, name.input]
    forget(changes, [picture, legend, note], [None, "", BEGIN], [running])
    gr.on(changes, lambda: None, None, found, show_progress="hidden", **PRIVATE)
    model_name.input(partial(_if_fine_tuned, models), model_name, name, show_progress="hidden", **PRIVATE)
    state = {"apply": name, "apply_image": image.example, "score": threshold, "opacity": opacity}
    return Tab(state)


def found_by(
    models: Models, path: str | None, second_path: str | None, model: str | None, progress: gr.Progress | None = None
) -> tuple[Applied, str]:
    """What a fine-tuned model finds in an image or a pair, and a note.

    Raises:
        gradio.Error: if there is no model, or an image is missing.
    """
    if not model:
        raise message("There is no model yet: choose one, or type the id of one on the Hub.")
    if progress is not None:
        progress(0, desc=f"Opening {model}")
    with told():
        one = models.fine_tuned(model)
    if one.takes_pairs and second_path is None:
        raise message(f"{model} finds changes: it needs a second image of the same ground.")
    paths = [path, second_path] if one.takes_pairs else [path]
    readings = [open_pixels(one_path, MAX_SIDE, one.input_spec) for one_path in paths]
    pictures = [pixels for pixels, _ in readings]
    if one.takes_pairs:
        check_shapes(*pictures)
        size = pictures[0].shape[1::-1]
        bands = [Image.fromarray(band) for band in np.moveaxis(pictures[1], -1, 0)]
        pictures[1] = np.stack([np.asarray(band.resize(size, Image.Resampling.BICUBIC)) for band in bands], -1)
    with turn(progress):
        if progress is not None:
            progress(0.5, desc="Looking")
        result = apply(one, *pictures)
    return result, "  \n".join(f"**{html.escape(note)}**, by {html.escape(model)}" for _, note in readings)


def shown(found: Applied | None, threshold: float, opacity: float) -> tuple[Image.Image | None, str]:
    """The picture and the legend for the page: of a small image large enough for what is drawn on it."""
    if found is None:
        return None, ""
    return drawn(found, threshold, opacity, max(1, DISPLAY_SIDE // max(found.image.shape[:2])))


def drawn(found: Applied, threshold: float, opacity: float, scale: int = 1) -> tuple[Image.Image, str]:
    """The picture and the legend of what was found; no model is run."""
    if isinstance(found, Objects):
        return found.draw(threshold, scale), found.legend(threshold)
    return found.draw(opacity, scale), found.legend()


def _if_fine_tuned(models: Models, name: str) -> str | None:
    """The name, for the choice of this tab, if it is one of a fine-tuned model."""
    try:
        return name if models.kind(name) == FINE_TUNED else gr.skip()
    except UnavailableModel:
        return gr.skip()
