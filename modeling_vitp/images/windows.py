"""Windows that cover a large image."""

Box = tuple[int, int, int, int]


def windows(image_size: tuple[int, int], size: int, overlap: int) -> list[Box | None]:
    """Left, top, right and bottom of the windows that cover an image; `None` for one that is not larger."""
    width, height = image_size
    if not 0 <= overlap < size:
        raise ValueError(f"tile: overlap={overlap} must be at least 0 and less than size={size}.")
    if max(width, height) <= size:
        return [None]

    def starts(length: int) -> list[int]:
        return [*range(0, length - size, size - overlap), max(length - size, 0)]

    return [
        (left, top, min(left + size, width), min(top + size, height))
        for top in starts(height)
        for left in starts(width)
    ]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along an axis; the last one ends with it."""
    return [*range(0, length - window, stride), length - window]


def starts(begin: int, end: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` start so that they cover `begin` to `end`; the last one ends at `end`."""
    return [*range(begin, end - size, stride), max(end - size, begin)]
