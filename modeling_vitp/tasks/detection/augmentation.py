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

# Of the transform of the authors' release that rotates images at random.
MIN_TURNED_SIDE = 5.0  # Objects with a side of at most so many pixels are removed.
RIGHT_ANGLES = (-90.0, 90.0, -180.0, 180.0)  # Half of the rotations by right angles turn an image upside down.


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

    def take(self, selection: torch.Tensor) -> "Sample":
        masks = None if self.masks is None else self.masks[selection]
        return Sample(self.image, self.corners[selection], self.labels[selection], masks)


def resized(sample: Sample, size: int, keep_ratio: bool = True) -> Sample:
    """Resize a sample to fit into a square of `size` pixels, or stretch it to the square without `keep_ratio`."""
    height, width = sample.size
    new_height, new_width = resized_size(sample.size, size, keep_ratio)
    scale = torch.tensor([new_width / width, new_height / height])
    masks = sample.masks
    if masks is not None:
        # torchvision's resize of masks is not used, because it shifts masks by up to a pixel.
        masks = F.resize_image(
            masks,
            [new_height, new_width],
            InterpolationMode.NEAREST_EXACT,
        )
    image = F.resize_image(
        sample.image,
        [new_height, new_width],
        antialias=True,
    )
    return Sample(
        image=image,
        corners=sample.corners * scale,
        labels=sample.labels,
        masks=masks,
    )


def resized_size(image_size: tuple[int, int], size: int, keep_ratio: bool) -> tuple[int, int]:
    """Return height and width of an image after [`resized`]."""
    if keep_ratio:
        return fitted_size(image_size, size, size)
    return (size, size)


def flipped(sample: Sample, horizontally: bool, vertically: bool) -> Sample:
    """Flip a sample. In continuous coordinates, x becomes width - x."""
    axes = []
    if horizontally:
        axes.append(-1)
    if vertically:
        axes.append(-2)
    height, width = sample.size
    mirrored_corners = torch.tensor([width, height]) - sample.corners
    is_flipped = torch.tensor([horizontally, vertically])
    masks = sample.masks
    if masks is not None:
        masks = masks.flip(axes)
    return Sample(
        image=sample.image.flip(axes),
        corners=torch.where(is_flipped, mirrored_corners, sample.corners),
        labels=sample.labels,
        masks=masks,
    )


def turned(sample: Sample, angle: float) -> Sample:
    """Rotate a sample counterclockwise about its center by an angle in degrees, with black padding.

    Objects are removed if their center leaves the image, or if their shorter side is at most 5 pixels. With masks, the
    boxes become the upright boxes around the rotated masks, and objects without a visible pixel are removed too.
    """
    height, width = sample.size
    center = torch.tensor([width / 2, height / 2])
    cos = math.cos(math.radians(angle))
    sin = math.sin(math.radians(angle))
    rotation = torch.tensor(
        [
            [cos, -sin],
            [sin, cos],
        ]
    )
    masks = sample.masks
    if masks is not None:
        masks = F.rotate_image(masks, angle, InterpolationMode.NEAREST)
    rotated = Sample(
        image=F.rotate_image(sample.image, angle, InterpolationMode.BILINEAR),
        corners=(sample.corners - center) @ rotation + center,
        labels=sample.labels,
        masks=masks,
    )
    rotated = rotated.take(stays(rotated))
    if rotated.masks is None:
        return rotated
    is_visible = rotated.masks.flatten(1).any(1).bool()
    rotated = rotated.take(is_visible)
    boxes = boxes_around(rotated.masks)
    return replace(rotated, corners=corners_of(boxes))


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
    centers = boxes[:, :2]
    shorter_sides = boxes[:, 3]
    height, width = sample.size
    is_inside = (centers > 0) & (centers < torch.tensor([width, height]))
    return is_inside.all(1) & (shorter_sides > MIN_TURNED_SIDE)


