"""Boxes that a model writes into its answers, found in the text and drawn on the image."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

GRID = 1000
MAX_LABEL = 40  # characters
# Bright, and told apart by people who see few colours; labels are written on them in black.
COLOURS = ("#ffb000", "#35c2ff", "#ff77b6", "#4be08a", "#c9a6ff", "#f6f04a", "#ff8a5c", "#9fe3e0")
# The last alternative is a box: four whole numbers in brackets.
MARKS = re.compile(
    r"<ref>(?P<phrase>.*?)</ref>|(?P<end></box>)|\[\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\]",
    re.DOTALL,
)


class Box(NamedTuple):
    """A box on the grid from 0 to 1000 across the image."""

    left: int
    top: int
    right: int
    bottom: int
    phrase: str = ""
    """What the answer says is in it; empty if it does not say."""

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in an image of that size."""
        return tuple(corner * side / GRID for corner, side in zip(self[:4], (width, height, width, height)))


def find_boxes(text: str) -> tuple[list[Box], list[str]]:
    """The boxes in an answer, in its order, and what is written like a box but is none.

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
        else:
            box = Box(*map(int, match.groups()[2:]), phrase)
            if box.left < box.right <= GRID and box.top < box.bottom <= GRID:
                boxes.append(box)
            else:
                wrong.append(match[0])
    return boxes, wrong


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an image with the boxes and their labels: the phrase, or else the box's number in the answer.

    Boxes of one phrase have one colour. A label is above its box, or inside where there is no room.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width, height = image.size
    line = max(2, round(max(width, height) / 300))
    font = ImageFont.load_default(max(11, round(max(width, height) / 45)))
    labels = [box.phrase[:MAX_LABEL] or str(number) for number, box in enumerate(boxes, start=1)]
    groups = list(dict.fromkeys(box.phrase for box in boxes))
    for box, label in zip(boxes, labels):
        colour = COLOURS[groups.index(box.phrase) % len(COLOURS)]
        left, top, right, bottom = box.in_pixels(width, height)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        text_width, text_height = draw.textbbox((0, 0), label, font=font, anchor="lt")[2:]
        x = max(0, min(left, width - text_width - 2 * line))
        y = top - text_height - 2 * line
        y = y if y >= 0 else top
        draw.rectangle((x, y, x + text_width + 2 * line, y + text_height + 2 * line), fill=colour)
        draw.text((x + line, y + line), label, fill="black", font=font, anchor="lt")
    return drawn
