"""Collages of square pieces from anywhere in a data set's images: no part of one tells anything of another.

In an image neighbours are alike, so that an answer about many places is guessed from its own beginning.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image

from ...image_processing_vitp import PIL_8BIT_MODES
from ...images.reading import Window
from ...vrl import keyed_generator
from ..boxes import Box
from ..pieces import encode_collage
from .annotations import AnnotatedImage, Labels, Region
from .masks import regions_of
from .windows import scene_of, window_of

CHUNK = 512  # collages that are in memory at a time, so that a scene is opened once for all of them


@dataclass(frozen=True)
class Piece:
    """A square of an image, and its turn: whether it is transposed, and after that flipped in x and in y."""

    image: AnnotatedImage
    window: Window
    turn: tuple[bool, bool, bool]

    @property
    def side(self) -> int:
        return self.window[2] - self.window[0]

    def turned_picture(self, scene: Image.Image) -> Image.Image:
        piece = scene.crop(self.window).convert("RGB")
        ways = (Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)
        for is_wanted, way in zip(self.turn, ways):
            piece = piece.transpose(way) if is_wanted else piece
        return piece

    def turned_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Of an array of shape (height, width) over the image, what lies in the piece."""
        left, top, right, bottom = self.window
        piece, (is_transposed, flips_x, flips_y) = numbers[top:bottom, left:right], self.turn
        return (piece.T if is_transposed else piece)[:: 1 - 2 * flips_y, :: 1 - 2 * flips_x]

    def turned_box(self, box: Box) -> Box:
        """Of a box in pixels of the window."""
        is_transposed, *flips = self.turn
        left, top, right, bottom = box
        spans = [(top, bottom), (left, right)] if is_transposed else [(left, right), (top, bottom)]
        (x0, x1), (y0, y1) = [
            (self.side - high, self.side - low) if is_flipped else (low, high)
            for (low, high), is_flipped in zip(spans, flips)
        ]
        return x0, y0, x1, y1

    def said(self) -> dict:
        """What the collage's file says of it."""
        return {"image": self.image.id, "window": list(self.window), "turn": [int(part) for part in self.turn]}


@dataclass(frozen=True)
class Collage(AnnotatedImage):
    """An image of N x N pieces, in reading order."""

    pieces: tuple[Piece, ...] = ()


