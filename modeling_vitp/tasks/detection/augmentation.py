"""Joint augmentation of images, masks and boxes.

Boxes are represented by their corners, because flips, rotations and resizes move corners exactly. torchvision
transforms the pixels. Its rotated boxes are not used, because it turns a stretched box into a rectangle again. Its
keypoints are not used, because it mirrors them about the center of a pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ...image_processing_vitp_detection import fitted_size
from ...images.corruptions import move_labels
from ...rotated_boxes import enclosing_boxes, smallest_rectangles
from .arguments import DetectionSettings

MIN_TURNED_SIDE = 5.0  # Smallest side of an object after a rotation in pixels, as in the authors' release.


@dataclass
class Sample:
    """Image with its objects.

    Args:
        image: image tensor, see [`~modeling_vitp.images.pixels.to_pixels`].
        corners: corners of the boxes in pixels, float32 of shape `(n, 4, 2)`.
        labels: class indices, int64 of shape `(n,)`.
        masks: instance masks, uint8 of shape `(n, height, width)`, or `None`.
    """

    image: torch.Tensor
    corners: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.image.shape[-2:])

    def take(self, chosen: torch.Tensor) -> "Sample":
        masks = None if self.masks is None else self.masks[chosen]
        return Sample(self.image, self.corners[chosen], self.labels[chosen], masks)


def resized(sample: Sample, size: int, keep_ratio: bool = True) -> Sample:
    """Resize a sample to fit into a square of `size` pixels, or stretch it to the square without `keep_ratio`."""
    old, new = sample.size, resized_size(sample.size, size, keep_ratio)
    return Sample(
        F.resize_image(sample.image, list(new), antialias=True),
        sample.corners * torch.tensor([new[1] / old[1], new[0] / old[0]]),
        sample.labels,
        # torchvision's resize of masks is not used, because it shifts masks by up to a pixel.
        None if sample.masks is None else F.resize_image(sample.masks, list(new), InterpolationMode.NEAREST_EXACT),
    )


def resized_size(image_size: tuple[int, int], size: int, keep_ratio: bool) -> tuple[int, int]:
    """Return height and width of an image after [`resized`]."""
    return fitted_size(image_size, size, size) if keep_ratio else (size, size)


def flipped(sample: Sample, horizontally: bool, vertically: bool) -> Sample:
    """Flip a sample. In continuous coordinates, x becomes width - x."""
    axes = [axis for axis, flips in ((-1, horizontally), (-2, vertically)) if flips]
    height, width = sample.size
    flips = torch.tensor([horizontally, vertically])
    corners = torch.where(flips, torch.tensor([width, height]) - sample.corners, sample.corners)
    masks = None if sample.masks is None else sample.masks.flip(axes)
    return Sample(sample.image.flip(axes), corners, sample.labels, masks)


def turned(sample: Sample, angle: float) -> Sample:
    """Rotate a sample counterclockwise about its center by an angle in degrees, with black padding.

    Objects are removed if their center leaves the image, or if their shorter side is at most 5 pixels. With masks, the
    boxes become the upright boxes around the rotated masks, and objects without a visible pixel are removed too.
    """
    height, width = sample.size
    center = torch.tensor([width / 2, height / 2])
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = Sample(
        F.rotate_image(sample.image, angle, InterpolationMode.BILINEAR),
        (sample.corners - center) @ torch.tensor([[cos, -sin], [sin, cos]]) + center,
        sample.labels,
        None if sample.masks is None else F.rotate_image(sample.masks, angle, InterpolationMode.NEAREST),
    )
    turned = turned.take(stays(turned))
    if turned.masks is None:
        return turned
    turned = turned.take(turned.masks.flatten(1).any(1).bool())
    return replace(turned, corners=corners_of(boxes_around(turned.masks)))


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """Return the upright boxes around masks that are not empty, to the outer borders of the last pixels, `(n, 4)`."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    """Return the corners `(n, 4, 2)` of upright boxes x1, y1, x2, y2, from the top left one clockwise."""
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(1, (4, 2))


def stays(sample: Sample) -> torch.Tensor:
    """Return which objects have their center in the image and sides above 5 pixels, bool of shape `(n,)`."""
    if not len(sample.corners):
        return torch.zeros(0, dtype=torch.bool)
    boxes = smallest_rectangles(sample.corners)
    height, width = sample.size
    centers = (boxes[:, :2] > 0) & (boxes[:, :2] < torch.tensor([width, height]))
    return centers.all(1) & (boxes[:, 3] > MIN_TURNED_SIDE)


def moved(item: dict[str, Any], matrix: torch.Tensor, is_oriented: bool) -> dict[str, Any]:
    """Move the objects of an evaluation sample as [`~modeling_vitp.images.corruptions.corrupt`] moves its image.

    As in [`turned`], objects are removed if their center leaves the image, and with masks also if no pixel is visible,
    and the boxes become the upright boxes around the moved masks. Other upright boxes become those around the moved
    corners. Upright boxes are clipped to the image. Oriented boxes may reach beyond it.

    Args:
        item: item of [`~modeling_vitp.tasks.detection.data.ObjectImages`].
        matrix: matrix of [`~modeling_vitp.images.corruptions.motion`].
        is_oriented: whether the boxes are oriented.

    Returns:
        Item with the moved objects and `valid`, bool of shape `(height, width)`, false for pixels from the padding.
    """
    height, width = item["image"].shape[-2:]
    item = {**item, "valid": move_labels(torch.ones(height, width, dtype=torch.bool), matrix, False)}
    if "corners" not in item:
        return item
    size = torch.tensor([width, height])
    corners = 2 * item["corners"].double() / size - 1
    corners = (corners @ matrix[:, :2].T + matrix[:, 2] + 1) / 2 * size
    is_kept = lie_in(corners.mean(1), item["valid"])
    is_whole = ((corners >= 0) & (corners <= size)).all(2).all(1)
    item["area"] = torch.where(is_whole, item["area"] * torch.linalg.det(matrix[:, :2]), torch.nan)
    if not is_oriented:
        boxes = enclosing_boxes(corners)
        if "masks" in item:
            item["masks"] = move_labels(item["masks"], matrix, 0)
            is_visible = item["masks"].flatten(1).bool().any(1)
            boxes[is_visible] = boxes_around(item["masks"][is_visible]).double()
            is_kept &= is_visible
        corners = corners_of(boxes).clamp(torch.zeros(2), size)
    item["corners"] = corners.float()
    is_kept |= item["crowd"]  # A crowd region still covers objects without annotation where it is visible.
    names = ("labels", "corners", "difficult", "crowd", "area", "masks")
    return item | {name: item[name][is_kept] for name in names if name in item}


def lie_in(centers: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return whether points x, y, `(n, 2)`, lie in valid pixels, bool of shape `(height, width)`."""
    height, width = valid.shape
    x, y = centers.floor().long().unbind(1)
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return is_inside & valid[y.clamp(0, height - 1), x.clamp(0, width - 1)]


