"""Boxes: in pixels, and in texts on a grid from 0 to 1000 across the image; written, read, checked and compared."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
GRID = 1000  # corners in texts are integers from 0 to 1000, both included

# A phrase, the end of its boxes, or four integers in brackets.
MARKS = re.compile(
    r"<ref>(?P<phrase>.*?)</ref>|(?P<end></box>)|\[\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\]",
    re.DOTALL,
)
# Text in the place of a box: four of anything in brackets.
MARKED = re.compile(r"<box>(.*?)</box>", re.DOTALL)
FOUR = re.compile(r"\[([^\[\],]+),([^\[\],]+),([^\[\],]+),([^\[\],]+)\]")
NUMBER, CORNER = re.compile(r"-?[\d.]+"), re.compile(r"\d{1,9}")


class GridBox(NamedTuple):
    """A box on the grid."""

    left: int
    top: int
    right: int
    bottom: int
    phrase: str = ""
    """The phrase of the box in the text, if any."""

    def in_pixels(self, size: tuple[int, int]) -> Box:
        """Return the box in pixels of an image of that height and width."""
        height, width = size
        return tuple(corner * side / GRID for corner, side in zip(self[:4], (width, height, width, height)))


def grid_box(box: Box, size: tuple[int, int]) -> list[int]:
    """Return a box of an image of that height and width on the grid: rounded, or outwards if it would have no area."""
    corners, (height, width) = [], size
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        low, high = low * GRID / side, high * GRID / side
        ends = round(low), round(high)
        corners.append(ends if ends[0] < ends[1] else (min(math.floor(low), GRID - 1), max(math.ceil(high), 1)))
    (left, right), (top, bottom) = corners
    return [left, top, right, bottom]


def write_boxes(boxes: Iterable[Box], size: tuple[int, int], phrase: str = "") -> str:
    """Write boxes of an image of that height and width as InternVL does.

    `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`, without `<ref>` if the phrase is empty.
    """
    written = f"<box>{[grid_box(box, size) for box in boxes]}</box>"
    return f"<ref>{phrase}</ref>{written}" if phrase else written


def read_boxes(text: str) -> tuple[list[GridBox], list[str]]:
    """Return the boxes in a text, in its order, and the texts that look like a box but are not.

    Both ways of writing them are read, `[x1, y1, x2, y2]` and `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`. A
    phrase holds for all boxes up to the next `</box>` or `<ref>`. A box has integers from 0 to 1000, with left before
    right and top before bottom.
    """
    boxes, wrong, phrase = [], [], ""
    for match in MARKS.finditer(text):
        if match["phrase"] is not None:
            phrase = " ".join(match["phrase"].split())
        elif match["end"]:
            phrase = ""
        elif is_box(match.groups()[2:]):
            boxes.append(GridBox(*map(int, match.groups()[2:]), phrase))
        else:
            wrong.append(match[0])
    return boxes, wrong


def wrong_boxes(text: str) -> tuple[list[str], list[str]]:
    """Return what looks like a box but is none on the grid with an area: in `<box>`, and in other brackets."""
    wrong = []
    for inner in MARKED.findall(text):
        found = fours_in(inner)
        if not found:
            wrong.append(f"<box>{inner}</box> holds no box")
        wrong += [f"[{', '.join(corners)}]" for corners in found if not is_box(corners)]
    loose = [corners for corners in fours_in(MARKED.sub("", text)) if all(map(NUMBER.fullmatch, corners))]
    return wrong, [f"[{', '.join(corners)}]" for corners in loose if not is_box(corners)]


def fours_in(text: str) -> list[list[str]]:
    return [[part.strip() for part in parts] for parts in FOUR.findall(text)]


def is_box(corners: Sequence[str]) -> bool:
    """Return whether four texts are a box: integers on the grid, with left before right and top before bottom."""
    if not all(map(CORNER.fullmatch, corners)):
        return False
    left, top, right, bottom = map(int, corners)
    return left < right <= GRID and top < bottom <= GRID


def clip(box: Box, area: Box) -> Box:
    """Return the part of a box that lies in an area."""
    return (max(box[0], area[0]), max(box[1], area[1]), min(box[2], area[2]), min(box[3], area[3]))


def box_area(box: Box) -> float:
    """Return the area of a box; 0 for a box that is empty or inside out."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def iou(first: Box, second: Box) -> float:
    """Return the intersection over union; 0 if both boxes are empty."""
    shared = box_area(clip(first, second))
    union = box_area(first) + box_area(second) - shared
    return float(shared / union) if union > 0 else 0.0
