"""Collages of square crops from random positions in the images of a data set, so that crops are independent.

Neighboring parts of an image are similar, so that an answer about many parts can be guessed from its own beginning. The
metadata of a collage file lists its crops.
"""

import dataclasses
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...data.annotations import AnnotatedImage, LabelMap, Region, regions_of
from ...data.boxes import Box
from ...data.windows import window_of
from ...image_decoding import PIL_8BIT_MODES
from ...images.reading import Window
from ...vrl import keyed_generator
from .encoding import JPEG_QUALITY, scene_of

CHUNK = 512  # Collages in memory at a time. A scene is opened once for all of them.
KEY = "collage"  # Key of the text in a PNG; a JPEG has the text as its comment.


@dataclass(frozen=True)
class Crop:
    """Square of an image and its orientation: whether it is transposed, and then flipped in x and in y."""

    image: AnnotatedImage
    window: Window
    turn: tuple[bool, bool, bool]

    @property
    def side(self) -> int:
        return self.window[2] - self.window[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels. Only squares are turned."""
        left, top, right, bottom = self.window
        return bottom - top, right - left

    def turn_picture(self, scene: Image.Image) -> Image.Image:
        """Return the crop of a Pillow image of the whole scene."""
        return Image.fromarray(self.orient(np.asarray(scene.crop(self.window).convert("RGB"))))

    def turn_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Return the crop of an array of shape `(height, width)` of the whole image."""
        left, top, right, bottom = self.window
        return self.orient(numbers[top:bottom, left:right])

    def orient(self, pixels: np.ndarray) -> np.ndarray:
        """Return the pixels of the window, of shape `(height, width, ...)`, in the orientation of the crop."""
        is_transposed, flips_x, flips_y = self.turn
        if is_transposed:
            pixels = pixels.swapaxes(0, 1)
        if flips_x:
            pixels = pixels[:, ::-1]
        return pixels[::-1] if flips_y else pixels

    def turn_box(self, box: Box) -> Box:
        """Return a box in the oriented crop, from a box in pixels of the window."""
        is_transposed, *flips = self.turn
        left, top, right, bottom = box
        spans = [(top, bottom), (left, right)] if is_transposed else [(left, right), (top, bottom)]
        (x0, x1), (y0, y1) = [
            (self.side - high, self.side - low) if is_flipped else (low, high)
            for (low, high), is_flipped in zip(spans, flips)
        ]
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Collage(AnnotatedImage):
    """Image of N x N crops, in reading order."""

    crops: tuple[Crop, ...] = ()


def draw_collages(
    images: Sequence[AnnotatedImage], number: int, size: int, grids: Sequence[int], seed: int
) -> list[Collage]:
    """Draw collages of N x N crops.

    All squares of all images are equally likely, and so are their eight orientations. Objects are assigned to crops as
    to windows, see [`~modeling_vitp.data.windows.windows_of`]. The crops of the n-th collage
    depend on the seed, n and the images.

    Args:
        number: number of collages.
        size: approximate side of a collage in pixels.
        grids: values of N, one of which is drawn for each collage.

    Raises:
        ValueError: If all images are smaller than a crop.
    """
    if number == 0:
        return []
    weights = {}
    for grid in grids:
        fits = [max(image.size[0] - size // grid + 1, 0) * max(image.size[1] - size // grid + 1, 0) for image in images]
        weights[grid] = torch.tensor(fits, dtype=torch.float64)
        if size < grid or not weights[grid].any():
            raise ValueError(f"All images are smaller than a crop of {size // grid} pixels. Reduce collage_size.")

    drawn = []
    for index in range(number):
        generator = keyed_generator(seed, "collage", index)
        grid = grids[torch.randint(len(grids), (), generator=generator).item()]
        chosen = torch.multinomial(weights[grid], grid * grid, replacement=True, generator=generator).tolist()
        drawn.append([draw_crop(images[choice], size // grid, generator) for choice in chosen])
    labels = compose_labels(drawn) if images[0].mask is not None else [None] * number
    boxes = {image.id: boxes_of(image) for image in images}
    return [make_collage(f"collages/{index:06}", *parts, boxes) for index, parts in enumerate(zip(drawn, labels))]


def boxes_of(image: AnnotatedImage) -> np.ndarray:
    """Return the boxes of the regions of an image, float64 `(num_regions, 4)`."""
    return np.array([region.box for region in image.regions], dtype=np.float64).reshape(-1, 4)


def draw_crop(image: AnnotatedImage, side: int, generator: torch.Generator, turn: bool = True) -> Crop:
    """Draw a square of an image at a random position, and in a random orientation if `turn` is true."""
    top, left = (torch.randint(length - side + 1, (), generator=generator).item() for length in image.size)
    turns = torch.randint(2, (3,), generator=generator).bool().tolist() if turn else (False, False, False)
    return Crop(image, (left, top, left + side, top + side), tuple(turns))


def corners_of(crops: Sequence[Crop]) -> list[tuple[int, int]]:
    """Return the left and the top of each crop in the collage."""
    columns = round(len(crops) ** 0.5)
    height, width = crops[0].size
    return [(width * (index % columns), height * (index // columns)) for index in range(len(crops))]


def make_collage(
    collage_id: str, crops: list[Crop], labels: LabelMap | None, boxes: Mapping[str, np.ndarray]
) -> Collage:
    """Return a collage with the regions of its crops.

    Args:
        crops: crops in reading order.
        labels: label map of the collage, if the images have masks.
        boxes: boxes of the regions of each image, by its id, float64 `(num_regions, 4)`.
    """
    corners = corners_of(crops)
    height, width = crops[0].size
    size = (corners[-1][1] + height, corners[-1][0] + width)
    if labels is not None:
        return Collage(collage_id, (), size, regions_of(labels), mask=lambda: labels, crops=tuple(crops))
    regions, slivers = [], []
    for crop, corner in zip(crops, corners):
        low, high = boxes[crop.image.id][:, :2], boxes[crop.image.id][:, 2:]
        is_near = (low < crop.window[2:]).all(axis=1) & (high > crop.window[:2]).all(axis=1)
        near = tuple(crop.image.regions[index] for index in np.flatnonzero(is_near).tolist())
        window = window_of(dataclasses.replace(crop.image, regions=near), crop.window)
        if len(crops) > 1:  # A caption may mention other regions of its image.
            window = dataclasses.replace(
                window, regions=tuple(dataclasses.replace(region, caption=None) for region in window.regions)
            )
        regions += [move_region(region, crop, corner) for region in window.regions]
        slivers += [move_region(region, crop, corner) for region in window.slivers]
    return Collage(collage_id, (), size, tuple(regions), slivers=tuple(slivers), crops=tuple(crops))


def move_region(region: Region, crop: Crop, corner: tuple[int, int]) -> Region:
    """Return a region of a crop's window in the collage."""
    (left, top, right, bottom), (x, y) = crop.turn_box(region.box), corner
    return dataclasses.replace(region, box=(left + x, top + y, right + x, bottom + y))


def compose_labels(drawn: Sequence[Sequence[Crop]]) -> list[LabelMap]:
    """Return the label map of each collage; each mask is read once."""
    canvases, phrases = [], ()
    for crops in drawn:
        columns = round(len(crops) ** 0.5)
        height, width = crops[0].size
        canvases.append(np.zeros((columns * height, columns * width), dtype=np.uint16))
    for image, uses in by_image(drawn):
        numbers, phrases = image.mask()
        for index, crop, (x, y) in uses:
            height, width = crop.size
            canvases[index][y : y + height, x : x + width] = crop.turn_numbers(numbers)
    return [LabelMap(canvas, phrases) for canvas in canvases]


def by_image(drawn: Sequence[Sequence[Crop]]) -> Iterable[tuple[AnnotatedImage, list]]:
    """Return each image with its crops: index of the collage, crop, and position (left, top) in the collage."""
    uses = defaultdict(list)
    for index, crops in enumerate(drawn):
        for crop, corner in zip(crops, corners_of(crops)):
            uses[crop.image.id].append((index, crop, corner))
    return ((crops[0][1].image, crops) for _, crops in sorted(uses.items()))


def encode_collages(collages: Iterable[Collage]) -> Iterator[list[dict]]:
    """Yield the encoded file of each collage for `datasets`: JPEG if all of its crops are from JPEGs, else PNG.

    Raises:
        ValueError: If an image does not have 8 bits; the message names it.
    """
    collages = iter(collages)
    while chunk := list(islice(collages, CHUNK)):
        canvases = [Image.new("RGB", collage.size[::-1]) for collage in chunk]
        are_jpegs = [True] * len(chunk)
        for image, uses in by_image([collage.crops for collage in chunk]):
            scene, is_jpeg = scene_of(image, image.paths[0])
            if scene.mode not in PIL_8BIT_MODES:
                raise ValueError(f"{image.paths[0]}: collages need 8-bit images, got mode {scene.mode}.")
            for index, crop, corner in uses:
                canvases[index].paste(crop.turn_picture(scene), corner)
                are_jpegs[index] &= is_jpeg
        for collage, canvas, is_jpeg in zip(chunk, canvases, are_jpegs):
            stated = [
                {"image": crop.image.id, "window": list(crop.window), "turn": [int(part) for part in crop.turn]}
                for crop in collage.crops
            ]
            name = f"{collage.id.rpartition('/')[2]}.{'jpg' if is_jpeg else 'png'}"
            yield [{"bytes": encode_collage(canvas, stated, is_jpeg), "path": name}]


def encode_collage(picture: Image.Image, crops: list[dict], as_jpeg: bool) -> bytes:
    """Encode a collage; its metadata lists the crops in reading order, each with `image`, `window` and `turn`."""
    text, buffer = json.dumps({KEY: crops}), io.BytesIO()
    if as_jpeg:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, comment=text)
    else:
        info = PngInfo()
        info.add_text(KEY, text)
        picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def stated_crops(image: Image.Image) -> list[dict]:
    """Return the crops in the metadata of a collage, in reading order; empty for other images."""
    text = image.info.get(KEY) or image.info.get("comment") or ""
    try:
        crops = json.loads(text)[KEY]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return crops if isinstance(crops, list) and round(len(crops) ** 0.5) ** 2 == len(crops) else []


def split_collage(image: Image.Image) -> list[Image.Image]:
    """Split a collage into its crops, in reading order; return an empty list for other images."""
    columns = round(len(stated_crops(image)) ** 0.5)
    if columns == 0 or min(image.size) < columns:
        return []
    width, height = (length // columns for length in image.size)
    corners = [(column * width, row * height) for row in range(columns) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]
