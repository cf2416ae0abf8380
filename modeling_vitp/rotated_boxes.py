"""Operations on rotated boxes: corners, overlap, non-maximum suppression, and pooling of features inside them.

A box is `(cx, cy, width, height, angle)`, in pixels and radians, with y down and the angle from x towards y, which is
clockwise on the screen. In standard form width >= height and the angle is in [-π/2, π/2) ("le90"). All functions are
tensor operations in the dtype and on the device of their arguments; corners, overlaps and pooled features have
gradients.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch.nn import functional as F

PAIRS_AT_ONCE = 1 << 18
ROIS_AT_ONCE = 256


def standard_form(boxes: torch.Tensor) -> torch.Tensor:
    """Return the same rectangles `(…, 5)` with width >= height and the angle in [-π/2, π/2)."""
    centers, width, height, angle = boxes.split([2, 1, 1, 1], -1)
    angle_of_longer = torch.where(width < height, angle + math.pi / 2, angle)
    longer = torch.maximum(width, height)
    shorter = torch.minimum(width, height)
    return torch.cat([centers, longer, shorter, half_turn(angle_of_longer)], -1)


def half_turn(angle: torch.Tensor) -> torch.Tensor:
    """Return the angle in [-π/2, π/2) of the same direction."""
    return torch.remainder(angle + math.pi / 2, math.pi) - math.pi / 2


def into_frame(
    x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coordinates of x and y along and across axes that are turned by an angle."""
    along = cos * x + sin * y
    across = cos * y - sin * x
    return along, across


