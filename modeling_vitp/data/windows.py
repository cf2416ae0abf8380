"""Windows of large images with the labels that belong to them."""

import dataclasses

import numpy as np

from ..images.reading import Window, windows
from .annotations import AnnotatedImage
from .boxes import box_area, clip

MIN_VISIBLE = 0.5  # Minimum share of a box in a window for its object to belong to the window.
MIN_IMAGE_SHARE = 0.6  # Windows with at most this share of the area of a full window are left out.
MIN_OBJECT_SHARE = 0.7  # Minimum share of the area of an object in a window.


def windows_of(image: AnnotatedImage, size: int, overlap: int) -> list[AnnotatedImage]:
    """Split an image into windows of at most `size` x `size` pixels; a smaller image is returned whole.

    Boxes are clipped to the window. A region belongs to a window if at least half of its box is inside. Smaller parts
    are `slivers`.
    """
    image_windows = windows(image.size, size, overlap)
    if image_windows == [None]:
        return [image]
    return [window_of(image, window) for window in image_windows]


def window_of(image: AnnotatedImage, window: Window) -> AnnotatedImage:
    """Return a window of an image with the regions that belong to it."""
    left, top, right, bottom = window
    regions = []
    slivers = []
    for region in image.regions:
        clipped_box = clip(region.box, window)
        clipped_area = box_area(clipped_box)
        share = clipped_area / box_area(region.box)
        if share <= 0:
            continue
        x_start, y_start, x_end, y_end = clipped_box
        visible_region = dataclasses.replace(
            region,
            box=(x_start - left, y_start - top, x_end - left, y_end - top),
            area=min(region.area * share, clipped_area),
        )
        if share >= MIN_VISIBLE:
            regions.append(visible_region)
        else:
            slivers.append(visible_region)
    return dataclasses.replace(
        image,
        id=f"{image.id}/{left}_{top}",
        size=(bottom - top, right - left),
        regions=tuple(regions),
        window=window,
        slivers=tuple(slivers),
    )


def object_windows(
    image_size: tuple[int, int],
    size: int,
    overlap: int,
    min_image_share: float = MIN_IMAGE_SHARE,
) -> list[Window]:
    """Return the windows of at most `size` x `size` pixels into which an image is cut.

    Windows that cover at most the share `min_image_share` of a full window are left out. If all windows do, the largest
    ones are kept.
    """
    height, width = image_size
    image_windows = windows(image_size, size, overlap)
    if image_windows == [None]:
        image_windows = [(0, 0, width, height)]
    shares = [box_area(window) / size**2 for window in image_windows]
    largest_share = max(shares)
    selected_windows = []
    for window, share in zip(image_windows, shares):
        if share > min_image_share or share == largest_share:
            selected_windows.append(window)
    return selected_windows


def inside(
    corners: np.ndarray,
    window: Window,
    size: int,
    min_share: float | np.ndarray = MIN_OBJECT_SHARE,
) -> np.ndarray:
    """Return which objects have at least the share `min_share` of their area in a window, bool of shape `(n,)`.

    The window is always taken as `size` x `size`, even if it reaches beyond the image.
    """
    if len(corners) == 0:
        return np.zeros(0, bool)
    return shares_inside(corners, window[:2], size) >= min_share


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
    next_corners = np.roll(corners, -1, axis=1)
    edges = next_corners - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        low_positions = (low - corners) / edges
        high_positions = (high - corners) / edges
    # Positions along each edge, 0 at its start and 1 at its end. An edge that is parallel to a line has none.
    positions = np.concatenate([low_positions, high_positions], axis=-1)
    positions = np.nan_to_num(positions, nan=0.0, posinf=1.0, neginf=0.0)
    positions = np.sort(np.clip(positions, 0, 1), axis=-1)
    edge_starts = corners[:, :, None]
    edge_steps = edges[:, :, None]
    crossings = edge_starts + positions[..., None] * edge_steps  # Shape (n, points, 4, 2).
    outlines = np.concatenate([edge_starts, crossings], axis=2)
    outlines = outlines.reshape(len(corners), -1, 2)
    clamped_outlines = np.clip(outlines, low, high)
    return areas(clamped_outlines) / areas(corners)


def areas(corners: np.ndarray) -> np.ndarray:
    """Return the areas of polygons `(n, points, 2)`, float64 of shape `(n,)`."""
    x = corners[..., 0]
    y = corners[..., 1]
    next_x = np.roll(x, -1, axis=1)
    next_y = np.roll(y, -1, axis=1)
    cross_products = x * next_y - y * next_x
    doubled_areas = cross_products.sum(axis=1)
    return abs(doubled_areas) / 2
