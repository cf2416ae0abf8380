"""What is annotated in an image, in one form whatever the format it comes from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from faster_coco_eval.core import mask as run_lengths

from ..images.windows import Window
from ..instructions.from_annotations.annotations import is_number
from ..instructions.from_annotations.formats import AnnotatedObject, Point
from ..training.values import check_type

FLAT = 1e-6  # the area of a box that is taken for none, in squares of its longer extent: a line, but for rounding


@dataclass(frozen=True)
class ImageObjects:
    """The objects of an image.

    Args:
        labels: class indices, int64 of shape `(n,)`.
        corners: in pixels, in order around each box, float64 of shape `(n, 4, 2)`; of an upright box from the top left.
        difficult, crowd: bool of shape `(n,)`: marked as hard to see, and a region of many.
        areas: in pixels, as annotated, float64 of shape `(n,)`; NaN where it is not.
        segmentations: COCO's polygons or run lengths, or `None`, for each.
    """

    labels: np.ndarray
    corners: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    segmentations: tuple[list | dict | None, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "ImageObjects":
        """Some of them, by a mask or by their places."""
        places = np.arange(len(self))[chosen]
        names = ("labels", "corners", "difficult", "crowd", "areas")
        arrays = {name: getattr(self, name)[places] for name in names}
        return ImageObjects(**arrays, segmentations=tuple(self.segmentations[place] for place in places))

    def moved_to(self, left: int, top: int) -> "ImageObjects":
        """The same in a window of the image, which starts there. Their outlines are not moved."""
        return replace(self, corners=self.corners - np.array([left, top]))

    def clipped_to(self, window: Window) -> "ImageObjects":
        """Upright boxes without what of them is outside a window, and areas of those that are whole. Outlines are as
        they were.
        """
        left, top, right, bottom = window
        corners = self.corners.clip([left, top], [right, bottom])
        is_whole = (corners == self.corners).all((1, 2))
        return replace(self, corners=corners, areas=np.where(is_whole, self.areas, np.nan))

    def boxes(self) -> np.ndarray:
        """Upright boxes around them, x1, y1, x2, y2, float64 of shape `(n, 4)`."""
        return np.concatenate([self.corners.min(1), self.corners.max(1)], 1).reshape(-1, 4)

    def masks(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """uint8 of shape `(n, height, width)`; an object without an outline has an empty one.

        Args:
            size: height and width of the image.
            window: the part of it that is wanted.
        """
        left, top, right, bottom = window or (0, 0, *size[::-1])
        masks = np.zeros((len(self), bottom - top, right - left), np.uint8)
        for mask, outline in zip(masks, self.segmentations):
            if outline is not None:
                whole = run_lengths.decode([run_lengths.segmToRle(outline, *size[::-1])])[..., 0]
                mask[:] = whole[top:bottom, left:right]
        return masks


class ClassNames:
    """The classes of a model, in its order, and what they are called in annotations; capitals make no difference.

    Args:
        classes: a name for each, or a mapping with `name` and `as`, the name or names that annotations have for it.
        leave_out: annotated names of objects that are no objects here.

    Raises:
        ValueError: if there is no class, or a name stands for two things.
    """

    def __init__(self, classes: Sequence[str | Mapping], leave_out: Sequence[str] = ()):
        self.names, self._indices = [], {}
        for index, entry in enumerate(classes):
            entry = entry if isinstance(entry, Mapping) else {"name": entry}
            if set(entry) - {"name", "as"} or not isinstance(entry.get("name"), str):
                raise ValueError(f"Class {index}, {str(entry)[:80]!r}, needs a `name`, and may have `as`.")
            annotated = entry.get("as", entry["name"])
            check_type(f"Class {index}: as", annotated, str | Sequence[str])
            self.names.append(entry["name"])
            self._add([annotated] if isinstance(annotated, str) else annotated, index)
        if not self.names:
            raise ValueError("There are no classes.")
        self._add(leave_out, None)

    def _add(self, names: Iterable[str], index: int | None) -> None:
        for name in names:
            if self._indices.setdefault(name.casefold(), index) != index or self.names.count(name) > 1:
                raise ValueError(f"{name!r} stands for two classes.")

    def index(self, label: str | int, where: str) -> int | None:
        """The class of an annotated name, or of its place among the classes; `None` if it is left out."""
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if not isinstance(label, str) or label.casefold() not in self._indices:
            raise ValueError(
                f"{where}: {label!r} is none of the classes {self.names}; list it, or put it in leave_out."
            )
        return self._indices[label.casefold()]


def collect(
    found: Sequence[AnnotatedObject], classes: ClassNames, size: tuple[int, int], with_masks: bool = False
) -> tuple[ImageObjects, list[str]]:
    """Objects as annotated, checked.

    Args:
        size: height and width of the image.
        with_masks: whether each needs an outline.

    Returns:
        Those that are as they should be, and what is wrong with each of the others: a box that has no area, lies
        outside the image or is not of finite numbers; an outline that cannot be drawn.

    Raises:
        ValueError: names the file and the object of a class that is not listed.
    """
    labels, corners, kept, wrong = [], [], [], []
    for item in found:
        label = classes.index(item.label, item.where)
        if label is None:
            continue
        left, top, right, bottom = item.box
        points = item.corners or ((left, top), (right, top), (right, bottom), (left, bottom))
        try:
            check_box(item, points, size)
            if with_masks and not (item.is_crowd and item.segmentation is None):
                check_outline(item.segmentation, size)
        except (ValueError, TypeError) as error:
            wrong.append(f"{item.where}: {error}")
            continue
        labels.append(label)
        corners.append(points)
        kept.append(item)
    objects = ImageObjects(
        np.array(labels, np.int64),
        np.array(corners, np.float64).reshape(-1, 4, 2),
        np.array([item.is_difficult for item in kept], bool),
        np.array([item.is_crowd for item in kept], bool),
        np.array([item.area if is_number(item.area) and item.area > 0 else np.nan for item in kept], np.float64),
        tuple(item.segmentation if with_masks else None for item in kept),
    )
    return objects, wrong


def check_box(item: AnnotatedObject, points: Sequence[Point], size: tuple[int, int]) -> None:
    """Raises a `ValueError` unless a box, with these corners, has an area and lies in the image, at least in part."""
    xs, ys = zip(*points)
    shown = list(item.box) if item.corners is None else [list(point) for point in points]
    if not all(map(is_number, (*xs, *ys, *item.box))):
        raise ValueError(f"the box {shown} is not of finite numbers.")
    left, top, right, bottom = item.box
    doubled = sum((xs[k - 1] - left) * (ys[k] - top) - (xs[k] - left) * (ys[k - 1] - top) for k in range(4))
    if right <= left or bottom <= top or abs(doubled) <= FLAT * max(right - left, bottom - top) ** 2:
        raise ValueError(f"the box {shown} has no area.")
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= size[1] or min(ys) >= size[0]:
        raise ValueError(f"the box {shown} is outside the image of {size[1]} x {size[0]} pixels.")


def check_outline(outline: list | dict | None, size: tuple[int, int]) -> None:
    """Raises a `ValueError` unless it is polygons of three points or more, or run lengths of the image's size."""
    height, width = size
    if not outline:
        raise ValueError("it has no outline (`segmentation`), which masks are drawn from.")
    if isinstance(outline, dict):
        if tuple(outline.get("size", ())) != size or "counts" not in outline:
            raise ValueError(f"its mask is of size {outline.get('size')}, its image of {list(size)}.")
        try:
            run_lengths.decode([run_lengths.segmToRle(outline, width, height)])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"its run lengths {str(outline['counts'])[:60]!r} are no mask of {list(size)}.") from error
        return
    for polygon in outline:
        if not (isinstance(polygon, (list, tuple)) and all(map(is_number, polygon))):
            raise ValueError(f"its outline {str(outline)[:60]} is no list of polygons [x1, y1, x2, y2, …].")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"its polygon {str(polygon)[:60]} is not of three points or more: it cannot be closed.")
        if not all(abs(value) <= 10 * max(size) for value in polygon):
            raise ValueError(f"its polygon {str(polygon)[:60]} is far outside the image of {width} x {height} pixels.")
