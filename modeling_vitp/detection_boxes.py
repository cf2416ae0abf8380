"""Box operations of the detectors: anchors, box deltas, and matching of boxes with objects.

Upright boxes are `(x1, y1, x2, y2)` in pixels, rotated ones as in `rotated_boxes`. Sizes are `(height, width)`.
"""

import math

import torch
import torchvision

from .rotated_boxes import (
    corners,
    enclosing_boxes,
    half_turn,
    into_frame,
    out_of_frame,
    rectangles,
    standard_form,
    suppress_by_label,
)

STRIDES = (4, 8, 16, 32, 64)
MAX_LOG_RATIO = abs(math.log(16 / 1000))
# Labels of boxes without an object.
BACKGROUND = -1
IGNORED = -2


def make_anchors(
    shapes: list[tuple[int, int]],
    scale: float,
    ratios: tuple[float, ...],
    device: torch.device,
) -> list[torch.Tensor]:
    """Return the anchors of maps at strides 4 to 64, `(height * width * ratios, 4)` for each map, cell by cell.

    They are centered on the top left corner of each cell, not on its middle, and are not rounded. A ratio is
    height / width, the area is `(scale * stride)²`.
    """
    root_ratios = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
    sides_of_area_1 = torch.stack([1 / root_ratios, root_ratios], -1)
    anchors = []
    for (height, width), stride in zip(shapes, STRIDES):
        half_sides = sides_of_area_1 * (scale * stride / 2)
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        cells = torch.cartesian_prod(rows, columns).flip(-1).float()
        centers = cells[:, None] * stride
        boxes = torch.cat([centers - half_sides, centers + half_sides], -1)
        anchors.append(boxes.flatten(0, 1))
    return anchors


