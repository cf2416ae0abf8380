"""The Apply tab: runs a fine-tuned model on an image and draws the result."""

import html
from functools import partial

import gradio as gr
import numpy as np
from applied import Applied, Objects, apply
from checking import UnavailableModel
from compare_tab import check_shapes
from computing import PRIVATE, QUEUE, answering, errors_as_messages, message, turn
from kinds import FINE_TUNED
from loading import Models
from maps import DISPLAY_SIDE
from PIL import Image
from uploading import forget, image_input, image_upload, open_pixels
from url_state import Tab, slider

MAX_SIDE = 1024
BEGIN = "Choose a fine-tuned model and an image, then apply."
KEPT = 3600  # seconds for which a result can be redrawn, the same as for uploads


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    gr.Markdown(
        "Run a model that was **fine-tuned** for detection, segmentation, change detection or classification on an "
        f"image. Images are reduced to at most {MAX_SIDE} pixels a side; use `vitp predict_large` for larger ones."
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
                label="Result",
                alt_text="The image with the result of the model.",
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
        """Return the result of a fine-tuned model (to redraw it), its picture and legend, and a note."""
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
    """Return the result of a fine-tuned model for an image or a pair, and a note.

    Raises:
        gradio.Error: if the model or an image is missing.
    """
    if not model:
        raise message("No model is selected. Choose a model or type its Hub id.")
    if progress is not None:
        progress(0, desc=f"Opening {model}")
    with errors_as_messages():
        one = models.fine_tuned(model)
    if one.takes_pairs and second_path is None:
        raise message(f"{model} detects changes and needs a second image of the same ground.")
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
            progress(0.5, desc="Computing")
        result = apply(one, *pictures)
    return result, "  \n".join(f"**{html.escape(note)}**, {html.escape(model)}" for _, note in readings)


def shown(found: Applied | None, threshold: float, opacity: float) -> tuple[Image.Image | None, str]:
    """Return picture and legend for the page. Small images are enlarged so that the drawing is readable."""
    if found is None:
        return None, ""
    return drawn(found, threshold, opacity, max(1, DISPLAY_SIDE // max(found.image.shape[:2])))


def drawn(found: Applied, threshold: float, opacity: float, scale: int = 1) -> tuple[Image.Image, str]:
    """Draw a result and return picture and legend, without running the model."""
    if isinstance(found, Objects):
        return found.draw(threshold, scale), found.legend(threshold)
    return found.draw(opacity, scale), found.legend()


def _if_fine_tuned(models: Models, name: str) -> str | None:
    """Return the name if the model is fine-tuned, otherwise keep the selected one."""
    try:
        return name if models.kind(name) == FINE_TUNED else gr.skip()
    except UnavailableModel:
        return gr.skip()
