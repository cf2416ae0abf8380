"""The Apply tab: what a fine-tuned model finds in an image, drawn on it."""

import html

import gradio as gr
import numpy as np
from applied import Applied, Objects, apply
from computing import PRIVATE, QUEUE, gpu, message, told
from loading import Models
from PIL import Image
from uploading import example_choice, image_upload, open_rgb

MAX_SIDE = 1024
BEGIN = "Choose a fine-tuned model and an image, then apply."
KEPT = 3600  # seconds that a result can be drawn anew, as uploads are


def build_tab(models: Models, model_name: gr.Dropdown) -> dict[str, gr.components.Component]:
    """See `app.py`."""
    gr.Markdown(
        "What a model that was **fine-tuned** for detection, segmentation or change detection finds in an image, which "
        f"it sees as a whole and at no more than {MAX_SIDE} pixels a side; larger ones are for `vitp predict_large`."
    )
    names = models.fine_tuned_names
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            name = gr.Dropdown(
                names,
                value=names[0] if names else None,
                label="Fine-tuned model (any Hub id)",
                allow_custom_value=True,
                elem_id="apply_model",
            )
            upload = image_upload(elem_id="apply_image")
            example = example_choice(upload)
            later = image_upload("Second image, for changes", elem_id="apply_second_image")
            run = gr.Button("Apply", variant="primary", elem_id="run_apply")
            cancel = gr.Button("Cancel", size="sm")
            threshold = gr.Slider(0, 1, 0.3, step=0.01, label="Objects: drawn above this score", elem_id="threshold")
            opacity = gr.Slider(0, 1, 0.5, step=0.01, label="Classes and changes: opacity", elem_id="opacity")
        with gr.Column(scale=3):
            picture = gr.Image(
                label="What was found",
                alt_text="The image, with what the model found in it.",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                min_width=240,
                elem_id="apply_picture",
            )
            legend = gr.HTML(label="Legend", elem_id="apply_legend")
            note = gr.Markdown(BEGIN, label="Note", elem_id="apply_note")
    found = gr.State(time_to_live=KEPT)

    @gpu
    def apply_model(
        model: str | None,
        image: str | None,
        second_image: str | None,
        threshold: float,
        opacity: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """What a fine-tuned model finds: for drawing it anew, the picture, the legend, and a note."""
        if not model:
            raise message("There is no model yet: choose one, or type the id of one on the Hub.")
        progress(0, desc=f"Opening {model}")
        with told():
            one = models.fine_tuned(model)
        if one.takes_pairs and second_image is None:
            raise message(f"{model} finds changes: it needs a second image of the same ground.")
        paths = [image, second_image] if one.takes_pairs else [image]
        readings = [open_rgb(path, MAX_SIDE, one.input_spec) for path in paths]
        pictures = [rgb for rgb, _ in readings]
        if one.takes_pairs:
            size = pictures[0].shape[1::-1]
            pictures[1] = np.asarray(Image.fromarray(pictures[1]).resize(size, Image.Resampling.BICUBIC))
        progress(0.5, desc="Looking")
        result = apply(one, *pictures)
        return result, *drawn(result, threshold, opacity), "  \n".join(html.escape(note) for _, note in readings)

    running = run.click(
        apply_model,
        [name, upload, later, threshold, opacity],
        [found, picture, legend, note],
        api_name="apply",
        show_progress_on=picture,
        **QUEUE,
    )
    cancel.click(None, cancels=running)
    gr.on(
        [threshold.change, opacity.change],
        drawn,
        [found, threshold, opacity],
        [picture, legend],
        trigger_mode="always_last",
        show_progress="hidden",
        api_name="apply_draw",
    )
    gr.on([name.change, upload.change, later.change], forget, None, [found, picture, legend, note], **PRIVATE)
    return {"apply": name, "apply_image": example, "score": threshold, "opacity": opacity}


def drawn(found: Applied | None, threshold: float, opacity: float) -> tuple[Image.Image | None, str]:
    """The picture and the legend of what was found; no model is run."""
    if found is None:
        return None, ""
    if isinstance(found, Objects):
        return found.draw(threshold), found.legend(threshold)
    return found.draw(opacity), found.legend()


def forget() -> tuple:
    """What was found in another image, or by another model, is no longer shown."""
    return None, None, "", BEGIN
