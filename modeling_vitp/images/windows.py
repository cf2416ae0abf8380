"""Windows that cover a large image."""

Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along an axis: at every multiple of the stride, and the last so that it ends with the axis.

    A window that is not smaller than the axis starts at 0 and is the only one.
    """
    return [*range(0, length - window, stride), max(length - window, 0)]


def windows(image_size: tuple[int, int], size: int, overlap: int) -> list[Window | None]:
    """The windows, at most `size` x `size`, that cover an image of that height and width; `None` for a small one."""
    height, width = image_size
    if not 0 <= overlap < size:
        raise ValueError(f"tile: overlap={overlap} must be at least 0 and less than size={size}.")
    if max(width, height) <= size:
        return [None]
    return [
        (left, top, min(left + size, width), min(top + size, height))
        for top in window_starts(height, size, size - overlap)
        for left in window_starts(width, size, size - overlap)
    ]
