"""Windows of large images with the objects in them, as DOTA's images are cut, and detections brought together again."""

from collections.abc import Sequence

import numpy as np
import torch

from ..detection_boxes import nms_by_label
from ..images.windows import Window, windows
from ..rotated_boxes import rotated_nms, smallest_rectangles

MIN_IMAGE_SHARE, MIN_OBJECT_SHARE = 0.6, 0.7


def object_windows(
    image_size: tuple[int, int], size: int, overlap: int, min_image_share: float = MIN_IMAGE_SHARE
) -> list[Window]:
    """The windows of at most `size` x `size` that an image is cut into.

    One of which no more than `min_image_share` is image is left out, unless none has more; then those with the most
    stay.
    """
    height, width = image_size
    found = [window or (0, 0, width, height) for window in windows(image_size, size, overlap)]
    shares = [(right - left) * (bottom - top) / size**2 for left, top, right, bottom in found]
    if max(shares) > min_image_share:
        return [window for window, share in zip(found, shares) if share > min_image_share]
    return [window for window, share in zip(found, shares) if share == max(shares)]


def shares_inside(corners: np.ndarray, start: tuple[int, int], size: int) -> np.ndarray:
    """Which share of the area of each polygon lies in a square, float64 of shape `(n,)`.

    The outline is cut where it crosses one of the square's four lines, and its points are clamped to the square: that
    keeps how often it winds around each point inside, so what it encloses then is what is in both.

    Args:
        corners: of polygons with an area, in order, `(n, points, 2)`.
        start: x and y of the square's top left corner.
        size: its side.
    """
    low = np.array(start, np.float64)
    high = low + size
    starts, runs = corners, np.roll(corners, -1, 1) - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate([(low - starts) / runs, (high - starts) / runs], -1)
    crossings = np.sort(np.clip(np.nan_to_num(crossings, nan=0.0, posinf=1.0, neginf=0.0), 0, 1), -1)
    points = starts[:, :, None] + crossings[..., None] * runs[:, :, None]  # (n, points, 4, 2), along the outline
    points = np.concatenate([starts[:, :, None], points], 2).reshape(len(corners), -1, 2)
    return areas(np.clip(points, low, high)) / areas(corners)


def areas(corners: np.ndarray) -> np.ndarray:
    """Of polygons `(n, points, 2)`, float64 of shape `(n,)`."""
    x, y = corners[..., 0], corners[..., 1]
    return abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2


def inside(corners: np.ndarray, window: Window, size: int, min_share: float = MIN_OBJECT_SHARE) -> np.ndarray:
    """Which objects belong to a window: those of whose area it has at least a share, bool of shape `(n,)`.

    The window counts as whole, `size` x `size`, where it reaches beyond the image.
    """
    return shares_inside(corners, window[:2], size) >= min_share if len(corners) else np.zeros(0, bool)


def merge(
    detections: Sequence[dict[str, torch.Tensor]], starts: Sequence[tuple[int, int]], nms_threshold: float
) -> dict[str, torch.Tensor]:
    """The detections in the windows of one image, in the image: of those of a class that overlap, the best.

    Args:
        detections: of each window `scores` and `labels`, `(n,)`, and `boxes`, `(n, 4)` with x1, y1, x2, y2, or
            `corners`, `(n, 4, 2)`, in its pixels.
        starts: where each window begins, x and y.
        nms_threshold: detections may overlap by so much.

    Returns:
        The same of the image, by falling score.
    """
    key = "corners" if "corners" in detections[0] else "boxes"
    moved = []
    for one, start in zip(detections, starts, strict=True):
        offset = torch.tensor(start, dtype=one[key].dtype, device=one[key].device)
        moved.append(one[key] + (offset if key == "corners" else offset.repeat(2)))
    joined = {name: torch.cat([one[name] for one in detections]) for name in ("scores", "labels")} | {
        key: torch.cat(moved)
    }
    kept = best_of_overlapping(joined[key].double(), joined["scores"].double(), joined["labels"], nms_threshold)
    return {name: value[kept] for name, value in joined.items()}


def best_of_overlapping(
    places: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, nms_threshold: float
) -> torch.Tensor:
    """Indices of the detections that no better one of their class, which is kept itself, overlaps by more than a
    threshold; by falling score.

    Args:
        places: boxes `(n, 4)` with x1, y1, x2, y2, or corners `(n, 4, 2)`.
        scores, labels: `(n,)`.
    """
    if places.ndim == 3:
        return rotated_nms(smallest_rectangles(places), scores, nms_threshold, labels)
    return nms_by_label(places, scores, nms_threshold, labels)