class Augmentation:
    """Resize, random flips and random rotation.

    Args:
        settings: settings of the changes.
        names: names of the classes, for `right_angle_classes`.
    """

    def __init__(self, settings: DetectionSettings, names: Sequence[str]):
        unknown = sorted(set(settings.right_angle_classes) - set(names))
        if unknown:
            raise ValueError(f"right_angle_classes: unknown classes {unknown}. Classes: {list(names)}.")
        right_angle_classes = [names.index(name) for name in settings.right_angle_classes]
        self.settings = settings
        self.right_angle_classes = torch.tensor(right_angle_classes, dtype=torch.int64)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the augmented sample. A rotation that would remove all objects is not applied."""
        draw, turns, angle, quarters = torch.rand(4, generator=generator).tolist()
        settings = self.settings
        sample = resized(sample, settings.image_size, settings.keep_ratio)
        horizontal, vertical = settings.horizontal_flip, settings.vertical_flip
        if draw < horizontal + vertical + settings.diagonal_flip:
            is_vertical = draw >= horizontal
            sample = flipped(sample, not horizontal <= draw < horizontal + vertical, is_vertical)
        if turns < settings.rotation:
            is_right = torch.isin(sample.labels, self.right_angle_classes).any()
            angle = 90.0 * int(4 * quarters) if is_right else 360 * angle - 180
            rotated = turned(sample, angle)
            sample = rotated if len(rotated.labels) or not len(sample.labels) else sample
        return sample


def targets(sample: Sample, is_oriented: bool) -> dict[str, torch.Tensor]:
    """Return the labels of an image for a model.

    The labels are `class_labels`, and for oriented boxes `corners`, normalized by the image size. For other boxes they
    are `boxes` (center x, center y, width, height), clipped to the image and normalized, and `masks` if the sample has
    masks.
    """
    height, width = sample.size
    labels = {"class_labels": sample.labels}
    if is_oriented:
        return labels | {"corners": sample.corners / torch.tensor([width, height])}
    boxes = enclosing_boxes(sample.corners) if len(sample.labels) else sample.corners.new_zeros(0, 4)
    low, high = boxes.unflatten(1, (2, 2)).clamp(torch.zeros(2), torch.tensor([width, height])).unbind(1)
    boxes = torch.cat([(low + high) / 2, high - low], 1) / torch.tensor([width, height, width, height])
    return labels | {"boxes": boxes} | ({} if sample.masks is None else {"masks": sample.masks})
