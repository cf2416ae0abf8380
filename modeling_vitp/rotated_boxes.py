"""Operations on rotated boxes: corners, overlap, non-maximum suppression, and pooling of features inside them.

A box is `(cx, cy, width, height, angle)`, in pixels and radians, with y down and the angle from x towards y, which is
clockwise on the screen. In standard form width >= height and the angle is in [-π/2, π/2) ("le90"). All functions are
tensor operations in the dtype and on the device of their arguments; corners, overlaps and pooled features have
gradients.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

PAIRS_AT_ONCE = 1 << 18
ROIS_AT_ONCE = 256


def standard_form(boxes: torch.Tensor) -> torch.Tensor:
    """Return the same rectangles `(…, 5)` with width >= height and the angle in [-π/2, π/2)."""
    centers, width, height, angle = boxes.split([2, 1, 1, 1], -1)
    angle = half_turn(torch.where(width < height, angle + math.pi / 2, angle))
    return torch.cat([centers, torch.maximum(width, height), torch.minimum(width, height), angle], -1)


def half_turn(angle: torch.Tensor) -> torch.Tensor:
    """Return the angle in [-π/2, π/2) of the same direction."""
    return torch.remainder(angle + math.pi / 2, math.pi) - math.pi / 2


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Return the corners `(…, 4, 2)` of boxes `(…, 5)`, clockwise on the screen.

    They are `center + R(angle) (±width / 2, ±height / 2)` with R = [[cos, -sin], [sin, cos]]. The first one is the top
    left corner at angle 0.
    """
    centers, sides, angle = boxes.split([2, 2, 1], -1)
    along = torch.cat([angle.cos(), angle.sin()], -1) * sides[..., :1] / 2
    across = torch.cat([-angle.sin(), angle.cos()], -1) * sides[..., 1:] / 2
    offsets = torch.stack([-along - across, along - across, along + across, across - along], -2)
    return centers[..., None, :] + offsets


def enclosing_boxes(points: torch.Tensor) -> torch.Tensor:
    """Return upright boxes `(…, 4)`, x1, y1, x2, y2, around points `(…, n, 2)` such as corners of rotated boxes."""
    return torch.cat([points.amin(-2), points.amax(-2)], -1)


def rectangles(points: torch.Tensor) -> torch.Tensor:
    """Return the boxes `(…, 5)` in standard form with the given corners `(…, 4, 2)`, in order, at right angles."""
    first, second, third, fourth = points.unbind(-2)
    width, height = (second - first).norm(dim=-1), (third - second).norm(dim=-1)
    side = torch.where((width > height)[..., None], second - first, fourth - first)
    angle = half_turn(torch.atan2(side[..., 1], side[..., 0]))
    sides = torch.stack([torch.maximum(width, height), torch.minimum(width, height), angle], -1)
    return torch.cat([(first + third) / 2, sides], -1)


def smallest_rectangles(points: torch.Tensor) -> torch.Tensor:
    """Return the boxes `(…, 5)` of minimum area, in standard form, around points `(…, n, 2)`, for small n.

    One side of such a box lies on two of the points, so the directions of all pairs are compared.
    """
    pairs = torch.combinations(torch.arange(points.shape[-2], device=points.device))
    sides = points[..., pairs[:, 1], :] - points[..., pairs[:, 0], :]
    angles = torch.atan2(sides[..., 1], sides[..., 0])  # (…, pairs)
    cos, sin = angles.cos()[..., None], angles.sin()[..., None]
    middle = points.mean(-2, keepdim=True)
    x, y = (points - middle)[..., None, :, :].unbind(-1)  # (…, 1, n)
    turned = torch.stack([cos * x + sin * y, cos * y - sin * x], -1)  # (…, pairs, n, 2)
    low, high = turned.amin(-2), turned.amax(-2)
    best = (high - low).prod(-1).argmin(-1, keepdim=True)
    low, high = (bound.gather(-2, best[..., None].expand(*best.shape, 2))[..., 0, :] for bound in (low, high))
    cos, sin = (part[..., 0].gather(-1, best) for part in (cos, sin))
    x, y = ((low + high) / 2).split(1, -1)
    centers = middle[..., 0, :] + torch.cat([cos * x - sin * y, sin * x + cos * y], -1)
    return standard_form(torch.cat([centers, high - low, angles.gather(-1, best)], -1))