def trained_anchors(
    anchors: torch.Tensor,
    size: torch.Tensor,
    use_outside: bool,
) -> torch.Tensor:
    """Return the indices of the anchors `(n, 4)` that are used in training on an image of this size.

    These are the anchors within the image, or with `use_outside` all whose center is in the image as padded to a
    multiple of 32.
    """
    image_sides = size.flip(-1)
    if use_outside:
        centers, _ = centers_and_sides(anchors)
        padded_sides = image_sides + -image_sides % 32
        is_trained = (centers < padded_sides).all(-1)
    else:
        begins_inside = (anchors[:, :2] >= 0).all(-1)
        ends_inside = (anchors[:, 2:] < image_sides).all(-1)
        is_trained = begins_inside & ends_inside
    return is_trained.nonzero()[:, 0]


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

    def decode(
        self,
        boxes: torch.Tensor,
        deltas: torch.Tensor,
        sizes: torch.Tensor,
    ) -> torch.Tensor:
        """Apply deltas to boxes, and clip the result to images of `sizes` `(…, 2)`. All arguments broadcast.

        A side changes at most by a factor of 62.5.
        """
        shifts, logarithms, further = (deltas * deltas.new_tensor(self.stds)).tensor_split([2, 4], -1)
        logarithms = logarithms.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        moved = self.move(boxes, torch.cat([shifts, logarithms, further], -1))
        image_sides = sizes.to(moved.dtype).flip(-1)
        return self.hold(moved, image_sides)

    def differences(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        centers, sides = centers_and_sides(boxes)
        target_centers, target_sides = centers_and_sides(targets)
        shifts = (target_centers - centers) / sides
        logarithms = (target_sides / sides).log()
        return torch.cat([shifts, logarithms], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        centers, sides = centers_and_sides(boxes)
        shifts = deltas[..., :2]
        logarithms = deltas[..., 2:4]
        moved_centers = centers + shifts * sides
        half_sides = sides * logarithms.exp() / 2
        return torch.cat([moved_centers - half_sides, moved_centers + half_sides], -1)

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
        centers, sides, angle = boxes.split([2, 2, 1], -1)
        target_centers, target_sides, target_angle = targets.split([2, 2, 1], -1)
        offset_x, offset_y = (target_centers - centers).split(1, -1)
        offset = torch.cat(into_frame(offset_x, offset_y, angle.cos(), angle.sin()), -1)

        turn = half_turn(target_angle - angle)
        turn_of_exchanged = half_turn(target_angle - angle + math.pi / 2)
        keeps_sides = turn.abs() < turn_of_exchanged.abs()
        target_sides = torch.where(keeps_sides, target_sides, target_sides.flip(-1))
        smaller_turn = torch.where(keeps_sides, turn, turn_of_exchanged)
        logarithms = (target_sides / sides).log()
        return torch.cat([offset / sides, logarithms, smaller_turn], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        centers, sides, angle = boxes.split([2, 2, 1], -1)
        shifts, logarithms, turn = deltas.split([2, 2, 1], -1)
        along, across = (shifts * sides).split(1, -1)
        offset = torch.cat(out_of_frame(along, across, angle.cos(), angle.sin()), -1)
        moved_sides = sides * logarithms.exp()
        return standard_form(torch.cat([centers + offset, moved_sides, angle + turn], -1))

    def hold(self, boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        centers, sides_and_angle = boxes.split([2, 3], -1)
        centers = centers.clamp(min=0).minimum(limits - 1)
        return torch.cat([centers, sides_and_angle], -1)


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
        x, y = points.unbind(-1)
        around = enclosing_boxes(points)
        top_y = around[..., 1:2]
        right_x = around[..., 2:3]
        is_below_top = y - top_y > self.same_place
        is_left_of_right = right_x - x > self.same_place
        topmost_x = x.masked_fill(is_below_top, -math.inf).amax(-1)
        rightmost_y = y.masked_fill(is_left_of_right, -math.inf).amax(-1)

        centers, sides = centers_and_sides(around)
        midpoints = torch.stack([topmost_x, rightmost_y], -1)
        shares = (midpoints - centers) / sides
        deltas_around = super().differences(boxes, around)
        return torch.cat([deltas_around, shares], -1)

    def move(self, boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        around = super().move(boxes, deltas)
        centers, sides = centers_and_sides(around)
        shares = deltas[..., 4:].clamp(-0.5, 0.5)
        topmost_x, rightmost_y = (shares * sides).unbind(-1)
        half_width, half_height = (sides / 2).unbind(-1)
        # The half diagonals of the parallelogram, relative to its center.
        to_topmost = torch.stack([topmost_x, -half_height], -1)
        to_rightmost = torch.stack([half_width, rightmost_y], -1)
        lengths = torch.stack([to_topmost.norm(dim=-1), to_rightmost.norm(dim=-1)], -1)
        stretch_topmost, stretch_rightmost = (lengths.amax(-1, keepdim=True) / lengths).split(1, -1)
        first = to_topmost * stretch_topmost
        second = to_rightmost * stretch_rightmost
        offsets = torch.stack([first, second, -first, -second], -2)
        return rectangles(offsets + centers[..., None, :])

    def hold(self, boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        return boxes


def centers_and_sides(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = boxes[..., :2]
    high = boxes[..., 2:]
    return (low + high) / 2, high - low


def nms_by_label(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the indices of the upright boxes after non-maximum suppression within each label, by descending score."""
    return suppress_by_label(torchvision.ops.nms, boxes, scores, iou_threshold, labels)


def match(
    overlaps: torch.Tensor,
    positive: float,
    negative: float,
    low_quality: float | None = None,
) -> torch.Tensor:
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
    num_objects, num_boxes = overlaps.shape
    if num_objects == 0:
        return overlaps.new_full((num_boxes,), BACKGROUND, dtype=torch.long)
    best_of_box, objects = overlaps.max(0)
    objects = objects.masked_fill(best_of_box < positive, IGNORED)
    objects = objects.masked_fill(best_of_box < negative, BACKGROUND)
    if low_quality is None or num_boxes == 0:
        return objects
    best_of_object = overlaps.amax(1, keepdim=True)
    is_taken = (overlaps == best_of_object) & (best_of_object >= low_quality)
    indices = torch.arange(num_objects, device=overlaps.device)[:, None]
    last_taker = torch.where(is_taken, indices, BACKGROUND).amax(0)
    return torch.where(last_taker >= 0, last_taker, objects)


def sample(
    matched: torch.Tensor,
    number: int,
    positive_share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample at most `number` boxes for training with torch's random state.

    Returns:
        Indices of boxes with an object, at most the given share, and indices of background boxes.
    """
    with_object = (matched >= 0).nonzero()[:, 0]
    positives = draw(with_object, int(number * positive_share))
    without_object = (matched == BACKGROUND).nonzero()[:, 0]
    negatives = draw(without_object, number - len(positives))
    return positives, negatives


def draw(indices: torch.Tensor, number: int) -> torch.Tensor:
    """Return at most `number` of the indices, at random if there are more."""
    if len(indices) <= number:
        return indices
    order = torch.randperm(len(indices), device=indices.device)
    return indices[order[:number]]


def of_class(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Select from values `(n, 1 or num_labels, …)` those of each row's class, `(n, …)`; any class for background."""
    rows = torch.arange(len(values), device=values.device)
    last_class = values.shape[1] - 1
    return values[rows, labels.clamp(max=last_class)]
