"""The Apply tab: runs a fine-tuned model on an image and draws the result."""

import html
from dataclasses import dataclass
from typing import ClassVar

import gradio as gr
import numpy as np
import torch
from answers import COLORS, PROGRESS, draw_outline
from checking import UnavailableModel
from compare_tab import check_shapes
from computing import PRIVATE, answering, errors_as_messages, message, turn
from loading import FINE_TUNED, FineTuned, Models
from maps import DISPLAY_SIDE
from PIL import Image, ImageColor
from reading import in_colors
from torchvision.transforms.v2.functional import InterpolationMode, resize
from uploading import CROWNS, forget, image_input, image_upload, open_pixels, picture_of
from url_state import Tab, slider

from modeling_vitp.image_processing_vitp_detection import mask_of

MAX_SIDE = 1024
MASK_OPACITY = 0.4
BEGIN = "Choose a fine-tuned model and an image, then apply."
KEPT = 3600  # seconds for which a result can be redrawn, the same as for uploads


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`. The tab is hidden until a fine-tuned model is named."""
    names = models.fine_tuned_names
    introduction = gr.Markdown(
        "Run a model that was **fine-tuned** on the vision transformer, for detection, segmentation, change detection "
        f"or classification. Images are reduced to {MAX_SIDE} pixels a side; for larger ones, use `vitp predict_large`."
    )
    tab = introduction.parent
    tab.visible = bool(names) or not isinstance(tab, gr.Tab)
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            name = gr.Dropdown(
                names,
                value=names[0] if names else None,
                label="Fine-tuned model (any Hub id)",
                allow_custom_value=True,
                elem_id="apply_model",
            )
            image = image_input("apply_image", CROWNS)
            later = image_upload("Second image, for changes", elem_id="apply_second_image")
            run = gr.Button("Apply", variant="primary", elem_id="run_apply", elem_classes="run")
            cancel = gr.Button("Cancel", size="sm")
            threshold = slider(0, 1, 0.3, step=0.01, label="Objects: drawn above this score", elem_id="threshold")
            opacity = slider(0, 1, 0.5, step=0.01, label="Classes and changes: opacity", elem_id="opacity")
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            picture = picture_of("Result", "apply_picture", "The image with the result of the model.")
            legend = gr.HTML(label="Legend", elem_id="apply_legend")
            note = gr.Markdown(BEGIN, label="Note", elem_id="apply_note")
    found = gr.State(time_to_live=KEPT)

    @answering
    def apply_model(path, second_path, model, threshold, opacity, progress=PROGRESS):
        """Return the result of a fine-tuned model (to redraw it), its picture and legend, and a note."""
        result, text = found_by(models, path, second_path, model, progress)
        return result, *shown(result, threshold, opacity), text

    def if_fine_tuned(model):
        try:
            return model if models.kind(model) == FINE_TUNED else gr.skip()
        except UnavailableModel:
            return gr.skip()

    inputs, outputs = [later, name, threshold, opacity], [found, picture, legend, note]
    running = image.on([run.click], apply_model, inputs, outputs, show_progress_on=picture)
    cancel.click(None, cancels=running)
    redraw = {"trigger_mode": "always_last", "show_progress": "hidden", **PRIVATE}
    gr.on([threshold.input, opacity.input], shown, [found, threshold, opacity], [picture, legend], **redraw)
    changes = [*image.changes, later.upload, later.clear, later.delete, name.input]
    forget(changes, [picture, legend, note], [running])
    gr.on(changes, lambda: None, None, found, show_progress="hidden", **PRIVATE)
    model_name.input(if_fine_tuned, model_name, name, show_progress="hidden", **PRIVATE)
    if not tab.visible:
        name.change(lambda model: gr.Tab(visible=bool(model)), name, tab, show_progress="hidden", **PRIVATE)
    state = {"apply": name, "apply_image": image.example, "score": threshold, "opacity": opacity}
    return Tab(state, [(*image.with_path(apply_model, inputs), outputs)] if names else [])


def found_by(
    models: Models, path: str | None, second_path: str | None, model: str | None, progress: gr.Progress = PROGRESS
) -> tuple["Found | None", str]:
    """Return the result of a fine-tuned model for an image or a pair, and a note.

    The result is `None` if the model detects changes and the second image is missing, which the note then tells.

    Raises:
        gradio.Error: if the model or the image is missing.
    """
    if not model:
        raise message("No model is selected. Choose a model or type its Hub id.")
    progress(0, desc=f"Opening {model}")
    with errors_as_messages():
        one = models.fine_tuned(model)
    if one.takes_pairs and path is not None and second_path is None:
        return None, f"{html.escape(model)} detects changes. Choose the second image, of the same ground."
    paths = [path, second_path] if one.takes_pairs else [path]
    pictures, notes = zip(*(open_pixels(one_path, MAX_SIDE, one.input_spec) for one_path in paths))
    if one.takes_pairs:
        check_shapes(*pictures)
        bands = torch.from_numpy(pictures[1]).movedim(-1, 0)
        resized = resize(bands, pictures[0].shape[:2], InterpolationMode.BICUBIC)
        pictures = pictures[0], resized.movedim(0, -1).contiguous().numpy()
    with turn(progress):
        progress(0.5, desc="Computing")
        result = apply(one, *pictures)
    return result, "  \n".join(f"**{html.escape(note)}**, {html.escape(model)}" for note in notes)


def shown(found: "Found | None", threshold: float, opacity: float) -> tuple[Image.Image | None, str]:
    """Return picture and legend for the page. Small images are enlarged so that the drawing is readable."""
    if found is None:
        return None, ""
    scale = max(1, DISPLAY_SIDE // max(found.image.shape[:2]))
    return found.draw(threshold, opacity, scale), found.legend(threshold)


@dataclass(frozen=True)
class Found:
    """Result of a model for an image, uint8 of shape `(height, width, 3)`, with the names of the classes.

    `facts(threshold)` of each kind of result returns the result as JSON.
    """

    image: np.ndarray
    names: list[str]

    caption: ClassVar[str]
    most: ClassVar[int | None] = None
    """Largest number of classes in the legend."""

    def draw(self, threshold: float, opacity: float = 0.5, scale: int = 1) -> Image.Image:
        """Draw the result on the image, enlarged by `scale`."""
        return enlarged(self.image, scale)

    def legend(self, threshold: float = 0.0) -> str:
        """Return an HTML table of the classes and their values, the largest first."""
        (values,) = self.facts().values()
        order = sorted(range(len(self.names)), key=lambda index: -values[self.names[index]])
        return self.table(
            self.caption, {index: f"{100 * values[self.names[index]]:.1f}%" for index in order[: self.most]}
        )

    def table(self, caption: str, values: dict[int, str]) -> str:
        """Return an HTML table with color, name and value of classes, by their index."""
        rows = "".join(
            f'<tr><td><i style="background: rgb{color_of(index)}"></i></td><th scope="row">'
            f"{html.escape(self.names[index])}</th><td>{value}</td></tr>"
            for index, value in values.items()
        )
        return f'<table class="legend"><caption>{caption}</caption><tbody>{rows}</tbody></table>'


@dataclass(frozen=True)
class Objects(Found):
    """Objects found by a detector, by descending score.

    Args:
        labels, scores: arrays of shape `(n,)`.
        corners: corners of the boxes in pixels, of shape `(n, 4, 2)`.
        masks: masks in COCO's run-length encoding, if the model predicts masks.
    """

    labels: np.ndarray
    scores: np.ndarray
    corners: np.ndarray
    masks: list[dict] | None

    def draw(self, threshold: float, opacity: float = 0.5, scale: int = 1) -> Image.Image:
        """Draw outlines and masks of the objects above a score, the best on top."""
        drawn, indices = self.image.astype(np.float32), np.flatnonzero(self.scores > threshold)[::-1]
        for index in indices if self.masks is not None else ():
            inside = mask_of(self.masks[index])
            drawn[inside] += MASK_OPACITY * (np.array(color_of(self.labels[index])) - drawn[inside])
        picture = enlarged(drawn, scale)
        for index in indices:
            corners = [tuple(corner) for corner in (scale * self.corners[index]).tolist()]
            label = f"{self.names[self.labels[index]]} {self.scores[index]:.2f}"
            draw_outline(picture, corners, color_of(self.labels[index]), label)
        return picture

    def facts(self, threshold: float = 0.0) -> dict:
        """Return the objects above a score, with corners in pixels of the image of this width and height."""
        height, width = self.image.shape[:2]
        objects = [
            {"class": self.names[label], "score": float(score), "corners": corners.tolist()}
            for label, score, corners in zip(self.labels, self.scores, self.corners)
            if score > threshold
        ]
        return {"width": width, "height": height, "objects": objects}

    def legend(self, threshold: float = 0.0) -> str:
        """Return the number of objects above a score in each class."""
        indices, counts = np.unique(self.labels[self.scores > threshold], return_counts=True)
        caption = f"Objects with a score above {threshold:g}: {counts.sum()}"
        return self.table(caption, dict(zip(indices.tolist(), counts.tolist())))


@dataclass(frozen=True)
class Classes(Found):
    """Class map of an image, or of the later image of a pair.

    Args:
        labels: class indices of shape `(height, width)`.
        unseen: index of a class that is not drawn, such as "no change".
    """

    labels: np.ndarray
    unseen: int = -1
    caption = "Share of the image"

    def draw(self, threshold: float, opacity: float = 0.5, scale: int = 1) -> Image.Image:
        """Draw the class colors over the image."""
        colors = np.array([color_of(index) for index in range(len(self.names))], np.float32)
        seen = (self.labels != self.unseen)[..., None]
        return enlarged(self.image + opacity * seen * (colors[self.labels] - self.image), scale)

    def facts(self, threshold: float = 0.0) -> dict:
        """Return the share of each class in the image."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        return {"shares": dict(zip(self.names, (counts / self.labels.size).tolist()))}


@dataclass(frozen=True)
class Labels(Found):
    """Class probabilities of an image, of shape `(classes,)`."""

    probabilities: np.ndarray
    caption, most = "Probability of a class", 10

    def facts(self, threshold: float = 0.0) -> dict:
        """Return the probability of each class."""
        return {"probabilities": dict(zip(self.names, self.probabilities.tolist()))}


@torch.inference_mode()
def apply(one: FineTuned, image: np.ndarray, later: np.ndarray | None = None) -> Found:
    """Apply a model to an image, or to a pair of the same size, as returned by [`uploading.open_pixels`]."""
    size = image.shape[:2]
    options = {"input_data_format": "channels_last", "return_tensors": "pt"}
    if one.takes_pairs:
        options["images_after"] = later
    inputs = one.image_processor(image, **options).to(one.model.device)
    outputs = one.model(**inputs)
    image, later = (None if pixels is None else in_colors(pixels, one.band_names) for pixels in (image, later))
    if one.is_classifier:
        logits = outputs.logits[0].float()
        is_many = one.model.config.problem_type == "multi_label_classification"
        return Labels(image, one.names, (logits.sigmoid() if is_many else logits.softmax(-1)).cpu().numpy())
    if not one.is_detector:
        (labels,) = one.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        drawn_on = image if later is None else later
        return Classes(drawn_on, one.names, labels.cpu().numpy(), unseen=0 if one.takes_pairs else -1)
    settings = {"threshold": 0.0, "target_sizes": [size]}
    if getattr(outputs, "pred_corners", None) is not None:
        (found,) = one.image_processor.post_process_oriented_object_detection(outputs, **settings)
        corners = found["corners"].cpu().numpy()
    else:
        if getattr(outputs, "pred_masks", None) is None:
            (found,) = one.image_processor.post_process_object_detection(outputs, **settings)
        else:
            settings["return_run_lengths"] = True
            (found,) = one.image_processor.post_process_instance_segmentation(outputs, **settings)
        left, top, right, bottom = found["boxes"].cpu().numpy().reshape(-1, 4).T
        corners = np.stack([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    labels, scores = (found[name].cpu().numpy() for name in ("labels", "scores"))
    return Objects(image, one.names, labels, scores, corners, found.get("masks"))


def enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    """Return a picture in which each pixel, with values in [0, 255], is a square of `scale` pixels a side."""
    return Image.fromarray(pixels.round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1))


def color_of(label: int) -> tuple[int, int, int]:
    return ImageColor.getrgb(COLORS[label % len(COLORS)])
