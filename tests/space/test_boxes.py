"""Boxes are drawn on images."""

import numpy as np
import pytest
from boxes import COLORS, draw_boxes
from PIL import Image, ImageColor

from modeling_vitp.instructions.boxes import GridBox


@pytest.mark.parametrize("size", [(200, 100), (100, 300), (1, 60)])
def test_box_outlines_the_pixels_that_it_spans(size):
    width, height = size
    box = GridBox(250, 500, 750, 1000)
    drawn = np.array(draw_boxes(Image.new("RGB", size, "#000080"), [box]))
    left, top, right, bottom = width // 4, height // 2, max(3 * width // 4, width // 4 + 1), height
    coloured = (drawn == ImageColor.getrgb(COLORS[0])).all(-1)
    assert coloured[bottom - 1, left:right].all() and coloured[top:bottom, left].all()
    assert coloured[top:bottom, right - 1].all() and coloured[top, left:right].all()
    assert not coloured[:, right:].any() or width < 100  # nothing to the right of it but a label that has no room
    if width > 100:
        assert (drawn[top + 4 : bottom - 4, left + 4 : right - 4] == (0, 0, 128)).all()


def test_image_that_is_drawn_on_is_left_as_it_was_and_palettes_become_rgb():
    image = Image.new("P", (64, 64))
    drawn = draw_boxes(image, [GridBox(0, 0, 500, 500, "x")])
    assert drawn.mode == "RGB" and not np.array(image).any() and np.array(drawn).any()


def test_labels_are_readable_and_of_one_colour_a_phrase():
    """The label's background has the colour of its box, black letters are on it, and both stay in the image."""
    image = Image.new("RGB", (600, 400), "white")
    boxes = [
        GridBox(0, 0, 200, 300, "ship"),
        GridBox(900, 500, 1000, 800, "a long phrase at the edge"),
        GridBox(300, 0, 500, 300, "ship"),
    ]
    drawn = np.array(draw_boxes(image, boxes)).astype(int)
    for colour, count in ((COLORS[0], 2), (COLORS[1], 1)):
        assert (drawn == ImageColor.getrgb(colour)).all(-1).sum() > 500 * count
    assert (drawn == ImageColor.getrgb(COLORS[2])).all(-1).sum() == 0
    black = (drawn.sum(-1) < 60).nonzero()
    assert len(black[0]) > 100 and black[1].max() < 598  # the letters of the label at the edge end before it


def test_every_colour_carries_black_letters():
    """Contrast by WCAG 2.1 (relative luminance), at least 7 to 1."""
    for colour in COLORS:
        channels = np.array(ImageColor.getrgb(colour)) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05 >= 7
