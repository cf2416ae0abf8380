"""Functions to write, read, check and compare boxes in pixels, and in texts on a grid from 0 to 1000."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..data.boxes import Box

GRID = 1000  # Corners in texts are integers from 0 to 1000, both included.
COVER_LETTERS = "abcdefghijklmnop"  # Of a fine map: the covered quarters of a cell, from none to all.

# A phrase, the end of its boxes, or four integers in brackets.
MARKS = re.compile(
    r"<ref>(?P<phrase>.*?)</ref>|(?P<end></box>)|\[\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\]",
    re.DOTALL,
)
# Four texts in brackets, where a box is expected.
MARKED = re.compile(r"<box>(.*?)</box>", re.DOTALL)
FOUR = re.compile(r"\[([^\[\],]+),([^\[\],]+),([^\[\],]+),([^\[\],]+)\]")
NUMBER, CORNER = re.compile(r"-?[\d.]+"), re.compile(r"\d{1,9}")


class GridBox(NamedTuple):
    """Box on the grid from 0 to 1000, with its phrase in the text, or an empty phrase."""

    left: int
    top: int
    right: int
    bottom: int
    phrase: str = ""

    def in_pixels(self, size: tuple[int, int]) -> Box:
        """Return the box in pixels of an image; `size` is its height and width."""
        height, width = size
        return tuple(corner * side / GRID for corner, side in zip(self[:4], (width, height, width, height)))


def grid_box(box: Box, size: tuple[int, int]) -> list[int]:
    """Return a box on the grid, rounded, or rounded outwards if it would have no area.

    Args:
        box: box in pixels.
        size: height and width of the image in pixels.
    """
    corners, (height, width) = [], size
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        low, high = low * GRID / side, high * GRID / side
        ends = round(low), round(high)
        corners.append(ends if ends[0] < ends[1] else (min(math.floor(low), GRID - 1), max(math.ceil(high), 1)))
    (left, right), (top, bottom) = corners
    return [left, top, right, bottom]


def write_boxes(boxes: Iterable[Box], size: tuple[int, int], phrase: str = "") -> str:
    """Return boxes in InternVL's format: `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`.

    Args:
        boxes: boxes in pixels.
        size: height and width of the image in pixels.
        phrase: phrase before the boxes; `<ref>` is omitted if it is empty.
    """
    written = f"<box>{[grid_box(box, size) for box in boxes]}</box>"
    return f"<ref>{phrase}</ref>{written}" if phrase else written


def read_boxes(text: str) -> tuple[list[GridBox], list[str]]:
    """Return the boxes in a text, in order, and the parts that look like a box but are invalid.

    Two formats are read: `[x1, y1, x2, y2]` and `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`. A phrase applies
    to all boxes up to the next `</box>` or `<ref>`. A box has integers from 0 to 1000, with left < right and
    top < bottom.
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
    """Return the invalid boxes of a text: those in `<box>`, and those in other brackets."""
    wrong = []
    for inner in MARKED.findall(text):
        found = fours_in(inner)
        if not found:
            wrong.append(f"<box>{inner}</box> contains no box")
        wrong += [f"[{', '.join(corners)}]" for corners in found if not is_box(corners)]
    loose = [corners for corners in fours_in(MARKED.sub("", text)) if all(map(NUMBER.fullmatch, corners))]
    return wrong, [f"[{', '.join(corners)}]" for corners in loose if not is_box(corners)]


def fours_in(text: str) -> list[list[str]]:
    return [[part.strip() for part in parts] for parts in FOUR.findall(text)]


def is_box(corners: Sequence[str]) -> bool:
    """Return whether four texts are a box: integers on the grid, with left < right and top < bottom."""
    if not all(map(CORNER.fullmatch, corners)):
        return False
    left, top, right, bottom = map(int, corners)
    return left < right <= GRID and top < bottom <= GRID
