"""Instructions drawn while training: a new view of a labeled image, and a conversation about it, in every epoch.

A view is a crop of an image, a mosaic of crops of one image, or a collage of crops of several images. Each has a new
position, scale and orientation, and its answers are computed from the labels of its own pixels.
"""

import dataclasses
import hashlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from datasets import Dataset
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from ...data.annotations import AnnotatedImage, LabelMap
from ...image_decoding import PIL_8BIT_MODES, to_rgb
from ...images.reading import Window, is_tiff, read_image, windows
from ...input_spec import InputSpec
from ...vrl import keyed_generator
from .collages import (
    NO_TURN,
    Collage,
    Crop,
    boxes_of,
    compose_labels,
    corners_of,
    count_positions,
    draw_crop,
    draw_crops,
    make_collage,
)
from .questions import Asker, Exchange, balancing_rates, converse, draw_integer, draw_share, pick

CACHE_BYTES = 256 << 20  # Limit of the decoded images that a process keeps.
COLLAGE_IMAGES = 16  # Most images of a collage: each may have to be decoded for it.
MOSAIC_SIDE = 2  # Crops per side of a mosaic.
BALANCE_VIEWS = 500  # Number of views from which the rates of yes and no are estimated.
NUM_DRAWS = 2**62  # Numbers that distinguish the draws of an image.
MOST_DRAWS = 50  # Number of views after which an image is said to answer no question.
MAP_SHARE = 0.2  # Of the views of one image that are asked for a map; the others have a conversation in words.
MAP_KINDS = ("map", "fine_map")  # Kinds that are asked about collages.


@dataclass(frozen=True)
class ViewSettings:
    """Sizes and shares of the drawn views.

    Args:
        window: side of the views in pixels; the shorter side of each image if `None`.
        scale: lowest and highest random factor of the side.
        turn: whether views are drawn in one of eight orientations. Images whose label is not recomputed from the
            pixels, which have a class or a caption, are never turned.
        mosaics: share of mosaics among the views of one image.
        collages: number of collages for each view of one image.
        collage_grid: numbers of crops per side of a collage, one of which is drawn.
        collage_size: side of a collage in pixels, before the random factor.
    """

    window: int | None = None
    scale: tuple[float, float] = (0.8, 1.2)
    turn: bool = True
    mosaics: float = 0.0
    collages: float = 0.0
    collage_grid: tuple[int, ...] = (7,)
    collage_size: int = 448