def places_of(number: int, side: int) -> list[tuple[int, int]]:
    """Left and top of each of a number of pieces of a collage."""
    columns = round(number**0.5)
    return [(side * (place % columns), side * (place // columns)) for place in range(number)]


def draw_collages(
    images: Sequence[AnnotatedImage], number: int, size: int, grids: Sequence[int], seed: int
) -> list[Collage]:
    """Collages of about `size` pixels a side, each of N x N pieces with an N drawn of `grids`.

    Every square of every image is as likely a piece as any other, and each of its eight turns. An object belongs to a
    piece as to a window, see [`~modeling_vitp.instructions.from_annotations.windows.windows_of`]. The pieces of the
    n-th collage depend on seed, n and the images.

    Raises:
        ValueError: if all images are smaller than a piece.
    """
    if number == 0:
        return []
    weights = {}
    for grid in grids:
        fits = [max(image.size[0] - size // grid + 1, 0) * max(image.size[1] - size // grid + 1, 0) for image in images]
        weights[grid] = torch.tensor(fits, dtype=torch.float64)
        if size < grid or not weights[grid].any():
            raise ValueError(f"No image is as large as a piece of {size // grid} pixels: give a smaller collage_size.")
    drawn = []
    for index in range(number):
        generator = keyed_generator(seed, "collage", index)
        grid = grids[torch.randint(len(grids), (), generator=generator).item()]
        chosen = torch.multinomial(weights[grid], grid * grid, replacement=True, generator=generator).tolist()
        drawn.append([draw_piece(images[place], size // grid, generator) for place in chosen])
    labels = compose_labels(drawn) if images[0].mask is not None else [None] * number
    boxes = {image.id: np.array([region.box for region in image.regions]).reshape(-1, 4) for image in images}
    return [collage_of(f"collages/{index:06}", *parts, boxes) for index, parts in enumerate(zip(drawn, labels))]


def draw_piece(image: AnnotatedImage, side: int, generator: torch.Generator) -> Piece:
    top, left = (torch.randint(length - side + 1, (), generator=generator).item() for length in image.size)
    turn = torch.randint(2, (3,), generator=generator).bool().tolist()
    return Piece(image, (left, top, left + side, top + side), tuple(turn))


def collage_of(collage_id: str, pieces: list[Piece], labels: Labels | None, boxes: Mapping[str, np.ndarray]) -> Collage:
    """A collage with its annotation: of masks that of its `labels`, or else what its pieces show of the regions.

    Args:
        boxes: of the regions of each image, by its id, float64 of shape (num_regions, 4).
    """
    places = places_of(len(pieces), pieces[0].side)
    size = (places[-1][1] + pieces[0].side, places[-1][0] + pieces[0].side)
    if labels is not None:
        return Collage(collage_id, (), size, regions_of(labels), mask=lambda: labels, pieces=tuple(pieces))
    regions, slivers = [], []
    for piece, place in zip(pieces, places):
        low, high = boxes[piece.image.id][:, :2], boxes[piece.image.id][:, 2:]
        is_near = (low < piece.window[2:]).all(axis=1) & (high > piece.window[:2]).all(axis=1)
        near = tuple(piece.image.regions[index] for index in np.flatnonzero(is_near).tolist())
        window = window_of(dataclasses.replace(piece.image, regions=near), piece.window)
        regions += [moved(region, piece, place) for region in window.regions]
        slivers += [moved(region, piece, place) for region in window.slivers]
    return Collage(collage_id, (), size, tuple(regions), slivers=tuple(slivers), pieces=tuple(pieces))


def moved(region: Region, piece: Piece, place: tuple[int, int]) -> Region:
    """A region of the piece's window where it lies in the collage; not its caption, which may say what is beside."""
    left, top, right, bottom = piece.turned_box(region.box)
    x, y = place
    return dataclasses.replace(region, box=(left + x, top + y, right + x, bottom + y), caption=None)


def compose_labels(drawn: Sequence[Sequence[Piece]]) -> list[Labels]:
    """The classes of each collage's pixels; every mask is read once."""
    sides = [round(len(pieces) ** 0.5) * pieces[0].side for pieces in drawn]
    canvases, phrases = [np.zeros((side, side), dtype=np.uint16) for side in sides], ()
    for image, uses in by_image(drawn):
        numbers, phrases = image.mask()
        for index, piece, (x, y) in uses:
            canvases[index][y : y + piece.side, x : x + piece.side] = piece.turned_numbers(numbers)
    return [Labels(canvas, phrases) for canvas in canvases]


def by_image(drawn: Sequence[Sequence[Piece]]) -> Iterable[tuple[AnnotatedImage, list]]:
    """Each image with the pieces that come from it: number of the collage, piece and place."""
    uses = defaultdict(list)
    for index, pieces in enumerate(drawn):
        for piece, place in zip(pieces, places_of(len(pieces), pieces[0].side)):
            uses[piece.image.id].append((index, piece, place))
    return ((pieces[0][1].image, pieces) for _, pieces in sorted(uses.items()))


def encode_collages(collages: Iterable[Collage]) -> Iterator[list[dict]]:
    """The file of each collage as `datasets` stores it: JPEG if all of its pieces come from JPEGs, or else PNG.

    Raises:
        ValueError: names the image that is not of 8 bits.
    """
    collages = iter(collages)
    while chunk := list(islice(collages, CHUNK)):
        canvases = [Image.new("RGB", collage.size[::-1]) for collage in chunk]
        are_jpegs = [True] * len(chunk)
        for image, uses in by_image([collage.pieces for collage in chunk]):
            scene, is_jpeg = scene_of(image, image.paths[0])
            if scene.mode not in PIL_8BIT_MODES:
                raise ValueError(f"{image.paths[0]}: an image of mode {scene.mode} cannot be a part of a collage.")
            for index, piece, place in uses:
                canvases[index].paste(piece.turned_picture(scene), place)
                are_jpegs[index] &= is_jpeg
        for collage, canvas, is_jpeg in zip(chunk, canvases, are_jpegs):
            content = encode_collage(canvas, [piece.said() for piece in collage.pieces], is_jpeg)
            name = collage.id.rpartition("/")[2]
            yield [{"bytes": content, "path": f"{name}.{'jpg' if is_jpeg else 'png'}"}]
