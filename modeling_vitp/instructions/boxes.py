"""Boxes in texts: on a grid from 0 to 1000 across the image, both included."""

import math
import re

import numpy as np

from .from_annotations.annotations import Box, box_area, clip

GRID = 1000  # boxes in texts are integers from 0 to 1000, both included


def grid_box(box: Box, size: tuple[int, int]) -> list[int]:
    """A box on the grid of 0 to 1000: rounded, and outwards where rounding would leave no area."""
    corners = []
    for low, high, side in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        low, high = low * GRID / side, high * GRID / side
        ends = round(low), round(high)
        corners.append(ends if ends[0] < ends[1] else (min(math.floor(low), GRID - 1), max(math.ceil(high), 1)))
    (left, right), (top, bottom) = corners
    return [left, top, right, bottom]


def format_boxes(phrase: str, boxes: list[Box], size: tuple[int, int]) -> str:
    """InternVL's way of writing boxes: `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`."""
    return f"<ref>{phrase}</ref><box>{[grid_box(box, size) for box in boxes]}</box>"


def overlap(first: Box, second: Box) -> float:
    """Intersection over union."""
    shared = box_area(clip(first, second))
    return shared / (box_area(first) + box_area(second) - shared)


BOXES = re.compile(r"<box>(.*?)</box>", re.DOTALL)
BOX = re.compile(r"\[\s*([^\[\],]+?)\s*,\s*([^\[\],]+?)\s*,\s*([^\[\],]+?)\s*,\s*([^\[\],]+?)\s*\]")
NUMBERS = re.compile(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]")


def wrong_boxes(text: str) -> tuple[list[str], list[str]]:
    """What in a text is no box on the grid with an area: between `<box>` and `</box>`, and in other brackets."""
    wrong = []
    for inner in BOXES.findall(text):
        boxes = BOX.findall(inner)
        if not boxes:
            wrong.append(f"<box>{inner}</box> holds no box")
        wrong += [f"[{', '.join(box)}]" for box in boxes if not is_box(box)]
    rest = BOXES.sub("", text)
    return wrong, [f"[{', '.join(box)}]" for box in NUMBERS.findall(rest) if not is_box(box)]


def is_box(corners: tuple[str, ...]) -> bool:
    if not all(re.fullmatch(r"\d+", corner) for corner in corners):
        return False
    left, top, right, bottom = map(int, corners)
    return left < right <= GRID and top < bottom <= GRID


def parse_box(answer: str, size: int) -> np.ndarray | None:
    """The first box of an answer in pixels, or None."""
    match = re.search(r"\[\[?\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)", answer)
    return np.array([int(corner) for corner in match.groups()]) * size / GRID if match else None
