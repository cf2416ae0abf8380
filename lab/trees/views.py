"""Views of the training ground: crops, mosaics and collages, each with its annotation.

A tree belongs to a view if the center of its box lies in the view. Its crown is the whole box, even if part of the box
lies outside of the view.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

CROP = 224  # pixels of a test crop; training views are CROP * scale
SCALES = (0.85, 1.15)
COLLAGE_PARTS = 7  # pieces a side; a piece has the size of a visual token
JITTER = 0.2  # range of the random change of brightness and contrast


@dataclass
class TreeScene:
    """Ground to cut views from, or a view.

    Args:
        pixels: uint8 of shape `(height, width, 3)`.
        crowns: bool of shape `(height, width)`, true in the boxes of trees.
        boxes: int64 of shape `(num_trees, 4)`, `[left, top, right, bottom]` in pixels, uncut.
        seen: visible part of each box, which a view of several pieces cuts at the borders of its pieces. Default: the
            boxes cut at the border of the image.
    """

    pixels: np.ndarray
    crowns: np.ndarray
    boxes: np.ndarray
    seen: np.ndarray | None = None

    def __post_init__(self):
        if self.seen is None:
            height, width = self.crowns.shape
            self.seen = self.boxes.clip(0, [width, height] * 2)

    @classmethod
    def of(cls, image: Image.Image, boxes: Sequence[Sequence[int]]) -> "TreeScene":
        pixels = np.array(image.convert("RGB"))
        boxes = np.array(boxes, dtype=np.int64).reshape(-1, 4)
        crowns = np.zeros(pixels.shape[:2], dtype=bool)
        for left, top, right, bottom in boxes.clip(0):
            crowns[top:bottom, left:right] = True
        return cls(pixels, crowns, boxes)

    @property
    def size(self) -> int:
        """Shorter side in pixels."""
        return min(self.crowns.shape)

    def cut(self, size: int, rng: np.random.Generator) -> "TreeScene":
        """Cut a random square of `size` pixels, in one of its eight orientations."""
        top, left = (int(rng.integers(side - size + 1)) for side in self.crowns.shape)
        window = np.s_[top : top + size, left : left + size]
        boxes = self.boxes - [left, top, left, top]
        part = TreeScene(self.pixels[window], self.crowns[window], boxes[is_inside(boxes, size)])
        if rng.random() < 0.5:
            part = part.mirrored()
        for _ in range(rng.integers(4)):
            part = part.turned()
        return part

    def mirrored(self) -> "TreeScene":
        boxes = self.boxes[:, [2, 1, 0, 3]]
        boxes[:, ::2] = self.crowns.shape[1] - boxes[:, ::2]
        return TreeScene(self.pixels[:, ::-1], self.crowns[:, ::-1], boxes)

    def turned(self) -> "TreeScene":
        """Rotate by 90 degrees, which maps `(x, y)` to `(y, width - x)`."""
        boxes = self.boxes[:, [1, 2, 3, 0]]
        boxes[:, 1::2] = self.crowns.shape[1] - boxes[:, 1::2]
        return TreeScene(self.pixels.swapaxes(0, 1)[::-1], self.crowns.swapaxes(0, 1)[::-1], boxes)

    def jittered(self, rng: np.random.Generator) -> "TreeScene":
        """Change brightness and contrast at random."""
        brightness, contrast = 1 + rng.uniform(-JITTER, JITTER, 2)
        levels = (np.arange(256) * brightness - 127.5) * contrast + 127.5
        return replace(self, pixels=levels.round().clip(0, 255).astype(np.uint8).take(self.pixels))

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def assemble(parts: Sequence[TreeScene], columns: int) -> TreeScene:
    """Join squares of the same size, row by row."""
    size = parts[0].size
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.concatenate([getattr(part, name) for part in row], axis=1) for row in rows])

    corners = [np.array([column, row] * 2) * size for row in range(len(rows)) for column in range(columns)]
    boxes, seen = (
        np.concatenate([getattr(part, name) + corner for part, corner in zip(parts, corners)])
        for name in ("boxes", "seen")
    )
    return TreeScene(joined("pixels"), joined("crowns"), boxes, seen)


def view_of(ground: TreeScene, parts: int, rng: np.random.Generator) -> TreeScene:
    """Draw a square view of one ground: a crop, or for `parts` > 1 a mosaic of `parts` × `parts` smaller crops.

    A scene has few different crops but many mosaics, so a model must count locally to answer correctly.
    """
    size = min(round(CROP * rng.uniform(*SCALES)), ground.size) // parts
    return assemble([ground.cut(size, rng) for _ in range(parts**2)], parts)


def collage(grounds: Sequence[TreeScene], rng: np.random.Generator) -> TreeScene:
    """Draw `COLLAGE_PARTS`² independent pieces of all grounds, so that no piece can be guessed from the others."""
    size = round(CROP * rng.uniform(*SCALES)) // COLLAGE_PARTS
    chosen = rng.integers(len(grounds), size=COLLAGE_PARTS**2)
    return assemble([grounds[index].cut(size, rng) for index in chosen], COLLAGE_PARTS)


def is_inside(boxes: np.ndarray, size: int) -> np.ndarray:
    """Return a mask of the boxes whose centers lie in a square of `size` pixels at the origin."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centers >= 0) & (centers < size)).all(axis=1)
