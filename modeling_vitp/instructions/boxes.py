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
NUMBER = re.compile(r"-?[\d.]+")
CORNER = re.compile(r"\d{1,9}")


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
        return (
            self.left * width / GRID,
            self.top * height / GRID,
            self.right * width / GRID,
            self.bottom * height / GRID,
        )


def grid_box(box: Box, size: tuple[int, int]) -> list[int]:
    """Return a box on the grid, rounded, or rounded outwards if it would have no area.

    Args:
        box: box in pixels.
        size: height and width of the image in pixels.
    """
    height, width = size
    left, right = grid_range(box[0], box[2], width)
    top, bottom = grid_range(box[1], box[3], height)
    return [left, top, right, bottom]


def grid_range(low: float, high: float, side: int) -> tuple[int, int]:
    """Return the two ends of a box along a side of the image, on the grid."""
    low = low * GRID / side
    high = high * GRID / side
    if round(low) < round(high):
        return round(low), round(high)
    return min(math.floor(low), GRID - 1), max(math.ceil(high), 1)


def write_boxes(boxes: Iterable[Box], size: tuple[int, int], phrase: str = "") -> str:
    """Return boxes in InternVL's format: `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`.

    Args:
        boxes: boxes in pixels.
        size: height and width of the image in pixels.
        phrase: phrase before the boxes; `<ref>` is omitted if it is empty.
    """
    corners = [grid_box(box, size) for box in boxes]
    text = f"<box>{corners}</box>"
    return f"<ref>{phrase}</ref>{text}" if phrase else text


def read_boxes(text: str) -> tuple[list[GridBox], list[str]]:
    """Return the boxes in a text, in order, and the parts that look like a box but are invalid.

    Two formats are read: `[x1, y1, x2, y2]` and `<ref>phrase</ref><box>[[x1, y1, x2, y2], …]</box>`. A phrase applies
    to all boxes up to the next `</box>` or `<ref>`. A box has integers from 0 to 1000, with left < right and
    top < bottom.
    """
    boxes = []
    invalid_texts = []
    phrase = ""
    for match in MARKS.finditer(text):
        _, _, *corners = match.groups()
        if match["phrase"] is not None:
            phrase = " ".join(match["phrase"].split())
        elif match["end"]:
            phrase = ""
        elif is_box(corners):
            boxes.append(GridBox(*map(int, corners), phrase))
        else:
            invalid_texts.append(match[0])
    return boxes, invalid_texts


def wrong_boxes(text: str) -> tuple[list[str], list[str]]:
    """Return the invalid boxes of a text: those in `<box>`, and those in other brackets."""
    invalid_marked = []
    for content in MARKED.findall(text):
        candidates = fours_in(content)
        if not candidates:
            invalid_marked.append(f"<box>{content}</box> contains no box")
        for corners in candidates:
            if not is_box(corners):
                invalid_marked.append(f"[{', '.join(corners)}]")
    invalid_unmarked = []
    for corners in fours_in(MARKED.sub("", text)):
        # Other brackets may contain any text. Four numbers in them are probably meant as a box.
        if all(map(NUMBER.fullmatch, corners)) and not is_box(corners):
            invalid_unmarked.append(f"[{', '.join(corners)}]")
    return invalid_marked, invalid_unmarked


def fours_in(text: str) -> list[list[str]]:
    return [[corner.strip() for corner in corners] for corners in FOUR.findall(text)]


def is_box(corners: Sequence[str]) -> bool:
    """Return whether four texts are a box: integers on the grid, with left < right and top < bottom."""
    if not all(map(CORNER.fullmatch, corners)):
        return False
    left, top, right, bottom = map(int, corners)
    return left < right <= GRID and top < bottom <= GRID
