"""Boxes in percent of the image, `{<x1><y1><x2><y2>}`, upright or turned, as MiniGPT-v2, GeoChat and VRSBench write."""

import math
import re

from modeling_vitp.instructions.boxes import Box, clip, write_boxes

TASK = re.compile(r"<image>|\[(?:refer|identify|grounding|caption|vqa)\]", re.IGNORECASE)
BOX = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>(?:\|<(-?\d+)>)?\}")
WRITTEN = r"\{<[^{}]*>\}"  # like a box
PHRASE = r"<p>\s*(?P<{}>(?:(?!</p>).)*?)\s*</p>"
MARKED = re.compile(rf"(?:{PHRASE.format('phrase')}\s*)?(?P<boxes>{WRITTEN}(?:\s*{WRITTEN})*)|{PHRASE.format('alone')}")


def from_percent(text: str, size: tuple[int, int]) -> str:
    """The text on one line, without the name of its task, with phrases and boxes as InternVL writes them.

    A turned box is given by its sides before it is turned about its centre, and an angle in degrees; it becomes the
    upright one around it.

    Args:
        size: height and width of the image, in pixels.

    Raises:
        ValueError: if something is written like a box and is none.
    """

    def rewrite(match: re.Match) -> str:
        if match["alone"] is not None:
            return f"<ref>{match['alone']}</ref>"
        boxes = [upright_box(written, size) for written in re.findall(WRITTEN, match["boxes"])]
        return write_boxes(boxes, size, match["phrase"] or "")

    return MARKED.sub(rewrite, " ".join(TASK.sub("", text).split()))


def upright_box(written: str, size: tuple[int, int]) -> Box:
    """The box in pixels, upright around one that is turned and cut to the image."""
    match, (height, width) = BOX.fullmatch(written), size
    left, top, right, bottom = map(int, match.groups()[:4]) if match else (0, 0, 0, 0)
    if not (left < right <= 100 and top < bottom <= 100):
        raise ValueError(f"{written} is no box in percent of an image")
    angle = math.radians(int(match[5] or 0))
    sine, cosine = abs(math.sin(angle)), abs(math.cos(angle))
    x, y = (left + right) * width / 200, (top + bottom) * height / 200
    along, down = (right - left) * width / 200, (bottom - top) * height / 200  # half of its sides
    half_width, half_height = along * cosine + down * sine, along * sine + down * cosine
    return clip((x - half_width, y - half_height, x + half_width, y + half_height), (0, 0, width, height))
