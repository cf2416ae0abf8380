"""The Apply tab: runs a fine-tuned model on an image and draws the result."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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
from uploading import CROWNS, ImageInput, forget, image_input, image_upload, open_pixels, picture_of
from url_state import Tab, slider

from modeling_vitp.image_processing_vitp_detection import mask_of

MAX_SIDE = 1024
MASK_OPACITY = 0.4
BEGIN = "Choose a fine-tuned model and an image, then apply."
LIFETIME = 3600  # seconds for which a result can be redrawn, the same as for uploads


class Controls(NamedTuple):
    name: gr.Dropdown
    image: ImageInput
    second_image: gr.File
    run_button: gr.Button
    cancel_button: gr.Button
    threshold: gr.Slider
    opacity: gr.Slider


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
            controls = _build_controls(names)
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            picture = picture_of("Result", "apply_picture", "The image with the result of the model.")
            legend = gr.HTML(label="Legend", elem_id="apply_legend")
            note = gr.Markdown(BEGIN, label="Note", elem_id="apply_note")
    result = gr.State(time_to_live=LIFETIME)

    apply_model, if_fine_tuned = _handlers(models)
    image = controls.image
    name = controls.name
    threshold = controls.threshold
    opacity = controls.opacity
    second_image = controls.second_image
    inputs = [second_image, name, threshold, opacity]
    outputs = [result, picture, legend, note]
    running = image.on([controls.run_button.click], apply_model, inputs, outputs, show_progress_on=picture)
    controls.cancel_button.click(None, cancels=running)
    gr.on(
        [threshold.input, opacity.input],
        picture_and_legend,
        [result, threshold, opacity],
        [picture, legend],
        trigger_mode="always_last",
        show_progress="hidden",
        **PRIVATE,
    )
    changes = [*image.changes, second_image.upload, second_image.clear, second_image.delete, name.input]
    forget(changes, [picture, legend, note], [running])
    gr.on(
        changes,
        lambda: None,
        None,
        result,
        show_progress="hidden",
        **PRIVATE,
    )
    model_name.input(if_fine_tuned, model_name, name, show_progress="hidden", **PRIVATE)
    if not tab.visible:
        name.change(lambda model: gr.Tab(visible=bool(model)), name, tab, show_progress="hidden", **PRIVATE)
    state = {"apply": name, "apply_image": image.example, "score": threshold, "opacity": opacity}
    if not names:
        return Tab(state)
    return Tab(state, [(*image.with_path(apply_model, inputs), outputs, [*changes, controls.run_button.click])])


def _build_controls(names: Sequence[str]) -> Controls:
    name = gr.Dropdown(
        names,
        value=names[0] if names else None,
        label="Fine-tuned model (any Hub id)",
        allow_custom_value=True,
        elem_id="apply_model",
    )
    image = image_input("apply_image", CROWNS)
    second_image = image_upload("Second image, for changes", elem_id="apply_second_image")
    run_button = gr.Button("Apply", variant="primary", elem_id="run_apply", elem_classes="run")
    cancel_button = gr.Button("Cancel", size="sm")
    threshold = slider(
        minimum=0,
        maximum=1,
        value=0.3,
        step=0.01,
        label="Objects: drawn above this score",
        elem_id="threshold",
    )
    opacity = slider(
        minimum=0,
        maximum=1,
        value=0.5,
        step=0.01,
        label="Classes and changes: opacity",
        elem_id="opacity",
    )
    return Controls(
        name=name,
        image=image,
        second_image=second_image,
        run_button=run_button,
        cancel_button=cancel_button,
        threshold=threshold,
        opacity=opacity,
    )


def _handlers(models: Models) -> tuple[Callable, Callable]:
    """Return the handlers `apply_model` and `if_fine_tuned`."""

    @answering
    def apply_model(path, second_path, model, threshold, opacity, progress=PROGRESS):
        """Return the result of a fine-tuned model (to redraw it), its picture and legend, and a note."""
        result, text = result_of(models, path, second_path, model, progress)
        picture, legend = picture_and_legend(result, threshold, opacity)
        return result, picture, legend, text

    def if_fine_tuned(model):
        """Return the name of a fine-tuned model, to select it in the tab too."""
        try:
            is_fine_tuned = models.kind(model) == FINE_TUNED
        except UnavailableModel:
            is_fine_tuned = False
        return model if is_fine_tuned else gr.skip()

    return apply_model, if_fine_tuned


def result_of(
    models: Models,
    path: str | None,
    second_path: str | None,
    model: str | None,
    progress: gr.Progress = PROGRESS,
) -> tuple["Result | None", str]:
    """Return the result of a fine-tuned model for an image or a pair, and a note.

    The result is `None` if the model detects changes and the second image is missing, which the note then tells.

    Raises:
        gradio.Error: if the model or the image is missing.
    """
    if not model:
        raise message("No model is selected. Choose a model or type its Hub id.")
    progress(0, desc=f"Opening {model}")
    with errors_as_messages():
        fine_tuned = models.fine_tuned(model)
    if fine_tuned.takes_pairs and path is not None and second_path is None:
        return None, f"{html.escape(model)} detects changes. Choose the second image, of the same ground."
    image, note = open_pixels(path, MAX_SIDE, fine_tuned.input_spec)
    notes = [note]
    later = None
    if fine_tuned.takes_pairs:
        later, note = open_pixels(second_path, MAX_SIDE, fine_tuned.input_spec)
        notes.append(note)
        check_shapes(image, later)
        later = _resized_to(later, image)
    with turn(progress):
        progress(0.5, desc="Computing")
        result = apply(fine_tuned, image, later)
    lines = [f"**{html.escape(note)}**, {html.escape(model)}" for note in notes]
    return result, "  \n".join(lines)


def _resized_to(later: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Resize the later image of a pair to the size of the first one."""
    bands = torch.from_numpy(later).movedim(-1, 0)
    resized = resize(bands, image.shape[:2], InterpolationMode.BICUBIC)
    return resized.movedim(0, -1).contiguous().numpy()


