"""Which pieces a collage was made of. Its file says it, and so it is known wherever the image goes."""

import io
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "collage"  # of the text in a PNG; that of a JPEG is its comment
JPEG_QUALITY = 95


def encode_collage(picture: Image.Image, pieces: list[dict], as_jpeg: bool) -> bytes:
    """A square of N x N pieces as a file that says what they are.

    Args:
        pieces: in reading order, each with its `image`, `window` and `turn`.
        as_jpeg: of quality 95; otherwise PNG.
    """
    said, buffer = json.dumps({KEY: pieces}), io.BytesIO()
    if as_jpeg:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, comment=said)
    else:
        info = PngInfo()
        info.add_text(KEY, said)
        picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def said_pieces(image: Image.Image) -> list[dict]:
    """What an opened image says of its pieces, in reading order; empty if it is no collage."""
    said = image.info.get(KEY) or image.info.get("comment") or ""
    try:
        pieces = json.loads(said)[KEY]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return pieces if isinstance(pieces, list) and round(len(pieces) ** 0.5) ** 2 == len(pieces) else []


def cut_pieces(image: Image.Image) -> list[Image.Image]:
    """The pieces of a collage as they lie in it, in reading order; none of any other image."""
    side = round(len(said_pieces(image)) ** 0.5)
    if side == 0 or min(image.size) < side:
        return []
    width, height = (length // side for length in image.size)
    places = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [image.crop((left, top, left + width, top + height)) for left, top in places]
