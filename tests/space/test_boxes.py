"""Drawing of boxes on images."""

import numpy as np
import pytest
from boxes import COLORS, draw_boxes
from PIL import Image, ImageColor

from modeling_vitp.instructions.boxes import GridBox


@pytest.mark.parametrize("size", [(200, 100), (100, 300), (1, 60)])
def test_box_outlines_its_pixels(size):
    width, height = size
    box = GridBox(250, 500, 750, 1000)
    drawn = np.array(draw_boxes(Image.new("RGB", size, "#000080"), [box]))
    left, top, right, bottom = width // 4, height // 2, max(3 * width // 4, width // 4 + 1), height
    colored = (drawn == ImageColor.getrgb(COLORS[0])).all(-1)
    assert colored[bottom - 1, left:right].all() and colored[top:bottom, left].all()
    assert colored[top:bottom, right - 1].all() and colored[top, left:right].all()
    assert not colored[:, right:].any() or width < 100  # A label without room may extend to the right.
    if width > 100:
        assert (drawn[top + 4 : bottom - 4, left + 4 : right - 4] == (0, 0, 128)).all()


def test_drawing_copies_image_and_converts_palette():
    image = Image.new("P", (64, 64))
    drawn = draw_boxes(image, [GridBox(0, 0, 500, 500, "x")])
    assert drawn.mode == "RGB" and not np.array(image).any() and np.array(drawn).any()


def test_labels_are_readable_with_phrase_colors():
    """The label is black text on the color of its box, inside the image."""
    image = Image.new("RGB", (600, 400), "white")
    boxes = [
        GridBox(0, 0, 200, 300, "ship"),
        GridBox(900, 500, 1000, 800, "a long phrase at the edge"),
        GridBox(300, 0, 500, 300, "ship"),
    ]
    drawn = np.array(draw_boxes(image, boxes)).astype(int)
    for color, count in ((COLORS[0], 2), (COLORS[1], 1)):
        assert (drawn == ImageColor.getrgb(color)).all(-1).sum() > 500 * count
    assert (drawn == ImageColor.getrgb(COLORS[2])).all(-1).sum() == 0
    black = (drawn.sum(-1) < 60).nonzero()
    assert len(black[0]) > 100 and black[1].max() < 598  # The label at the edge stays inside the image.


def test_colors_contrast_with_black_text():
    """The contrast by WCAG 2.1 (relative luminance) is at least 7 to 1."""
    for color in COLORS:
        channels = np.array(ImageColor.getrgb(color)) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05 >= 7
