"""Boxes in pixels: intersection, area and overlap."""

Box = tuple[float, float, float, float]  # Left, top, right and bottom in pixels.


def clip(box: Box, area: Box) -> Box:
    """Return the intersection of a box and an area."""
    left, top, right, bottom = box
    area_left, area_top, area_right, area_bottom = area
    return (
        max(left, area_left),
        max(top, area_top),
        min(right, area_right),
        min(bottom, area_bottom),
    )


def box_area(box: Box) -> float:
    """Return the area of a box; 0 if it is empty or inverted."""
    left, top, right, bottom = box
    return max(right - left, 0) * max(bottom - top, 0)


def iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes; 0 if both are empty."""
    shared = box_area(clip(first, second))
    union = box_area(first) + box_area(second) - shared
    return float(shared / union) if union > 0 else 0.0