def out_of_frame(
    along: torch.Tensor, across: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y of coordinates along and across axes that are turned by an angle."""
    x = cos * along - sin * across
    y = sin * along + cos * across
    return x, y


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Return the corners `(…, 4, 2)` of boxes `(…, 5)`, clockwise on the screen.

    They are `center + R(angle) (±width / 2, ±height / 2)` with R = [[cos, -sin], [sin, cos]]. The first one is the top
    left corner at angle 0.
    """
    centers, width, height, angle = boxes.split([2, 1, 1, 1], -1)
    cos = angle.cos()
    sin = angle.sin()
    along = torch.cat([cos, sin], -1) * width / 2
    across = torch.cat([-sin, cos], -1) * height / 2
    top_left = -along - across
    top_right = along - across
    bottom_right = along + across
    bottom_left = across - along
    offsets = torch.stack([top_left, top_right, bottom_right, bottom_left], -2)
    return centers[..., None, :] + offsets


def enclosing_boxes(points: torch.Tensor) -> torch.Tensor:
    """Return upright boxes `(…, 4)`, x1, y1, x2, y2, around points `(…, n, 2)` such as corners of rotated boxes."""
    return torch.cat([points.amin(-2), points.amax(-2)], -1)


def rectangles(points: torch.Tensor) -> torch.Tensor:
    """Return the boxes `(…, 5)` in standard form with the given corners `(…, 4, 2)`, in order, at right angles."""
    first, second, third, fourth = points.unbind(-2)
    width = (second - first).norm(dim=-1)
    height = (third - second).norm(dim=-1)
    is_wide = (width > height)[..., None]
    longer_x, longer_y = torch.where(is_wide, second - first, fourth - first).unbind(-1)
    angle = half_turn(torch.atan2(longer_y, longer_x))
    longer = torch.maximum(width, height)
    shorter = torch.minimum(width, height)
    center = (first + third) / 2
    sides_and_angle = torch.stack([longer, shorter, angle], -1)
    return torch.cat([center, sides_and_angle], -1)


def smallest_rectangles(points: torch.Tensor) -> torch.Tensor:
    """Return the boxes `(…, 5)` of minimum area, in standard form, around points `(…, n, 2)`, for small n.

    One side of such a box lies on two of the points, so the directions of all pairs are compared.
    """
    indices = torch.arange(points.shape[-2], device=points.device)
    first, second = torch.combinations(indices).unbind(-1)
    directions = points[..., second, :] - points[..., first, :]
    angles = torch.atan2(directions[..., 1], directions[..., 0])  # (…, pairs)
    cos = angles.cos()[..., None]
    sin = angles.sin()[..., None]

    middle = points.mean(-2, keepdim=True)
    x, y = (points - middle)[..., None, :, :].unbind(-1)  # (…, 1, n)
    turned = torch.stack(into_frame(x, y, cos, sin), -1)  # (…, pairs, n, 2)
    low = turned.amin(-2)
    high = turned.amax(-2)
    areas = (high - low).prod(-1)
    smallest = areas.argmin(-1, keepdim=True)

    smallest_xy = smallest[..., None].expand(*smallest.shape, 2)
    low = low.gather(-2, smallest_xy).squeeze(-2)
    high = high.gather(-2, smallest_xy).squeeze(-2)
    angle = angles.gather(-1, smallest)
    along, across = ((low + high) / 2).split(1, -1)
    cos = cos.squeeze(-1).gather(-1, smallest)
    sin = sin.squeeze(-1).gather(-1, smallest)
    offset = torch.cat(out_of_frame(along, across, cos, sin), -1)
    centers = middle.squeeze(-2) + offset
    return standard_form(torch.cat([centers, high - low, angle], -1))


def intersections(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the intersection area of each pair of `boxes1` `(n, 5)` and `boxes2` `(n, 5)`, `(n,)`.

    In the frame of the first box, a rectangle around 0, the outline of the second box is clamped to the rectangle. This
    does not change its winding number around the points inside, so the area within the clamped outline, ∮ x dy, is the
    area of the intersection. Along an edge, y changes only between the two points where the edge crosses the lines
    y = ±height / 2, and x is piecewise linear there, with breaks where the edge crosses x = ±width / 2. Four points on
    each edge therefore give the exact integral, without sorting points or comparing with a tolerance.
    """
    centers1, sides1, angles1 = boxes1.split([2, 2, 1], -1)
    centers2, sides2, angles2 = boxes2.split([2, 2, 1], -1)
    offset_x, offset_y = (centers2 - centers1).split(1, -1)
    center = torch.cat(into_frame(offset_x, offset_y, angles1.cos(), angles1.sin()), -1)
    points = corners(torch.cat([center, sides2, angles2 - angles1], -1))
    edges = points.roll(-1, -2) - points
    start_x, start_y = points.unbind(-1)  # (n, 4)
    run_x, run_y = edges.unbind(-1)
    half_width, half_height = (sides1 / 2).split(1, -1)  # (n, 1)

    # Four positions on each edge, in [0, 1]: between where it enters and leaves the rectangle in y, those in x.
    enter_y, leave_y = crossings(start_y, run_y, half_height)
    enter_x, leave_x = crossings(start_x, run_x, half_width)
    positions = [enter_y, enter_x.clamp(enter_y, leave_y), leave_x.clamp(enter_y, leave_y), leave_y]
    integral = 0
    for position, next_position in pairwise(positions):
        x = (start_x + position * run_x).clamp(-half_width, half_width)
        next_x = (start_x + next_position * run_x).clamp(-half_width, half_width)
        integral = integral + (x + next_x) * (next_position - position)
    areas = integral / 2 * run_y
    return areas.sum(-1).clamp(min=0)


def crossings(
    start: torch.Tensor,
    run: torch.Tensor,
    half_side: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where along edges, in [0, 1], a coordinate enters and leaves the range ±`half_side`, `(n, 4)` each."""
    divisor = torch.where(run == 0, torch.ones_like(run), run)
    at_low = (-half_side - start) / divisor
    at_high = (half_side - start) / divisor
    enters = torch.minimum(at_low, at_high).clamp(0, 1)
    leaves = torch.maximum(at_low, at_high).clamp(0, 1)
    return enters, leaves


def rotated_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the IoU of all pairs of `boxes1` `(n, 5)` and `boxes2` `(m, 5)`, `(n, m)`; 0 for empty boxes."""
    iou = boxes1.new_zeros(len(boxes1), len(boxes2))
    rows, columns = meeting_pairs(boxes1, boxes2)
    for some_rows, some_columns in zip(rows.split(PAIRS_AT_ONCE), columns.split(PAIRS_AT_ONCE)):
        pair_ious = pair_iou(boxes1[some_rows], boxes2[some_columns])
        iou = iou.index_put((some_rows, some_columns), pair_ious)
    return iou


def pair_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    shared = intersections(boxes1, boxes2)
    area1 = boxes1[:, 2:4].prod(-1)
    area2 = boxes2[:, 2:4].prod(-1)
    union = area1 + area2 - shared
    # The divisor is never 0, because the gradient of an unused NaN would be NaN too.
    divisor = torch.where(union > 0, union, torch.ones_like(union))
    return torch.where(union > 0, shared / divisor, 0 * shared)


def meeting_pairs(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of the pairs whose enclosing boxes overlap."""
    low1, high1 = enclosing_boxes(corners(boxes1.detach())).split(2, -1)
    low2, high2 = enclosing_boxes(corners(boxes2.detach())).split(2, -1)
    pairs = [torch.zeros(0, 2, dtype=torch.long, device=boxes1.device)]
    step = max(1, 16 * PAIRS_AT_ONCE // max(1, len(boxes2)))
    for start in range(0, len(boxes1), step):
        some_low1 = low1[start : start + step, None]
        some_high1 = high1[start : start + step, None]
        begins_before_end = (some_low1 < high2).all(-1)
        ends_after_begin = (low2 < some_high1).all(-1)
        some_pairs = (begins_before_end & ends_after_begin).nonzero()
        pairs.append(some_pairs + torch.tensor([start, 0], device=boxes1.device))
    rows, columns = torch.cat(pairs).unbind(-1)
    return rows, columns


def rotated_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the boxes that no better kept box overlaps by more than a threshold.

    The greedy result is the only fixed point of this rule, so the rule is applied to all boxes at once until the
    result is stable.

    Args:
        boxes: `(n, 5)`.
        scores: `(n,)`; of equal scores the first is better.
        iou_threshold: maximum IoU of two kept boxes.
        labels: `(n,)` integers; boxes of different labels do not suppress one another.

    Returns:
        Indices `(kept,)`, int64, by descending score.
    """
    if labels is not None:
        return suppress_by_label(rotated_nms, boxes, scores, iou_threshold, labels)
    order = scores.argsort(descending=True, stable=True)
    better, worse = overlapping_pairs(boxes.detach()[order], iou_threshold)
    is_kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        stays_kept = torch.ones_like(is_kept)
        is_suppressing = is_kept[better]
        stays_kept[worse[is_suppressing]] = False
        if torch.equal(stays_kept, is_kept):
            return order[is_kept]
        is_kept = stays_kept


def overlapping_pairs(boxes: torch.Tensor, iou_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the pairs of boxes whose IoU exceeds a threshold, in each pair the smaller index first."""
    rows, columns = meeting_pairs(boxes, boxes)
    is_ordered = rows < columns
    first = rows[is_ordered]
    second = columns[is_ordered]
    limit = iou_threshold + 100 * torch.finfo(boxes.dtype).eps  # boxes that do not touch have an IoU of some eps
    exceeds = []
    for some_first, some_second in zip(first.split(PAIRS_AT_ONCE), second.split(PAIRS_AT_ONCE)):
        exceeds.append(pair_iou(boxes[some_first], boxes[some_second]) > limit)
    exceeds = torch.cat(exceeds)
    return first[exceeds], second[exceeds]


def suppress_by_label(
    nms: Callable,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the indices of the boxes that `nms` keeps among those of the same label, by descending score."""
    kept_indices = [torch.zeros(0, dtype=torch.long, device=boxes.device)]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        kept_members = nms(boxes[members], scores[members], iou_threshold)
        kept_indices.append(members[kept_members])
    # In ascending order first, because of equal scores the first is better.
    indices = torch.cat(kept_indices).sort().values
    order = scores[indices].argsort(descending=True, stable=True)
    return indices[order]


def roi_align_rotated(
    features: torch.Tensor,
    boxes: torch.Tensor,
    image_indices: torch.Tensor,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
) -> torch.Tensor:
    """Pool features inside rotated boxes: RoIAlign (arXiv 1703.06870) with rotation and `aligned=True`.

    At angle 0 the result equals that of [`torchvision.ops.roi_align`]: each cell is the mean of `sampling_ratio²`
    bilinear samples. A sample more than a pixel outside the map is 0; a nearer one outside has the value at the border.

    Args:
        features: `(images, channels, height, width)`.
        boxes: `(n, 5)`, in pixels of the image.
        image_indices: `(n,)`, int64: image of each box.
        output_size: cells in each direction.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: samples of a cell in each direction.

    Returns:
        `(n, channels, output_size, output_size)`.
    """
    pooled = [features.new_zeros(0, features.shape[1], output_size, output_size)]
    order = []
    for image in image_indices.unique().tolist():
        indices_in_image = (image_indices == image).nonzero().flatten()
        for indices in indices_in_image.split(ROIS_AT_ONCE):
            pooled_in_image = align_in_image(
                features[image : image + 1],
                boxes[indices],
                output_size,
                spatial_scale,
                sampling_ratio,
            )
            pooled.append(pooled_in_image)
            order.append(indices)
    if not order:
        return pooled[0]
    return torch.cat(pooled)[torch.cat(order).argsort()]


def align_in_image(
    features: torch.Tensor,
    boxes: torch.Tensor,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
) -> torch.Tensor:
    """Pool features inside rotated boxes of one image, `(1, channels, height, width)`, see [`roi_align_rotated`]."""
    height, width = features.shape[-2:]
    side = output_size * sampling_ratio  # samples of a box in each direction
    steps = (torch.arange(side, device=boxes.device, dtype=boxes.dtype) + 0.5) / side - 0.5
    center, sides, angle = boxes.split([2, 2, 1], -1)
    center_x, center_y = (center * spatial_scale - 0.5)[..., None].split(1, 1)  # (n, 1, 1)
    box_width, box_height = (sides * spatial_scale).split(1, -1)
    along = (steps * box_width)[:, None]  # (n, 1, side)
    across = (steps * box_height)[..., None]  # (n, side, 1)
    cos = angle.cos()[..., None]
    sin = angle.sin()[..., None]
    x = center_x + along * cos - across * sin  # (n, side, side)
    y = center_y + along * sin + across * cos

    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    grid_x = (2 * x + 1) / width - 1
    grid_y = (2 * y + 1) / height - 1
    # All boxes are one tall grid, because grid_sample takes one grid for each image.
    grid = torch.stack([grid_x, grid_y], -1).flatten(0, 1)[None]
    samples = F.grid_sample(features, grid, padding_mode="border", align_corners=False)[0]
    samples_of_box = samples.unflatten(1, (-1, side)).transpose(0, 1)  # (n, channels, side, side)
    return F.avg_pool2d(samples_of_box * inside[:, None], sampling_ratio)
