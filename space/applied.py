"""Results of fine-tuned models and their drawings: objects, class maps and image classes."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from boxes import COLORS
from opened import FineTuned
from PIL import Image, ImageColor, ImageDraw, ImageFont
from reading import in_colors

from modeling_vitp.image_processing_vitp_detection import mask_of

MASK_OPACITY = 0.4
MOST_LABELS = 10


@dataclass(frozen=True)
class Objects:
    """Objects found by a detector, by descending score.

    Args:
        image: uint8 of shape `(height, width, 3)`.
        names: names of the classes.
        labels, scores: arrays of shape `(n,)`.
        corners: corners of the boxes in pixels, of shape `(n, 4, 2)`.
        masks: masks in COCO's run-length encoding, if the model predicts masks.
    """

    image: np.ndarray
    names: list[str]
    labels: np.ndarray
    scores: np.ndarray
    corners: np.ndarray
    masks: list[dict] | None

    def draw(self, threshold: float, scale: int = 1) -> Image.Image:
        """Draw outlines and masks of the objects above a score on the image, enlarged by `scale`; the best on top."""
        drawn = self.image.astype(np.float32)
        shown = [index for index in range(len(self.scores)) if self.scores[index] > threshold][::-1]
        for index in shown if self.masks is not None else ():
            inside = mask_of(self.masks[index])
            drawn[inside] += MASK_OPACITY * (np.array(color_of(self.labels[index])) - drawn[inside])
        picture = enlarged(drawn, scale)
        draw = ImageDraw.Draw(picture)
        side = max(picture.size)
        line, font = max(2, round(side / 400)), ImageFont.load_default(max(10, round(side / 60)))
        for index in shown:
            color = color_of(self.labels[index])
            corners = scale * self.corners[index]
            points = [tuple(point) for point in corners.tolist()]
            draw.line([*points, points[0]], fill=color, width=line)
            text = f"{self.names[self.labels[index]]} {self.scores[index]:.2f}"
            left, top = corners.min(0)
            width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")[2:]
            left = min(max(left, 0), max(picture.width - width - 4, 0))
            top = top - height - 4 if top >= height + 4 else max(top, 0)
            draw.rectangle((left, top, left + width + 4, top + height + 4), fill=color)
            draw.text((left + 2, top + 2), text, fill="black", font=font, anchor="lt")
        return picture

    def legend(self, threshold: float) -> str:
        """Return the number of objects above a score in each class, as HTML."""
        counts = np.bincount(self.labels[self.scores > threshold], minlength=len(self.names))
        rows = [(name, color_of(index), str(counts[index])) for index, name in enumerate(self.names) if counts[index]]
        return table_of(f"Objects with a score above {threshold:g}: {counts.sum()}", rows)


@dataclass(frozen=True)
class Classes:
    """Class map of an image.

    Args:
        image: uint8 of shape `(height, width, 3)`; the later image of a pair.
        names: names of the classes.
        labels: class indices of shape `(height, width)`.
        unseen: index of a class that is not drawn, such as "no change".
    """

    image: np.ndarray
    names: list[str]
    labels: np.ndarray
    unseen: int | None = None

    def draw(self, opacity: float, scale: int = 1) -> Image.Image:
        """Draw the class colors over the image, enlarged by `scale`."""
        colors = np.array([color_of(index) for index in range(len(self.names))], np.float32)
        seen = self.labels != (-1 if self.unseen is None else self.unseen)
        return enlarged(self.image + opacity * seen[..., None] * (colors[self.labels] - self.image), scale)

    def legend(self) -> str:
        """Return the share of each class in the image, as HTML."""
        shares = np.bincount(self.labels.ravel(), minlength=len(self.names)) / self.labels.size
        order = sorted(range(len(self.names)), key=lambda index: -shares[index])
        rows = [(self.names[index], color_of(index), f"{100 * shares[index]:.1f}%") for index in order]
        return table_of("Share of the image", rows)


@dataclass(frozen=True)
class Labels:
    """Class probabilities of an image.

    Args:
        image: uint8 of shape `(height, width, 3)`.
        names: names of the classes.
        probabilities: array of shape `(classes,)`, which sums to 1 unless the model is a multi-label classifier.
    """

    image: np.ndarray
    names: list[str]
    probabilities: np.ndarray

    def draw(self, _: float, scale: int = 1) -> Image.Image:
        """Return the image enlarged by `scale`."""
        return enlarged(self.image, scale)

    def legend(self) -> str:
        """Return the most probable classes, as HTML."""
        best = np.argsort(-self.probabilities, kind="stable")[:MOST_LABELS]
        rows = [(self.names[index], color_of(index), f"{100 * self.probabilities[index]:.1f}%") for index in best]
        return table_of("Probability of a class", rows)


Applied = Objects | Classes | Labels


@torch.inference_mode()
def apply(one: FineTuned, image: np.ndarray, later: np.ndarray | None = None) -> Applied:
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
        shown = image if later is None else later
        return Classes(shown, one.names, labels.cpu().numpy(), unseen=0 if one.takes_pairs else None)
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


def table_of(caption: str, rows: Sequence[tuple[str, tuple[int, int, int], str]]) -> str:
    """Return an HTML table with color, name and value of each class."""
    lines = "".join(
        f'<tr><td><i style="background: rgb{color}"></i></td><th scope="row">{html.escape(name)}</th>'
        f"<td>{value}</td></tr>"
        for name, color, value in rows
    )
    return f'<table class="legend"><caption>{caption}</caption><tbody>{lines}</tbody></table>'
