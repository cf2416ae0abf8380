"""Boxes in pixels: intersection, area and overlap."""

Box = tuple[float, float, float, float]  # Left, top, right and bottom in pixels.


def clip(box: Box, area: Box) -> Box:
    """Return the intersection of a box and an area."""
    return (max(box[0], area[0]), max(box[1], area[1]), min(box[2], area[2]), min(box[3], area[3]))


def box_area(box: Box) -> float:
    """Return the area of a box; 0 if it is empty or inverted."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes; 0 if both are empty."""
    shared = box_area(clip(first, second))
    union = box_area(first) + box_area(second) - shared
    return float(shared / union) if union > 0 else 0.0