def picture_and_legend(result: "Result | None", threshold: float, opacity: float) -> tuple[Image.Image | None, str]:
    """Return picture and legend for the page. Small images are enlarged so that the drawing is readable."""
    if result is None:
        return None, ""
    scale = max(1, DISPLAY_SIDE // max(result.image.shape[:2]))
    return result.draw(threshold, opacity, scale), result.legend(threshold)


@dataclass(frozen=True)
class Result:
    """Result of a model for an image, uint8 of shape `(height, width, 3)`, with the names of the classes.

    `values()` of each kind of result except `Objects` returns a number for each class, by its index, because two
    classes may have the same name.
    """

    image: np.ndarray
    names: list[str]

    caption: ClassVar[str]
    measure: ClassVar[str]
    """Name of the value of a class in the JSON."""
    longest_legend: ClassVar[int | None] = None
    """Largest number of classes in the legend."""

    def draw(self, threshold: float, opacity: float = 0.5, scale: int = 1) -> Image.Image:
        """Draw the result on the image, enlarged by `scale`."""
        return enlarged(self.image, scale)

    def facts(self, threshold: float = 0.0) -> dict:
        """Return the value of each class as JSON, in the order of the classes."""
        classes = [{"class": name, self.measure: value} for name, value in zip(self.names, self.values())]
        return {"classes": classes}

    def legend(self, threshold: float = 0.0) -> str:
        """Return an HTML table of the classes and their values, the largest first."""
        values = self.values()
        order = sorted(range(len(self.names)), key=lambda index: -values[index])
        percentages = {index: f"{100 * values[index]:.1f}%" for index in order[: self.longest_legend]}
        return self.table(self.caption, percentages)

    def table(self, caption: str, values: dict[int, str]) -> str:
        """Return an HTML table with color, name and value of classes, by their index."""
        rows = []
        for index, value in values.items():
            rows.append(
                f'<tr><td><i style="background: rgb{color_of(index)}"></i></td><th scope="row">'
                f"{html.escape(self.names[index])}</th><td>{value}</td></tr>"
            )
        return f'<table class="legend"><caption>{caption}</caption><tbody>{"".join(rows)}</tbody></table>'


@dataclass(frozen=True)
class Objects(Result):
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
        pixels = self.image.astype(np.float32)
        best_last = np.flatnonzero(self.scores > threshold)[::-1]
        if self.masks is not None:
            for index in best_last:
                mask = mask_of(self.masks[index])
                color = np.array(color_of(self.labels[index]))
                pixels[mask] += MASK_OPACITY * (color - pixels[mask])
        picture = enlarged(pixels, scale)
        for index in best_last:
            corners = [tuple(corner) for corner in (scale * self.corners[index]).tolist()]
            label = f"{self.names[self.labels[index]]} {self.scores[index]:.2f}"
            draw_outline(picture, corners, color_of(self.labels[index]), label)
        return picture

    def facts(self, threshold: float = 0.0) -> dict:
        """Return the objects above a score, with corners in pixels of the image of this width and height."""
        height, width = self.image.shape[:2]
        objects = []
        for label, score, corners in zip(self.labels, self.scores, self.corners):
            if score > threshold:
                objects.append({"class": self.names[label], "score": float(score), "corners": corners.tolist()})
        return {"width": width, "height": height, "objects": objects}

    def legend(self, threshold: float = 0.0) -> str:
        """Return the number of objects above a score in each class."""
        indices, counts = np.unique(self.labels[self.scores > threshold], return_counts=True)
        caption = f"Objects with a score above {threshold:g}: {counts.sum()}"
        counts_by_index = dict(zip(indices.tolist(), counts.tolist()))
        return self.table(caption, counts_by_index)


@dataclass(frozen=True)
class Classes(Result):
    """Class map of an image, or of the later image of a pair.

    Args:
        labels: class indices of shape `(height, width)`.
        unseen: index of a class that is not drawn, such as "no change".
    """

    labels: np.ndarray
    unseen: int = -1
    caption = "Share of the image"
    measure = "share"

    def draw(self, threshold: float, opacity: float = 0.5, scale: int = 1) -> Image.Image:
        """Draw the class colors over the image."""
        colors = np.array([color_of(index) for index in range(len(self.names))], np.float32)
        is_drawn = (self.labels != self.unseen)[..., None]
        pixels = self.image + opacity * is_drawn * (colors[self.labels] - self.image)
        return enlarged(pixels, scale)

    def values(self) -> list[float]:
        """Return the share of each class in the image."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        return (counts / self.labels.size).tolist()


@dataclass(frozen=True)
class Labels(Result):
    """Class probabilities of an image, of shape `(classes,)`."""

    probabilities: np.ndarray
    caption = "Probability of a class"
    measure = "probability"
    longest_legend = 10

    def values(self) -> list[float]:
        """Return the probability of each class."""
        return self.probabilities.tolist()


@torch.inference_mode()
def apply(fine_tuned: FineTuned, image: np.ndarray, later: np.ndarray | None = None) -> Result:
    """Apply a model to an image, or to a pair of the same size, as returned by [`uploading.open_pixels`]."""
    size = image.shape[:2]
    image_processor = fine_tuned.image_processor
    options = {"input_data_format": "channels_last", "return_tensors": "pt"}
    if fine_tuned.takes_pairs:
        options["images_after"] = later
    inputs = image_processor(image, **options).to(fine_tuned.model.device)
    outputs = fine_tuned.model(**inputs)
    rgb = in_colors(image, fine_tuned.band_names)
    if fine_tuned.is_classifier:
        logits = outputs.logits[0].float()
        is_multi_label = fine_tuned.model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(-1)
        return Labels(rgb, fine_tuned.names, probabilities.cpu().numpy())
    if fine_tuned.is_detector:
        return _objects_of(fine_tuned, outputs, rgb)
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    labels = labels.cpu().numpy()
    if fine_tuned.takes_pairs:
        later_rgb = in_colors(later, fine_tuned.band_names)
        return Classes(later_rgb, fine_tuned.names, labels, unseen=0)
    return Classes(rgb, fine_tuned.names, labels)


def _objects_of(fine_tuned: FineTuned, outputs: Any, rgb: np.ndarray) -> Objects:
    """Return the objects in the outputs of a detector, with rotated boxes, masks or upright boxes."""
    image_processor = fine_tuned.image_processor
    settings = {"threshold": 0.0, "target_sizes": [rgb.shape[:2]]}
    if getattr(outputs, "pred_corners", None) is not None:
        (objects,) = image_processor.post_process_oriented_object_detection(outputs, **settings)
        corners = objects["corners"].cpu().numpy()
    elif getattr(outputs, "pred_masks", None) is not None:
        (objects,) = image_processor.post_process_instance_segmentation(outputs, return_run_lengths=True, **settings)
        corners = _corners_of(objects["boxes"])
    else:
        (objects,) = image_processor.post_process_object_detection(outputs, **settings)
        corners = _corners_of(objects["boxes"])
    return Objects(
        image=rgb,
        names=fine_tuned.names,
        labels=objects["labels"].cpu().numpy(),
        scores=objects["scores"].cpu().numpy(),
        corners=corners,
        masks=objects.get("masks"),
    )


def _corners_of(boxes: torch.Tensor) -> np.ndarray:
    """Return the corners, of shape `(n, 4, 2)`, of upright boxes."""
    left, top, right, bottom = boxes.cpu().numpy().reshape(-1, 4).T
    corners = np.stack([[left, top], [right, top], [right, bottom], [left, bottom]])
    return corners.transpose(2, 0, 1)


def enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    """Return a picture in which each pixel, with values in [0, 255], is a square of `scale` pixels a side."""
    large_pixels = pixels.round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(large_pixels)


def color_of(label: int) -> tuple[int, int, int]:
    return ImageColor.getrgb(COLORS[label % len(COLORS)])
