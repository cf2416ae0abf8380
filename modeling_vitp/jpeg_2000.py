"""What a JPEG 2000 image holds, from the size marker of its stream (ISO/IEC 15444-1, A.5.1) and the box before it that
names its colors (I.5.3.3).
"""

MARKER = b"\xff\x4f\xff\x51"  # begins the stream, and then the size
NUMBER, DEPTH = 40, 42  # bytes from there
GREY = b"colr\1\0\0\0\0\0\x11"  # which GDAL says of bands that are not said to be colors


def bands_and_bits(content: bytes) -> tuple[int, int]:
    """How many bands an encoded image has, and how many bits the first of them; `(0, 1)` if it has no marker."""
    start = content.find(MARKER)
    if start < 0:
        return 0, 1
    header = content[start : start + DEPTH + 1].ljust(DEPTH + 1, b"\0")
    return int.from_bytes(header[NUMBER:DEPTH], "big"), (header[DEPTH] & 0x7F) + 1


def is_reduced_by_pillow(content: bytes, bands: bool) -> bool:
    """Whether Pillow would give other bits than the image has, or, if bands are wanted, less of them, or none: it does
    not decode three that are said to be grey.
    """
    number, bits = bands_and_bits(content)
    return bits > 8 or (number == 3 and GREY in content) or (bands and number not in (0, 1, 3))