class DrawnInstructions:
    """Sample transform that draws a view of a labeled image, and a conversation about it, for each row and epoch.

    Rows are those of [`rows`], and the draw depends on the generator alone.

    Args:
        images: labeled images of one layout.
        asker: questions about them.
        kinds: kinds of questions about views of one image. Collages are asked for their map.
        turns: maximum number of questions about a view.
        settings: sizes and shares of the views.
        spec: input spec of images that are not 8-bit RGB.
    """

    makes_images = True

    def __init__(
        self,
        images: Sequence[AnnotatedImage],
        asker: Asker,
        kinds: Sequence[str],
        turns: int = 5,
        settings: ViewSettings = ViewSettings(),
        spec: InputSpec | None = None,
    ):
        self.scenes = SceneCache(spec)
        self.images = [self._with_cached_mask(image) for image in images]
        self.asker = asker
        self.kinds = list(kinds)
        self.turns = turns
        self.view_settings = settings
        self.map_kinds = [kind for kind in MAP_KINDS if kind in kinds]
        self.word_kinds = [kind for kind in kinds if kind not in MAP_KINDS]
        self.collage_share = 0.0
        self.map_share = 0.0
        if self.map_kinds:
            self.collage_share = settings.collages / (1 + settings.collages)
            self.map_share = MAP_SHARE if self.word_kinds else 1.0
        self.settings = {
            **dataclasses.asdict(settings),
            "kinds": self.kinds,
            "turns": turns,
            "max_boxes": asker.max_boxes,
            "map_side": asker.map_side,
            "wordings": asker.wordings,
            "seed": asker.seed,
        }
        self.rates = self._presence_rates() if "presence" in kinds else {}

    def _with_cached_mask(self, image: AnnotatedImage) -> AnnotatedImage:
        if image.mask is None:
            return image
        # A partial object can be pickled for worker processes, a lambda cannot.
        return dataclasses.replace(image, mask=partial(self.scenes.labels, image))

    def _presence_rates(self) -> dict[tuple[str | None, str], float]:
        """Return the shares of yes and no to keep for each class, estimated from drawn views."""
        generator = keyed_generator(self.asker.seed, "balance")
        number = min(BALANCE_VIEWS, 20 * len(self.images))
        indices = torch.randint(len(self.images), (number,), generator=generator)
        exchanges = []
        for index in indices.tolist():
            view = self.draw_view(self.images[index], generator)
            exchanges += self.asker.ask("presence", view)
        return balancing_rates(exchanges)

    def __call__(self, example: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        view, exchanges = self.draw(example, generator)
        return {
            "images": self.scenes.render(view),
            "messages": messages_of(exchanges),
        }

    def messages(self, example: dict[str, Any], generator: torch.Generator) -> list[dict[str, str]]:
        """Return the conversation of a draw, without reading its pixels."""
        _, exchanges = self.draw(example, generator)
        return messages_of(exchanges)

    def draw(self, example: dict[str, Any], generator: torch.Generator) -> tuple[Collage, list[Exchange]]:
        """Draw a view and its conversation. A view that answers no question is drawn again.

        Raises:
            ValueError: if no view of the image answers a question.
        """
        image = self.images[example["image_index"]]
        for _ in range(MOST_DRAWS):
            is_collage = draw_share(generator) < self.collage_share
            if is_collage:
                view = self.draw_collage(generator)
            else:
                view = self.draw_view(image, generator)
            # A map is asked alone, so that its k-th word is always as far from the k-th visual token.
            is_map = is_collage or draw_share(generator) < self.map_share
            if is_map:
                map_kind = pick(self.map_kinds, generator)
                exchanges = self.asker.ask(map_kind, view)
            else:
                exchanges = converse(
                    view,
                    self.asker,
                    kinds=self.word_kinds,
                    turns=self.turns,
                    rates=self.rates,
                )
            if exchanges:
                return view, exchanges
        raise ValueError(
            f"{MOST_DRAWS} views of {image.id!r} answer no question of the kinds {', '.join(self.kinds)}. Add kinds, "
            "such as presence or fine_map, or leave the image out."
        )

    def draw_view(
        self,
        image: AnnotatedImage,
        generator: torch.Generator,
        is_mosaic_allowed: bool = True,
    ) -> Collage:
        """Draw a view of one image: a crop, or a mosaic of smaller crops."""
        # The number of the draw is part of the id, on which the questions about the view depend.
        view_id = f"{image.id}@{draw_integer(NUM_DRAWS, generator)}"
        if image.captions:  # Captions are about the whole image.
            return self._whole_view(view_id, image)
        full_side = self.view_settings.window or min(image.size)
        side = self._draw_side(full_side, generator)
        side = max(min(side, *image.size), 1)
        # The number is drawn for every image, so that further draws do not depend on whether a mosaic is possible.
        is_mosaic = draw_share(generator) < self.view_settings.mosaics
        if not is_mosaic_allowed or image.labels is not None or side < MOSAIC_SIDE:
            is_mosaic = False
        grid = MOSAIC_SIDE if is_mosaic else 1
        has_captions = any(region.caption for region in image.regions)
        has_fixed_labels = image.labels is not None or has_captions
        turn = self.view_settings.turn and not has_fixed_labels
        crops = [draw_crop(image, side // grid, generator, turn) for _ in range(grid**2)]
        view = self._assemble(view_id, crops)
        return dataclasses.replace(view, labels=image.labels)

    def _whole_view(self, view_id: str, image: AnnotatedImage) -> Collage:
        """Return the whole image as a view with one crop, and with all labels of the image."""
        height, width = image.size
        window = (0, 0, width, height)
        crop = Crop(image, window, NO_TURN)
        fields = {**vars(image), "id": view_id}
        return Collage(**fields, crops=(crop,))

    def fixed_views(self, image: AnnotatedImage, overlap: int) -> list[Collage]:
        """Return the windows that cover an image, as views that are not turned; the whole image without `window`."""
        height, width = image.size
        views = []
        for window in self._windows(image, overlap):
            if window is None:
                window = (0, 0, width, height)
            x, y, _, _ = window
            crop = Crop(image, window, NO_TURN)
            view = self._assemble(f"{image.id}/{x}_{y}", [crop])
            view = dataclasses.replace(view, labels=image.labels, captions=image.captions)
            views.append(view)
        return views

    def draw_collage(self, generator: torch.Generator) -> Collage:
        """Draw a collage of crops of at most `COLLAGE_IMAGES` images."""
        grid = pick(self.view_settings.collage_grid, generator)
        collage_side = self._draw_side(self.view_settings.collage_size, generator)
        side = max(collage_side // grid, 1)
        order = torch.randperm(len(self.images), generator=generator)
        indices = order[:COLLAGE_IMAGES].tolist()
        candidates = [self.images[index] for index in indices]
        largest_crop = max(min(image.size) for image in candidates)
        side = min(side, largest_crop)
        position_counts = count_positions(candidates, side)
        crops = draw_crops(
            candidates,
            position_counts,
            grid=grid,
            side=side,
            generator=generator,
            turn=self.view_settings.turn,
        )
        return self._assemble(f"collage@{draw_integer(NUM_DRAWS, generator)}", crops)

    def _windows(self, image: AnnotatedImage, overlap: int) -> list[Window | None]:
        """Return the windows that cover an image, or `[None]` if it is used as a whole."""
        window = self.view_settings.window
        is_whole = window is None or image.labels is not None or image.captions
        return [None] if is_whole else windows(image.size, window, overlap)

    def _draw_side(self, side: int, generator: torch.Generator) -> int:
        lowest, highest = self.view_settings.scale
        factor = lowest + (highest - lowest) * draw_share(generator)
        return round(side * factor)

    def _assemble(self, view_id: str, crops: list[Crop]) -> Collage:
        labels = None
        if crops[0].image.mask is not None:
            (labels,) = compose_labels([crops])
        boxes = {}
        for crop in crops:
            if crop.image.id not in boxes:
                boxes[crop.image.id] = boxes_of(crop.image)
        return make_collage(view_id, crops, labels, boxes)

    def rows(self) -> Dataset:
        """Return the rows of an epoch: one for each window of an image, and further ones for the share of collages.

        Columns: `id`, `image_index`, and `labels`, a hash of the image's labels, by which resumed runs see changes.
        """
        columns = {
            "id": [],
            "image_index": [],
            "labels": [],
        }
        exact_total = 0.0
        for index, image in enumerate(self.images):
            num_windows = len(self._windows(image, overlap=0))
            exact_total += num_windows / (1 - self.collage_share)
            # The sum over the images is rounded, not the number of each image, because most have few windows.
            number = round(exact_total) - len(columns["id"])
            digest = labels_digest(image)
            for repeat in range(number):
                columns["id"].append(f"{image.id}#{repeat}")
                columns["image_index"].append(index)
                columns["labels"].append(digest)
        return Dataset.from_dict(columns)


class SceneCache:
    """Decoded images and masks, of which the last used ones are kept.

    Args:
        spec: input spec of images that are not 8-bit RGB.
    """

    def __init__(self, spec: InputSpec | None = None):
        self.spec = spec
        self._stored: OrderedDict[tuple, Any] = OrderedDict()
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are not forked start with an empty cache.
        return {
            "spec": self.spec,
            "_stored": OrderedDict(),
            "_bytes": 0,
        }

    def render(self, view: Collage) -> list[Image.Image | np.ndarray]:
        """Return the picture of a view, or the two pictures of a pair.

        Returns:
            RGB pictures, or arrays of shape `(bands, height, width)` of images with more bits or other bands.

        Raises:
            ValueError: if the images of a collage differ in bands or bits.
        """
        paths = view.crops[0].image.paths
        number = max(len(paths), 1)
        return [self._render(view, index) for index in range(number)]

    def _render(self, view: Collage, path_index: int) -> Image.Image | np.ndarray:
        canvas = None
        for crop, (x, y) in zip(view.crops, corners_of(view.crops)):
            window_pixels = self._read_window(crop.image, path_index, crop.window)
            pixels = crop.orient(window_pixels)
            height, width, bands = pixels.shape
            if canvas is None:
                canvas = np.zeros((*view.size, bands), dtype=pixels.dtype)
            if (bands, pixels.dtype) != (canvas.shape[2], canvas.dtype):
                raise ValueError(
                    f"{crop.image.paths[path_index]} has {bands} bands of {pixels.dtype}, and another image of the "
                    f"collage has {canvas.shape[2]} of {canvas.dtype}. Set collages: 0 for images of several types."
                )
            canvas[y : y + height, x : x + width] = pixels
        is_rgb = canvas.dtype == np.uint8 and canvas.shape[2] == 3
        if is_rgb:
            return Image.fromarray(canvas)
        return np.ascontiguousarray(canvas.transpose(2, 0, 1))

    def _read_window(self, image: AnnotatedImage, path_index: int, window: Window) -> np.ndarray:
        """Return a part of an image, `(height, width, bands)`. Of a large TIFF, only the part is read."""
        x0, y0, x1, y1 = window
        if image.window is not None:
            x, y, _, _ = image.window
            x0 += x
            y0 += y
            x1 += x
            y1 += y
        path = image.paths[path_index]
        if image.picture is not None:
            key = (path_index, image.id)
        else:
            height, width = image.size
            is_large = height * width > CACHE_BYTES // 16
            if is_large and is_tiff(path):
                return to_array(read_image(path, (x0, y0, x1, y1), self.spec))
            key = (path_index, path)
        pixels = self._get(key, lambda: to_array(self._read(image, path)))
        return pixels[y0:y1, x0:x1]

    def _read(self, image: AnnotatedImage, path: Path) -> Image.Image | np.ndarray:
        if image.picture is not None:
            return image.picture()
        return read_image(path, None, self.spec)

    def labels(self, image: AnnotatedImage) -> LabelMap:
        """Return the label map of an image."""
        return self._get(("labels", image.id), image.mask)

    def _get(self, key: tuple, read: Callable[[], np.ndarray | LabelMap]) -> np.ndarray | LabelMap:
        """Return a cached array or label map; if it is not cached, read it, and forget the least recently used ones."""
        if key in self._stored:
            self._stored.move_to_end(key)
            return self._stored[key]
        pixels = read()
        self._stored[key] = pixels
        self._bytes += number_of_bytes(pixels)
        while self._bytes > CACHE_BYTES and len(self._stored) > 1:
            _, oldest_pixels = self._stored.popitem(last=False)
            self._bytes -= number_of_bytes(oldest_pixels)
        return pixels


def number_of_bytes(pixels: np.ndarray | LabelMap) -> int:
    if isinstance(pixels, LabelMap):
        return pixels.numbers.nbytes
    return pixels.nbytes


def to_array(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Return a picture as an array `(height, width, bands)`; 8-bit pictures are converted to RGB."""
    if isinstance(picture, Image.Image) and picture.mode in PIL_8BIT_MODES:
        picture = to_rgb(picture)
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return pixels


def encode_picture(picture: Image.Image | np.ndarray) -> dict[str, Any]:
    """Return a rendered picture as an encoded image of a row: a PNG, or a TIFF of arrays."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    bands, height, width = picture.shape
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff",
            count=bands,
            height=height,
            width=width,
            dtype=picture.dtype,
            photometric="minisblack",
        ) as file:
            file.write(picture)
        return {"bytes": memory.read(), "path": None}


def messages_of(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    messages = []
    for exchange in exchanges:
        messages += exchange.messages
    return messages


def labels_digest(image: AnnotatedImage) -> str:
    """Return a hash of the labels of an image, including the pixels of its mask, and of the state of its files."""
    file_states = []
    for path in image.paths:
        status = path.stat()
        file_states.append((path.name, status.st_size, status.st_mtime_ns))
    labels = (image.size, image.regions, image.labels, image.captions, file_states)
    digest = hashlib.sha256(repr(labels).encode())
    if image.mask is not None:
        numbers, phrases = image.mask()
        digest.update(repr(phrases).encode())
        digest.update(numbers.tobytes())
    return digest.hexdigest()[:16]
