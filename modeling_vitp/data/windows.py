"""Windows of large images with the labels that belong to them."""

import dataclasses

import numpy as np

from ..images.reading import Window, windows
from .annotations import AnnotatedImage
from .boxes import box_area, clip

MIN_VISIBLE = 0.5  # Minimum share of a box in a window for its object to belong to the window.
MIN_IMAGE_SHARE, MIN_OBJECT_SHARE = 0.6, 0.7


def windows_of(image: AnnotatedImage, size: int, overlap: int) -> list[AnnotatedImage]:
    """Split an image into windows of at most `size` x `size` pixels; a smaller image is returned whole.

    Boxes are clipped to the window. A region belongs to a window if at least half of its box is inside. Smaller parts
    are `slivers`.
    """
    found = windows(image.size, size, overlap)
    return [image] if found == [None] else [window_of(image, window) for window in found]


def window_of(image: AnnotatedImage, window: Window) -> AnnotatedImage:
    """Return a window of an image with the regions that belong to it."""
    left, top, right, bottom = window
    regions, slivers = [], []
    for region in image.regions:
        cut = clip(region.box, window)
        share = box_area(cut) / box_area(region.box)
        if share > 0:
            box = (cut[0] - left, cut[1] - top, cut[2] - left, cut[3] - top)
            part = dataclasses.replace(region, box=box, area=min(region.area * share, box_area(cut)))
            (regions if share >= MIN_VISIBLE else slivers).append(part)
    return dataclasses.replace(
        image,
        id=f"{image.id}/{left}_{top}",
        size=(bottom - top, right - left),
        regions=tuple(regions),
        window=window,
        slivers=tuple(slivers),
    )


def object_windows(
    image_size: tuple[int, int], size: int, overlap: int, min_image_share: float = MIN_IMAGE_SHARE
) -> list[Window]:
    """Return the windows of at most `size` x `size` pixels into which an image is cut.

    Windows that cover at most the share `min_image_share` of a full window are left out. If all windows do, the largest
    ones are kept.
    """
    height, width = image_size
    found = [window or (0, 0, width, height) for window in windows(image_size, size, overlap)]
    shares = [(right - left) * (bottom - top) / size**2 for left, top, right, bottom in found]
    if max(shares) > min_image_share:
        return [window for window, share in zip(found, shares) if share > min_image_share]
    return [window for window, share in zip(found, shares) if share == max(shares)]


def inside(
    corners: np.ndarray, window: Window, size: int, min_share: float | np.ndarray = MIN_OBJECT_SHARE
) -> np.ndarray:
    """Return which objects have at least the share `min_share` of their area in a window, bool of shape `(n,)`.

    The window is always taken as `size` x `size`, even if it reaches beyond the image.
    """
    return shares_inside(corners, window[:2], size) >= min_share if len(corners) else np.zeros(0, bool)


def shares_inside(corners: np.ndarray, start: tuple[int, int], size: int) -> np.ndarray:
    """Return the share of the area of each polygon that lies in a square, float64 of shape `(n,)`.

    The outline is split at the four lines of the square, and its points are clamped to the square. Clamping keeps the
    winding number of each point inside, so the clamped outline encloses the intersection.

    Args:
        corners: corners of polygons with a positive area, in order, `(n, points, 2)`.
        start: position x, y of the top left corner of the square.
        size: side of the square.
    """
    low = np.array(start, np.float64)
    high = low + size
    starts, runs = corners, np.roll(corners, -1, 1) - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate([(low - starts) / runs, (high - starts) / runs], -1)
    crossings = np.sort(np.clip(np.nan_to_num(crossings, nan=0.0, posinf=1.0, neginf=0.0), 0, 1), -1)
    points = starts[:, :, None] + crossings[..., None] * runs[:, :, None]  # Shape (n, points, 4, 2).
    points = np.concatenate([starts[:, :, None], points], 2).reshape(len(corners), -1, 2)
    return areas(np.clip(points, low, high)) / areas(corners)


def areas(corners: np.ndarray) -> np.ndarray:
    """Return the areas of polygons `(n, points, 2)`, float64 of shape `(n,)`."""
    x, y = corners[..., 0], corners[..., 1]
    return abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2
