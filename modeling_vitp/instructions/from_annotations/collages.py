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
from typing import NamedTuple

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
from .questions import draw_integer, pick

CHUNK = 512  # Collages in memory at a time. A scene is opened once for all of them.
KEY = "collage"  # Key of the text in a PNG; a JPEG has the text as its comment.
NO_TURN = (False, False, False)  # Orientation of the image itself.


@dataclass(frozen=True)
class Crop:
    """Square of an image and its orientation: whether it is transposed, and then flipped in x and in y."""

    image: AnnotatedImage
    window: Window
    turn: tuple[bool, bool, bool]

    @property
    def side(self) -> int:
        _, width = self.size
        return width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels. Only squares are turned."""
        x0, y0, x1, y1 = self.window
        return y1 - y0, x1 - x0

    def turn_picture(self, scene: Image.Image) -> Image.Image:
        """Return the crop of a Pillow image of the whole scene."""
        picture = scene.crop(self.window).convert("RGB")
        return Image.fromarray(self.orient(np.asarray(picture)))

    def turn_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Return the crop of an array of shape `(height, width)` of the whole image."""
        x0, y0, x1, y1 = self.window
        return self.orient(numbers[y0:y1, x0:x1])

    def orient(self, pixels: np.ndarray) -> np.ndarray:
        """Return the pixels of the window, of shape `(height, width, ...)`, in the orientation of the crop."""
        is_transposed, flips_x, flips_y = self.turn
        if is_transposed:
            pixels = pixels.swapaxes(0, 1)
        if flips_x:
            pixels = pixels[:, ::-1]
        if flips_y:
            pixels = pixels[::-1]
        return pixels

    def turn_box(self, box: Box) -> Box:
        """Return a box in the oriented crop, from a box in pixels of the window."""
        is_transposed, flips_x, flips_y = self.turn
        x0, y0, x1, y1 = box
        if is_transposed:
            y0, x0, y1, x1 = box
        if flips_x:
            x0, x1 = self.side - x1, self.side - x0
        if flips_y:
            y0, y1 = self.side - y1, self.side - y0
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Collage(AnnotatedImage):
    """Image of N x N crops, in reading order."""

    crops: tuple[Crop, ...] = ()


