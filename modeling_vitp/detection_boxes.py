"""Box operations of the detectors: anchors, box deltas, and matching of boxes with objects.

Upright boxes are `(x1, y1, x2, y2)` in pixels, rotated ones as in `rotated_boxes`. Sizes are `(height, width)`.
"""

import math

import torch
import torchvision

from .rotated_boxes import corners, enclosing_boxes, half_turn, rectangles, standard_form, suppress_by_label

STRIDES = (4, 8, 16, 32, 64)
MAX_LOG_RATIO = abs(math.log(16 / 1000))
BACKGROUND, IGNORED = -1, -2  # labels of boxes without an object


def make_anchors(
    shapes: list[tuple[int, int]], scale: float, ratios: tuple[float, ...], device: torch.device
) -> list[torch.Tensor]:
    """Return the anchors of maps at strides 4 to 64, `(height * width * ratios, 4)` for each map, cell by cell.

    They are centered on the top left corner of each cell, not on its middle, and are not rounded. A ratio is
    height / width, the area is `(scale * stride)²`.
    """
    anchors = []
    for (height, width), stride in zip(shapes, STRIDES):
        roots = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
        halves = torch.stack([1 / roots, roots], -1) * (scale * stride / 2)
        ys, xs = torch.arange(height, device=device), torch.arange(width, device=device)
        centers = torch.cartesian_prod(ys, xs).flip(-1).float()[:, None] * stride
        anchors.append(torch.cat([centers - halves, centers + halves], -1).flatten(0, 1))
    return anchors


def trained_anchors(anchors: torch.Tensor, size: torch.Tensor, use_outside: bool) -> torch.Tensor:
    """Return the indices of the anchors `(n, 4)` that are used in training on an image of this size.

    These are the anchors within the image, or with `use_outside` all whose center is in the image as padded to a
    multiple of 32.
    """
    limits = size.flip(-1)
    if use_outside:
        trained = (centers_and_sides(anchors)[0] < limits + -limits % 32).all(-1)
    else:
        trained = (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2:] < limits).all(-1)
    return trained.nonzero()[:, 0]


