"""Drawing of the boxes in a model's answer on the image."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from modeling_vitp.instructions.boxes import GridBox

MAX_LABEL = 40  # characters
# Bright colors, distinguishable with color blindness, for black labels.
COLORS = ("#ffb000", "#35c2ff", "#ff77b6", "#4be08a", "#c9a6ff", "#f6f04a", "#ff8a5c", "#9fe3e0")


def draw_boxes(image: Image.Image, boxes: Sequence[GridBox]) -> Image.Image:
    """Draw boxes with labels on a copy of an image. The label is the phrase, or the number of a box without a phrase.

    Boxes of one phrase have the same color. A label is placed above its box, or inside at the top of the image.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width, height = image.size
    line = max(2, round(max(width, height) / 300))
    font = ImageFont.load_default(max(11, round(max(width, height) / 45)))
    labels = [box.phrase[:MAX_LABEL] or str(number) for number, box in enumerate(boxes, start=1)]
    groups = list(dict.fromkeys(box.phrase for box in boxes))
    for box, label in zip(boxes, labels):
        color = COLORS[groups.index(box.phrase) % len(COLORS)]
        left, top, right, bottom = box.in_pixels((height, width))
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)
        text_width, text_height = draw.textbbox((0, 0), label, font=font, anchor="lt")[2:]
        x = max(0, min(left, width - text_width - 2 * line))
        y = top - text_height - 2 * line
        y = y if y >= 0 else top
        draw.rectangle((x, y, x + text_width + 2 * line, y + text_height + 2 * line), fill=color)
        draw.text((x + line, y + line), label, fill="black", font=font, anchor="lt")
    return drawn