def draw_collages(
    images: Sequence[AnnotatedImage],
    number: int,
    size: int,
    grids: Sequence[int],
    seed: int,
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
    position_counts = {}
    for grid in grids:
        position_counts[grid] = count_positions(images, size // grid)
        if size < grid or not position_counts[grid].any():
            raise ValueError(f"All images are smaller than a crop of {size // grid} pixels. Reduce collage_size.")

    crops_of_collages = []
    for index in range(number):
        generator = keyed_generator(seed, "collage", index)
        grid = pick(grids, generator)
        crops = draw_crops(
            images,
            position_counts[grid],
            grid=grid,
            side=size // grid,
            generator=generator,
        )
        crops_of_collages.append(crops)
    if images[0].mask is not None:
        label_maps = compose_labels(crops_of_collages)
    else:
        label_maps = [None] * number
    boxes = {image.id: boxes_of(image) for image in images}
    collages = []
    for crops, label_map in zip(crops_of_collages, label_maps):
        collage_id = f"collages/{len(collages):06}"
        collages.append(make_collage(collage_id, crops, label_map, boxes))
    return collages


def count_positions(images: Sequence[AnnotatedImage], side: int) -> torch.Tensor:
    """Return the number of positions of a square in each image, float64 `(num_images,)`."""
    counts = []
    for image in images:
        height, width = image.size
        rows = max(height - side + 1, 0)
        columns = max(width - side + 1, 0)
        counts.append(rows * columns)
    return torch.tensor(counts, dtype=torch.float64)


def draw_crops(
    images: Sequence[AnnotatedImage],
    position_counts: torch.Tensor,
    grid: int,
    side: int,
    generator: torch.Generator,
    turn: bool = True,
) -> list[Crop]:
    """Draw the crops of a collage of `grid` x `grid` squares, each from an image with the weight of its positions."""
    indices = torch.multinomial(position_counts, grid * grid, replacement=True, generator=generator)
    return [draw_crop(images[index], side, generator, turn) for index in indices.tolist()]


def boxes_of(image: AnnotatedImage) -> np.ndarray:
    """Return the boxes of the regions of an image, float64 `(num_regions, 4)`."""
    boxes = [region.box for region in image.regions]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def draw_crop(
    image: AnnotatedImage,
    side: int,
    generator: torch.Generator,
    turn: bool = True,
) -> Crop:
    """Draw a square of an image at a random position, and in a random orientation if `turn` is true."""
    height, width = image.size
    y = draw_integer(height - side + 1, generator)
    x = draw_integer(width - side + 1, generator)
    orientation = NO_TURN
    if turn:
        bits = torch.randint(2, (3,), generator=generator)
        orientation = tuple(bits.bool().tolist())
    window = (x, y, x + side, y + side)
    return Crop(image, window, orientation)


def corners_of(crops: Sequence[Crop]) -> list[tuple[int, int]]:
    """Return the left and the top of each crop in the collage."""
    columns = round(len(crops) ** 0.5)
    height, width = crops[0].size
    corners = []
    for index in range(len(crops)):
        row, column = divmod(index, columns)
        corners.append((column * width, row * height))
    return corners


def size_of_collage(crops: Sequence[Crop]) -> tuple[int, int]:
    """Return height and width of the collage of crops."""
    columns = round(len(crops) ** 0.5)
    height, width = crops[0].size
    return columns * height, columns * width


def make_collage(
    collage_id: str,
    crops: list[Crop],
    labels: LabelMap | None,
    boxes: Mapping[str, np.ndarray],
) -> Collage:
    """Return a collage with the regions of its crops.

    Args:
        crops: crops in reading order.
        labels: label map of the collage, if the images have masks.
        boxes: boxes of the regions of each image, by its id, float64 `(num_regions, 4)`.
    """
    size = size_of_collage(crops)
    if labels is not None:
        return Collage(
            collage_id,
            paths=(),
            size=size,
            regions=regions_of(labels),
            mask=lambda: labels,
            crops=tuple(crops),
        )
    regions = []
    slivers = []
    for crop, corner in zip(crops, corners_of(crops)):
        window = window_of_crop(crop, boxes[crop.image.id])
        for region in window.regions:
            if len(crops) > 1:  # A caption may mention other regions of its image.
                region = dataclasses.replace(region, caption=None)
            regions.append(move_region(region, crop, corner))
        for sliver in window.slivers:
            slivers.append(move_region(sliver, crop, corner))
    return Collage(
        collage_id,
        paths=(),
        size=size,
        regions=tuple(regions),
        slivers=tuple(slivers),
        crops=tuple(crops),
    )


def window_of_crop(crop: Crop, boxes: np.ndarray) -> AnnotatedImage:
    """Return the window of a crop with its regions, before it is turned.

    Args:
        boxes: boxes of the regions of the crop's image, float64 `(num_regions, 4)`.
    """
    # Most regions of a large image lie outside of the window. The array finds them faster than `window_of`.
    x0, y0, x1, y1 = crop.window
    overlaps_in_x = (boxes[:, 0] < x1) & (boxes[:, 2] > x0)
    overlaps_in_y = (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    regions = []
    for index in np.flatnonzero(overlaps_in_x & overlaps_in_y):
        regions.append(crop.image.regions[index])
    image = dataclasses.replace(crop.image, regions=tuple(regions))
    return window_of(image, crop.window)


def move_region(region: Region, crop: Crop, corner: tuple[int, int]) -> Region:
    """Return a region of a crop's window in the collage."""
    x0, y0, x1, y1 = crop.turn_box(region.box)
    x, y = corner
    box = (x0 + x, y0 + y, x1 + x, y1 + y)
    return dataclasses.replace(region, box=box)


def compose_labels(crops_of_collages: Sequence[Sequence[Crop]]) -> list[LabelMap]:
    """Return the label map of each collage; each mask is read once."""
    canvases = [np.zeros(size_of_collage(crops), dtype=np.uint16) for crops in crops_of_collages]
    phrases = ()
    for image, placements in placements_by_image(crops_of_collages):
        numbers, phrases = image.mask()
        for placement in placements:
            x, y = placement.corner
            height, width = placement.crop.size
            canvas = canvases[placement.collage_index]
            canvas[y : y + height, x : x + width] = placement.crop.turn_numbers(numbers)
    return [LabelMap(canvas, phrases) for canvas in canvases]


class Placement(NamedTuple):
    """Crop at its position in one of several collages."""

    collage_index: int
    crop: Crop
    corner: tuple[int, int]
    """Left and top of the crop in the collage."""


def placements_by_image(
    crops_of_collages: Sequence[Sequence[Crop]],
) -> Iterator[tuple[AnnotatedImage, list[Placement]]]:
    """Yield each image, in the order of their ids, with the placements of its crops."""
    placements_by_id = defaultdict(list)
    for index, crops in enumerate(crops_of_collages):
        for crop, corner in zip(crops, corners_of(crops)):
            placement = Placement(index, crop, corner)
            placements_by_id[crop.image.id].append(placement)
    for image_id in sorted(placements_by_id):
        placements = placements_by_id[image_id]
        yield placements[0].crop.image, placements


def encode_collages(collages: Iterable[Collage]) -> Iterator[list[dict]]:
    """Yield the encoded file of each collage for `datasets`: JPEG if all of its crops are from JPEGs, else PNG.

    Raises:
        ValueError: If an image does not have 8 bits; the message names it.
    """
    collages = iter(collages)
    while chunk := list(islice(collages, CHUNK)):
        for collage, (canvas, is_jpeg) in zip(chunk, paint_collages(chunk)):
            metadata = [describe_crop(crop) for crop in collage.crops]
            content = encode_collage(canvas, metadata, is_jpeg)
            _, _, stem = collage.id.rpartition("/")
            suffix = "jpg" if is_jpeg else "png"
            yield [{"bytes": content, "path": f"{stem}.{suffix}"}]


def paint_collages(collages: Sequence[Collage]) -> list[tuple[Image.Image, bool]]:
    """Return the picture of each collage, and whether all of its crops are from JPEGs. Each scene is opened once."""
    canvases = []
    for collage in collages:
        height, width = collage.size
        canvases.append(Image.new("RGB", (width, height)))
    are_jpegs = [True] * len(collages)
    for image, placements in placements_by_image([collage.crops for collage in collages]):
        scene, is_jpeg = scene_of(image, image.paths[0])
        if scene.mode not in PIL_8BIT_MODES:
            raise ValueError(f"{image.paths[0]}: collages need 8-bit images, got mode {scene.mode}.")
        for placement in placements:
            picture = placement.crop.turn_picture(scene)
            canvases[placement.collage_index].paste(picture, placement.corner)
            if not is_jpeg:
                are_jpegs[placement.collage_index] = False
    return list(zip(canvases, are_jpegs))


def describe_crop(crop: Crop) -> dict:
    """Return the metadata of a crop."""
    return {
        "image": crop.image.id,
        "window": list(crop.window),
        "turn": list(map(int, crop.turn)),
    }


def encode_collage(picture: Image.Image, crops: list[dict], as_jpeg: bool) -> bytes:
    """Encode a collage; its metadata lists the crops in reading order, each with `image`, `window` and `turn`."""
    text = json.dumps({KEY: crops})
    buffer = io.BytesIO()
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
    if not isinstance(crops, list):
        return []
    columns = round(len(crops) ** 0.5)
    return crops if columns**2 == len(crops) else []


def split_collage(image: Image.Image) -> list[Image.Image]:
    """Split a collage into its crops, in reading order; return an empty list for other images."""
    columns = round(len(stated_crops(image)) ** 0.5)
    if columns == 0 or min(image.size) < columns:
        return []
    width = image.width // columns
    height = image.height // columns
    crops = []
    for row in range(columns):
        for column in range(columns):
            x = column * width
            y = row * height
            window = (x, y, x + width, y + height)
            crops.append(image.crop(window))
    return crops
