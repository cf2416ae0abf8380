"""Joint augmentation of images, masks and boxes, of which the corners are moved.

A flip, a rotation and a resize move corners exactly, where a centre, sides and an angle would have to be fitted anew.
Pixels are torchvision's work. Its rotated boxes are not used, since it makes a stretched one a rectangle again, nor its
keypoints, which are mirrored about the middle of a pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..rotated_boxes import enclosing_boxes, smallest_rectangles

MIN_TURNED_SIDE = 5.0  # pixels; what has a shorter side after a rotation is left out, as in the authors' release


@dataclass
class Sample:
    """An image with its objects, to be moved together.

    Args:
        image: see [`~modeling_vitp.images.pixels.to_pixels`].
        corners: float32 of shape `(n, 4, 2)`, in pixels.
        labels: int64 of shape `(n,)`.
        masks: uint8 of shape `(n, height, width)`, if there are any.
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
    """In a square of `size` pixels a side: as large as it fits in, or stretched to fill it."""
    old, new = sample.size, resized_size(sample.size, size, keep_ratio)
    return Sample(
        F.resize_image(sample.image, list(new), antialias=True),
        sample.corners * torch.tensor([new[1] / old[1], new[0] / old[0]]),
        sample.labels,
        # Not torchvision's resize of masks, which moves them by up to a pixel.
        None if sample.masks is None else F.resize_image(sample.masks, list(new), InterpolationMode.NEAREST_EXACT),
    )


def resized_size(image_size: tuple[int, int], size: int, keep_ratio: bool) -> tuple[int, int]:
    """Height and width that [`resized`] gives an image of this height and width."""
    if not keep_ratio:
        return size, size
    scale = size / max(image_size)
    return tuple(max(1, int(side * scale + 0.5)) for side in image_size)


def flipped(sample: Sample, horizontally: bool, vertically: bool) -> Sample:
    """Mirrored, in continuous coordinates: what is at x is at the width minus x then."""
    axes = [axis for axis, flips in ((-1, horizontally), (-2, vertically)) if flips]
    height, width = sample.size
    flips = torch.tensor([horizontally, vertically])
    corners = torch.where(flips, torch.tensor([width, height]) - sample.corners, sample.corners)
    masks = None if sample.masks is None else sample.masks.flip(axes)
    return Sample(sample.image.flip(axes), corners, sample.labels, masks)


def turned(sample: Sample, angle: float) -> Sample:
    """Rotated about its centre by an angle in degrees, anticlockwise as it is seen, black where it was not.

    Left out is an object whose centre leaves the image, or with a side of no more than 5 pixels.
    """
    height, width = sample.size
    centre = torch.tensor([width / 2, height / 2])
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = Sample(
        F.rotate_image(sample.image, angle, InterpolationMode.BILINEAR),
        (sample.corners - centre) @ torch.tensor([[cos, -sin], [sin, cos]]) + centre,
        sample.labels,
        None if sample.masks is None else F.rotate_image(sample.masks, angle, InterpolationMode.NEAREST),
    )
    return turned.take(stays(turned))


def stays(sample: Sample) -> torch.Tensor:
    """Which objects have their centre in the image and sides that are not tiny, bool of shape `(n,)`."""
    if not len(sample.corners):
        return torch.zeros(0, dtype=torch.bool)
    boxes = smallest_rectangles(sample.corners)
    height, width = sample.size
    centres = (boxes[:, :2] > 0) & (boxes[:, :2] < torch.tensor([width, height]))
    return centres.all(1) & (boxes[:, 3] > MIN_TURNED_SIDE)


class Augmentation:
    """Resize, flips and rotation.

    Args:
        size, keep_ratio: see [`resized`].
        flips: chances of a horizontal flip, a vertical one, and both; at most one of the three happens.
        rotation: chance of a rotation, by an angle drawn uniformly from all.
        right_angle_classes: indices of classes with which an image is turned by a multiple of 90 degrees only.
    """

    def __init__(
        self,
        size: int,
        keep_ratio: bool = True,
        flips: tuple[float, float, float] = (0.5, 0.0, 0.0),
        rotation: float = 0.0,
        right_angle_classes: Sequence[int] = (),
    ):
        self.size, self.keep_ratio, self.flips, self.rotation = size, keep_ratio, flips, rotation
        self.right_angle_classes = torch.tensor(list(right_angle_classes), dtype=torch.int64)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Random by `generator` alone. A rotation after which no object would be left does not happen."""
        draw, turns, angle, quarters = torch.rand(4, generator=generator).tolist()
        sample = resized(sample, self.size, self.keep_ratio)
        horizontal, vertical, both = self.flips
        if draw < horizontal + vertical + both:
            is_vertical = draw >= horizontal
            sample = flipped(sample, not horizontal <= draw < horizontal + vertical, is_vertical)
        if turns < self.rotation:
            is_right = torch.isin(sample.labels, self.right_angle_classes).any()
            angle = 90.0 * int(4 * quarters) if is_right else 360 * angle - 180
            found = turned(sample, angle)
            sample = found if len(found.labels) or not len(sample.labels) else sample
        return sample


def targets(sample: Sample, is_oriented: bool) -> dict[str, torch.Tensor]:
    """What a model takes as the labels of an image: `class_labels`, and normalised to the image `corners`, or `boxes`
    with centre x, centre y, width and height of what of them is in the image; `masks` if there are any.
    """
    height, width = sample.size
    found = {"class_labels": sample.labels}
    if is_oriented:
        return found | {"corners": sample.corners / torch.tensor([width, height])}
    boxes = enclosing_boxes(sample.corners) if len(sample.labels) else sample.corners.new_zeros(0, 4)
    low, high = boxes.unflatten(1, (2, 2)).clamp(torch.zeros(2), torch.tensor([width, height])).unbind(1)
    boxes = torch.cat([(low + high) / 2, high - low], 1) / torch.tensor([width, height, width, height])
    return found | {"boxes": boxes} | ({} if sample.masks is None else {"masks": sample.masks})
