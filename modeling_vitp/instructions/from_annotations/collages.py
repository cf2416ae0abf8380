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
from .questions import pick

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
        crops = draw_crops(images, position_counts[grid], grid, size // grid, generator)
        crops_of_collages.append(crops)
    if images[0].mask is not None:
        label_maps = compose_labels(crops_of_collages)
    else:
        label_maps = [None] * number
    boxes = {image.id: boxes_of(image) for image in images}
    collages = []
    for index, (crops, label_map) in enumerate(zip(crops_of_collages, label_maps)):
        collages.append(make_collage(f"collages/{index:06}", crops, label_map, boxes))
    return collages


def count_positions(images: Sequence[AnnotatedImage], side: int) -> torch.Tensor:
    """Return the number of positions of a square in each image, float64 `(num_images,)`."""
    counts = []
    for image in images:
        height, width = image.size
        counts.append(max(height - side + 1, 0) * max(width - side + 1, 0))
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


def draw_crop(image: AnnotatedImage, side: int, generator: torch.Generator, turn: bool = True) -> Crop:
    """Draw a square of an image at a random position, and in a random orientation if `turn` is true."""
    height, width = image.size
    y = torch.randint(height - side + 1, (), generator=generator).item()
    x = torch.randint(width - side + 1, (), generator=generator).item()
    orientation = NO_TURN
    if turn:
        orientation = tuple(torch.randint(2, (3,), generator=generator).bool().tolist())
    return Crop(image, (x, y, x + side, y + side), orientation)


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
        slivers += [move_region(sliver, crop, corner) for sliver in window.slivers]
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
    starts_before_end = (boxes[:, :2] < crop.window[2:]).all(axis=1)
    ends_after_start = (boxes[:, 2:] > crop.window[:2]).all(axis=1)
    overlapping = np.flatnonzero(starts_before_end & ends_after_start)
    regions = tuple(crop.image.regions[index] for index in overlapping.tolist())
    return window_of(dataclasses.replace(crop.image, regions=regions), crop.window)


def move_region(region: Region, crop: Crop, corner: tuple[int, int]) -> Region:
    """Return a region of a crop's window in the collage."""
    x0, y0, x1, y1 = crop.turn_box(region.box)
    x, y = corner
    return dataclasses.replace(region, box=(x0 + x, y0 + y, x1 + x, y1 + y))


def compose_labels(crops_of_collages: Sequence[Sequence[Crop]]) -> list[LabelMap]:
    """Return the label map of each collage; each mask is read once."""
    canvases = [np.zeros(size_of_collage(crops), dtype=np.uint16) for crops in crops_of_collages]
    phrases = ()
    for image, placements in placements_by_image(crops_of_collages):
        numbers, phrases = image.mask()
        for index, crop, (x, y) in placements:
            height, width = crop.size
            canvases[index][y : y + height, x : x + width] = crop.turn_numbers(numbers)
    return [LabelMap(canvas, phrases) for canvas in canvases]


def placements_by_image(
    crops_of_collages: Sequence[Sequence[Crop]],
) -> Iterator[tuple[AnnotatedImage, list[tuple[int, Crop, tuple[int, int]]]]]:
    """Yield each image with its crops: index of the collage, crop, and position (left, top) in the collage."""
    placements = defaultdict(list)
    for index, crops in enumerate(crops_of_collages):
        for crop, corner in zip(crops, corners_of(crops)):
            placements[crop.image.id].append((index, crop, corner))
    for _, placements_of_image in sorted(placements.items()):
        _, crop, _ = placements_of_image[0]
        yield crop.image, placements_of_image


def encode_collages(collages: Iterable[Collage]) -> Iterator[list[dict]]:
    """Yield the encoded file of each collage for `datasets`: JPEG if all of its crops are from JPEGs, else PNG.

    Raises:
        ValueError: If an image does not have 8 bits; the message names it.
    """
    collages = iter(collages)
    while chunk := list(islice(collages, CHUNK)):
        for collage, (canvas, is_jpeg) in zip(chunk, paint_collages(chunk)):
            metadata = [describe_crop(crop) for crop in collage.crops]
            stem = collage.id.rpartition("/")[2]
            suffix = "jpg" if is_jpeg else "png"
            yield [{"bytes": encode_collage(canvas, metadata, is_jpeg), "path": f"{stem}.{suffix}"}]


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
        for index, crop, corner in placements:
            canvases[index].paste(crop.turn_picture(scene), corner)
            if not is_jpeg:
                are_jpegs[index] = False
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
            crops.append(image.crop((x, y, x + width, y + height)))
    return crops