class BoxCoder:
    """Encoder of upright boxes as deltas from upright boxes (R-CNN, arXiv 1311.2524, appendix C), divided by `stds`."""

    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __init__(self, stds: tuple[float, ...] | None = None):
        self.stds = tuple(stds or self.stds)

    @property
    def num_deltas(self) -> int:
        return len(self.stds)

    def encode(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the deltas `(n, num_deltas)` from boxes `(n, …)` to targets `(n, …)`."""
        return self.differences(boxes, targets) / boxes.new_tensor(self.stds)

    def decode(self, boxes: torch.Tensor, deltas: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Apply deltas to boxes, and clip the result to images of `sizes` `(…, 2)`. All arguments broadcast.

        A side changes at most by a factor of 62.5.
        """
        deltas = deltas * deltas.new_tensor(self.stds)
        logarithms = deltas[..., 2:4].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        moved = self.move(boxes, torch.cat([deltas[..., :2], logarithms, deltas[..., 4:]], -1))
        return self.hold(moved, sizes.to(moved.dtype).flip(-1))

    def differences(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        centers, sides = centers_and_sides(boxes)
        target_centers, target_sides = centers_and_sides(targets)
        return torch.cat([(target_centers - centers) / sides, (target_sides / sides).log()], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        centers, sides = centers_and_sides(boxes)
        centers, halves = centers + deltas[..., :2] * sides, sides * deltas[..., 2:4].exp() / 2
        return torch.cat([centers - halves, centers + halves], -1)

    def hold(self, boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """Clip boxes to images whose width and height are the `limits`."""
        return boxes.clamp(min=0).minimum(torch.cat([limits, limits], -1))


class RotatedBoxCoder(BoxCoder):
    """Encoder of rotated boxes as deltas from rotated boxes, in their frame (mmrotate's `DeltaXYWHAOBBoxCoder`).

    The difference of the angles is taken modulo π/2, and the sides of the target are exchanged if that makes it
    smaller. Only centers are clipped to the image.
    """

    stds = (0.1, 0.1, 0.2, 0.2, 0.1)

    def differences(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        offset, angle = targets[..., :2] - boxes[..., :2], boxes[..., 4:]
        cos, sin = angle.cos(), angle.sin()
        along = cos * offset[..., :1] + sin * offset[..., 1:]
        across = cos * offset[..., 1:] - sin * offset[..., :1]
        turn, other_turn = (half_turn(targets[..., 4:] - angle + shift) for shift in (0, math.pi / 2))
        straight = turn.abs() < other_turn.abs()
        sides = torch.where(straight, targets[..., 2:4], targets[..., 2:4].flip(-1))
        shift = torch.cat([along, across], -1) / boxes[..., 2:4]
        return torch.cat([shift, (sides / boxes[..., 2:4]).log(), torch.where(straight, turn, other_turn)], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        centers, sides, angle = boxes.split([2, 2, 1], -1)
        along, across = (deltas[..., :2] * sides).split(1, -1)
        cos, sin = angle.cos(), angle.sin()
        centers = centers + torch.cat([along * cos - across * sin, along * sin + across * cos], -1)
        return standard_form(torch.cat([centers, sides * deltas[..., 2:4].exp(), angle + deltas[..., 4:]], -1))

    def hold(self, boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        return torch.cat([boxes[..., :2].clamp(min=0).minimum(limits - 1), boxes[..., 2:]], -1)


class MidpointCoder(BoxCoder):
    """Encoder of rotated boxes as deltas from upright boxes (Oriented R-CNN, arXiv 2108.05699, section 3.1).

    Four deltas encode the enclosing box. The other two are the x of the topmost corner and the y of the rightmost
    corner, relative to the center, as shares of width and height. They describe a parallelogram, whose shorter diagonal
    is lengthened to make it a rectangle. Boxes are not clipped to the image.
    """

    stds = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5)
    same_place = 0.1  # pixels: of corners this near the extreme, the right or the lower one is taken

    def differences(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        points = corners(targets)
        around = enclosing_boxes(points)
        centers, sides = centers_and_sides(around)
        x, y = points.unbind(-1)
        top = x.masked_fill(y - around[..., 1:2] > self.same_place, -math.inf).amax(-1)
        right = y.masked_fill(around[..., 2:3] - x > self.same_place, -math.inf).amax(-1)
        shares = (torch.stack([top, right], -1) - centers) / sides
        return torch.cat([super().differences(boxes, around), shares], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        around = super().move(boxes, deltas)
        centers, sides = centers_and_sides(around)
        top, right = (deltas[..., 4:].clamp(-0.5, 0.5) * sides).unbind(-1)
        half_width, half_height = (sides / 2).unbind(-1)
        first, second = torch.stack([top, -half_height], -1), torch.stack([half_width, right], -1)
        lengths = torch.stack([first.norm(dim=-1), second.norm(dim=-1)], -1)
        stretch = lengths.amax(-1, keepdim=True) / lengths
        first, second = first * stretch[..., :1], second * stretch[..., 1:]
        points = torch.stack([first, second, -first, -second], -2)
        return rectangles(points + centers[..., None, :])

    def hold(self, boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        return boxes


def centers_and_sides(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def nms_by_label(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, labels: torch.Tensor) -> torch.Tensor:
    """Return the indices of the upright boxes after non-maximum suppression within each label, by descending score."""
    return suppress_by_label(torchvision.ops.nms, boxes, scores, iou_threshold, labels)


def match(overlaps: torch.Tensor, positive: float, negative: float, low_quality: float | None = None) -> torch.Tensor:
    """Match each box with an object.

    Args:
        overlaps: IoU of shape `(objects, boxes)`.
        positive: IoU from which a box is matched with its best object.
        negative: IoU below which a box is background.
        low_quality: an object whose best IoU is at least this value takes all boxes with that IoU, also from earlier
            objects. `None` switches this off.

    Returns:
        `(boxes,)`, int64: the index of an object, `BACKGROUND` or `IGNORED`.
    """
    if not len(overlaps):
        return overlaps.new_full(overlaps.shape[1:], BACKGROUND, dtype=torch.long)
    best, objects = overlaps.max(0)
    objects = objects.masked_fill(best < positive, IGNORED).masked_fill(best < negative, BACKGROUND)
    if low_quality is not None and overlaps.shape[1]:
        best_of_object = overlaps.amax(1, keepdim=True)
        takes = (overlaps == best_of_object) & (best_of_object >= low_quality)
        numbers = torch.arange(len(overlaps), device=overlaps.device)[:, None]
        taken = torch.where(takes, numbers, BACKGROUND).amax(0)
        objects = torch.where(taken >= 0, taken, objects)
    return objects


def sample(matched: torch.Tensor, number: int, positive_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample at most `number` boxes for training with torch's random state.

    Returns:
        Indices of boxes with an object, at most the given share, and indices of background boxes.
    """

    def draw(indices: torch.Tensor, number: int) -> torch.Tensor:
        if len(indices) <= number:
            return indices
        return indices[torch.randperm(len(indices), device=indices.device)[:number]]

    positives = draw((matched >= 0).nonzero()[:, 0], int(number * positive_share))
    return positives, draw((matched == BACKGROUND).nonzero()[:, 0], number - len(positives))


def of_class(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Select from values `(n, 1 or num_labels, …)` those of each row's class, `(n, …)`; any class for background."""
    return values[torch.arange(len(values), device=values.device), labels.clamp(max=values.shape[1] - 1)]