def intersections(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the intersection area of each pair of `boxes1` `(n, 5)` and `boxes2` `(n, 5)`, `(n,)`.

    In the frame of the first box, a rectangle around 0, the outline of the second box is clamped to the rectangle. This
    does not change its winding number around the points inside, so the area within the clamped outline, ∮ x dy, is the
    area of the intersection. Along an edge, y changes only between the two points where the edge crosses the lines
    y = ±height / 2, and x is piecewise linear there, with breaks where the edge crosses x = ±width / 2. Four points on
    each edge therefore give the exact integral, without sorting points or comparing with a tolerance.
    """
    offset = boxes2[:, :2] - boxes1[:, :2]
    cos, sin = boxes1[:, 4].cos(), boxes1[:, 4].sin()
    center = torch.stack([cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0]], -1)
    points = corners(torch.cat([center, boxes2[:, 2:4], boxes2[:, 4:] - boxes1[:, 4:]], -1))
    edges = points.roll(-1, -2) - points
    half = boxes1[:, None, 2:4] / 2

    def crossings(axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where along the edges, in [0, 1], a coordinate enters and leaves the rectangle, `(n, 4)` each."""
        start, run, bound = points[..., axis], edges[..., axis], half[..., axis]
        run = torch.where(run == 0, torch.ones_like(run), run)
        one, other = ((side - start) / run for side in (-bound, bound))
        return torch.minimum(one, other).clamp(0, 1), torch.maximum(one, other).clamp(0, 1)

    first, last = crossings(1)
    positions = [first, *(position.clamp(first, last) for position in crossings(0)), last]
    bound = half[..., 0]
    xs = [(points[..., 0] + position * edges[..., 0]).clamp(-bound, bound) for position in positions]
    integrals = sum((xs[i] + xs[i + 1]) * (positions[i + 1] - positions[i]) for i in range(3)) / 2
    return (integrals * edges[..., 1]).sum(-1).clamp(min=0)


def rotated_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Return the IoU of all pairs of `boxes1` `(n, 5)` and `boxes2` `(m, 5)`, `(n, m)`; 0 for empty boxes."""
    iou = boxes1.new_zeros(len(boxes1), len(boxes2))
    rows, columns = meeting_pairs(boxes1, boxes2)
    for part in range(0, len(rows), PAIRS_AT_ONCE):
        at = rows[part : part + PAIRS_AT_ONCE], columns[part : part + PAIRS_AT_ONCE]
        iou = iou.index_put(at, pair_iou(boxes1[at[0]], boxes2[at[1]]))
    return iou


def pair_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    shared = intersections(boxes1, boxes2)
    union = boxes1[:, 2:4].prod(-1) + boxes2[:, 2:4].prod(-1) - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, torch.ones_like(union)), 0 * shared)


def meeting_pairs(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of the pairs whose enclosing boxes overlap."""
    around1, around2 = (enclosing_boxes(corners(boxes.detach())) for boxes in (boxes1, boxes2))
    found = [torch.zeros(0, 2, dtype=torch.long, device=boxes1.device)]
    step = max(1, 16 * PAIRS_AT_ONCE // max(1, len(boxes2)))
    for start in range(0, len(boxes1), step):
        part = around1[start : start + step, None]
        meet = (part[..., :2] < around2[:, 2:]).all(-1) & (around2[:, :2] < part[..., 2:]).all(-1)
        found.append(meet.nonzero() + torch.tensor([start, 0], device=boxes1.device))
    return tuple(torch.cat(found).unbind(-1))


def rotated_nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, labels: torch.Tensor | None = None
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
    boxes = boxes.detach()[order]
    better, worse = meeting_pairs(boxes, boxes)
    better, worse = better[better < worse], worse[better < worse]
    parts = zip(better.split(PAIRS_AT_ONCE), worse.split(PAIRS_AT_ONCE))
    limit = iou_threshold + 100 * torch.finfo(boxes.dtype).eps  # boxes that do not touch have an IoU of some eps
    overlap = torch.cat([pair_iou(boxes[i], boxes[j]) > limit for i, j in parts])
    better, worse = better[overlap], worse[overlap]
    kept, before = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device), None
    while before is None or not torch.equal(kept, before):
        before = kept
        kept = torch.ones_like(before)
        kept[worse[before[better]]] = False
    return order[kept]


def suppress_by_label(
    nms: Callable, boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, labels: torch.Tensor
) -> torch.Tensor:
    """Return the indices of the boxes that `nms` keeps among those of the same label, by descending score."""
    kept = [torch.zeros(0, dtype=torch.long, device=boxes.device)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        kept.append(members[nms(boxes[members], scores[members], iou_threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


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
    pooled, order = [features.new_zeros(0, features.shape[1], output_size, output_size)], []
    for image in image_indices.unique().tolist():
        for indices in (image_indices == image).nonzero()[:, 0].split(ROIS_AT_ONCE):
            options = (output_size, spatial_scale, sampling_ratio)
            pooled.append(align_in_image(features[image : image + 1], boxes[indices], *options))
            order.append(indices)
    return torch.cat(pooled)[torch.cat(order).argsort()] if order else pooled[0]


def align_in_image(
    features: torch.Tensor, boxes: torch.Tensor, output_size: int, spatial_scale: float = 1.0, sampling_ratio: int = 2
) -> torch.Tensor:
    """Pool features inside rotated boxes of one image, `(1, channels, height, width)`, see [`roi_align_rotated`]."""
    side, (height, width) = output_size * sampling_ratio, features.shape[-2:]
    steps = (torch.arange(side, device=boxes.device, dtype=boxes.dtype) + 0.5) / side - 0.5
    center, sides, angle = boxes.split([2, 2, 1], -1)
    center, sides = (center * spatial_scale - 0.5)[..., None, None], sides * spatial_scale
    xs, ys = (steps * sides[:, :1])[:, None], (steps * sides[:, 1:])[..., None]  # (n, 1, side), (n, side, 1)
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    x, y = center[:, 0] + xs * cos - ys * sin, center[:, 1] + xs * sin + ys * cos
    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(0, 1)[None]
    samples = F.grid_sample(features, grid, padding_mode="border", align_corners=False)[0]
    samples = samples.unflatten(1, (-1, side)).transpose(0, 1) * inside[:, None]  # (n, channels, side, side)
    return F.avg_pool2d(samples, sampling_ratio)