def moved(
    item: dict[str, Any],
    matrix: torch.Tensor,
    is_oriented: bool,
) -> dict[str, Any]:
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
    whole_image = torch.ones(height, width, dtype=torch.bool)
    item = dict(item)
    item["valid"] = move_labels(whole_image, matrix, False)
    if "corners" not in item:
        return item

    # The matrix is for coordinates in [-1, 1].
    size = torch.tensor([width, height])
    linear_part = matrix[:, :2]
    offset = matrix[:, 2]
    normalized_corners = 2 * item["corners"].double() / size - 1
    moved_corners = normalized_corners @ linear_part.T + offset
    corners = (moved_corners + 1) / 2 * size

    is_kept = lie_in(corners.mean(1), item["valid"])
    is_unclipped = ((corners >= 0) & (corners <= size)).all(2).all(1)
    scaled_areas = item["area"] * torch.linalg.det(linear_part)
    item["area"] = torch.where(is_unclipped, scaled_areas, torch.nan)
    if not is_oriented:
        boxes = enclosing_boxes(corners)
        if "masks" in item:
            masks = move_labels(item["masks"], matrix, 0)
            is_visible = masks.flatten(1).bool().any(1)
            boxes[is_visible] = boxes_around(masks[is_visible]).double()
            is_kept &= is_visible
            item["masks"] = masks
        corners = corners_of(boxes).clamp(torch.zeros(2), size)
    item["corners"] = corners.float()
    is_kept |= item["crowd"]  # A crowd region still covers objects without annotation where it is visible.
    for name in ("labels", "corners", "difficult", "crowd", "area", "masks"):
        if name in item:
            item[name] = item[name][is_kept]
    return item


def lie_in(centers: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return whether points x, y, `(n, 2)`, lie in valid pixels, bool of shape `(height, width)`."""
    height, width = valid.shape
    columns, rows = centers.floor().long().unbind(1)
    # Points outside have no pixel, and are looked up at the border instead.
    nearest_columns = columns.clamp(0, width - 1)
    nearest_rows = rows.clamp(0, height - 1)
    is_inside = (columns == nearest_columns) & (rows == nearest_rows)
    return is_inside & valid[nearest_rows, nearest_columns]


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
        """Return the augmented sample.

        With a `rotation`, small objects and those with their center outside of the image are removed from all samples,
        also from those that are not rotated, see [`stays`]. If no object would be left, the sample is neither rotated
        nor filtered.
        """
        settings = self.settings
        flip_draw, rotation_draw, angle_draw, quarters_draw = torch.rand(4, generator=generator).tolist()
        sample = resized(sample, settings.image_size, settings.keep_ratio)

        # One draw selects at most one flip: [0, 1) is divided into horizontal, vertical, diagonal and no flip.
        horizontal_end = settings.horizontal_flip
        vertical_end = horizontal_end + settings.vertical_flip
        diagonal_end = vertical_end + settings.diagonal_flip
        if flip_draw < horizontal_end:
            sample = flipped(sample, horizontally=True, vertically=False)
        elif flip_draw < vertical_end:
            sample = flipped(sample, horizontally=False, vertically=True)
        elif flip_draw < diagonal_end:
            sample = flipped(sample, horizontally=True, vertically=True)

        if settings.rotation == 0:
            return sample
        if rotation_draw >= settings.rotation:
            rotated = sample.take(stays(sample))
        elif torch.isin(sample.labels, self.right_angle_classes).any():
            rotated = turned(sample, RIGHT_ANGLES[int(4 * quarters_draw)])
        else:
            rotated = turned(sample, 360 * angle_draw - 180)
        loses_all_objects = len(sample.labels) > 0 and len(rotated.labels) == 0
        return sample if loses_all_objects else rotated


def targets(sample: Sample, is_oriented: bool) -> dict[str, torch.Tensor]:
    """Return the labels of an image for a model.

    The labels are `class_labels`, and for oriented boxes `corners`, normalized by the image size. For other boxes they
    are `boxes` (center x, center y, width, height), clipped to the image and normalized, and `masks` if the sample has
    masks.
    """
    height, width = sample.size
    image_size = torch.tensor([width, height])
    labels = {"class_labels": sample.labels}
    if is_oriented:
        labels["corners"] = sample.corners / image_size
        return labels
    if len(sample.labels):
        boxes = enclosing_boxes(sample.corners)
    else:
        boxes = sample.corners.new_zeros(0, 4)
    points = boxes.unflatten(1, (2, 2))
    clipped_points = points.clamp(torch.zeros(2), image_size)
    low, high = clipped_points.unbind(1)
    centers = (low + high) / 2
    sides = high - low
    labels["boxes"] = torch.cat([centers, sides], 1) / image_size.repeat(2)
    if sample.masks is not None:
        labels["masks"] = sample.masks
    return labels
