"""Instructions drawn while training: a new view of a labeled image, and a conversation about it, in every epoch.

A view is a crop of an image, a mosaic of crops of one image, or a collage of crops of several images. Each has a new
position, scale and orientation, and its answers are computed from the labels of its own pixels.
"""

import dataclasses
import hashlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from .collages import Collage, Crop, boxes_of, compose_labels, corners_of, draw_crop, make_collage
from .questions import Asker, Exchange, balancing_rates, converse, pick

CACHE_BYTES = 256 << 20  # Limit of the decoded images that a process keeps.
COLLAGE_IMAGES = 16  # Most images of a collage: each may have to be decoded for it.
MOSAIC_SIDE = 2  # Crops per side of a mosaic.
BALANCE_VIEWS = 500  # Number of views from which the rates of yes and no are estimated.
MOST_DRAWS = 50  # Number of views after which an image is said to answer no question.
MAP_SHARE = 0.2  # Of the views of one image that are asked for a map; the others have a conversation in words.
MAP_KINDS = ("map", "fine_map")  # Kinds that are asked about collages.
NO_TURN = (False, False, False)


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
        self.asker, self.kinds, self.turns, self.view_settings = asker, list(kinds), turns, settings
        self.map_kinds = [kind for kind in MAP_KINDS if kind in kinds]
        self.word_kinds = [kind for kind in kinds if kind not in MAP_KINDS]
        self.collage_share = settings.collages / (1 + settings.collages) if self.map_kinds else 0.0
        self.map_share = 0.0 if not self.map_kinds else MAP_SHARE if self.word_kinds else 1.0
        self.settings = dataclasses.asdict(settings) | {
            "kinds": self.kinds,
            "turns": turns,
            "max_boxes": asker.max_boxes,
            "map_side": asker.map_side,
            "wordings": asker.wordings,
            "seed": asker.seed,
        }
        self.rates = self._presence_rates() if "presence" in kinds else {}

    def _with_cached_mask(self, image: AnnotatedImage) -> AnnotatedImage:
        return image if image.mask is None else dataclasses.replace(image, mask=partial(self.scenes.labels, image))

    def _presence_rates(self) -> dict[tuple[str | None, str], float]:
        """Return the shares of yes and no to keep for each class, estimated from drawn views."""
        generator = keyed_generator(self.asker.seed, "balance")
        number = min(BALANCE_VIEWS, 20 * len(self.images))
        chosen = torch.randint(len(self.images), (number,), generator=generator).tolist()
        views = [self.draw_view(self.images[index], generator) for index in chosen]
        return balancing_rates(exchange for view in views for exchange in self.asker.ask("presence", view))

    def __call__(self, example: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        view, exchanges = self.draw(example, generator)
        return {"images": self.scenes.render(view), "messages": messages_of(exchanges)}

    def messages(self, example: dict[str, Any], generator: torch.Generator) -> list[dict[str, str]]:
        """Return the conversation of a draw, without reading its pixels."""
        return messages_of(self.draw(example, generator)[1])

    def draw(self, example: dict[str, Any], generator: torch.Generator) -> tuple[Collage, list[Exchange]]:
        """Draw a view and its conversation. A view that answers no question is drawn again.

        Raises:
            ValueError: if no view of the image answers a question.
        """
        image = self.images[example["image_index"]]
        for _ in range(MOST_DRAWS):
            is_collage = torch.rand((), generator=generator).item() < self.collage_share
            view = self.draw_collage(generator) if is_collage else self.draw_view(image, generator)
            # A map is asked alone, so that its k-th word is always as far from the k-th visual token.
            is_map = is_collage or torch.rand((), generator=generator).item() < self.map_share
            if is_map:
                exchanges = self.asker.ask(pick(self.map_kinds, generator), view)
            else:
                exchanges = converse(view, self.asker, self.word_kinds, self.turns, self.rates)
            if exchanges:
                return view, exchanges
        raise ValueError(
            f"{MOST_DRAWS} views of {image.id!r} answer no question of the kinds {', '.join(self.kinds)}. Add kinds, "
            "such as presence or fine_map, or leave the image out."
        )

    def draw_view(self, image: AnnotatedImage, generator: torch.Generator, is_mosaic_allowed: bool = True) -> Collage:
        """Draw a view of one image: a crop, or a mosaic of smaller crops."""
        view_id = f"{image.id}@{draw_number(generator)}"
        if image.captions:  # which are about the whole image
            height, width = image.size
            crop = Crop(image, (0, 0, width, height), NO_TURN)
            return Collage(crops=(crop,), **{**vars(image), "id": view_id})
        side = self._draw_side(self.view_settings.window or min(image.size), generator)
        side = max(min(side, *image.size), 1)
        is_mosaic = torch.rand((), generator=generator).item() < self.view_settings.mosaics
        is_mosaic &= is_mosaic_allowed and image.label is None and side >= MOSAIC_SIDE
        grid = MOSAIC_SIDE if is_mosaic else 1
        has_fixed_labels = image.label is not None or any(region.caption for region in image.regions)
        turn = self.view_settings.turn and not has_fixed_labels
        crops = [draw_crop(image, side // grid, generator, turn) for _ in range(grid**2)]
        return dataclasses.replace(self._assemble(view_id, crops), label=image.label)

    def fixed_views(self, image: AnnotatedImage, overlap: int) -> list[Collage]:
        """Return the windows that cover an image, as views that are not turned; the whole image without `window`."""
        height, width = image.size
        views = []
        for area in self._window_areas(image, overlap):
            left, top, right, bottom = area or (0, 0, width, height)
            view = self._assemble(f"{image.id}/{left}_{top}", [Crop(image, (left, top, right, bottom), NO_TURN)])
            views.append(dataclasses.replace(view, label=image.label, captions=image.captions))
        return views

    def draw_collage(self, generator: torch.Generator) -> Collage:
        """Draw a collage of crops of at most `COLLAGE_IMAGES` images."""
        grids = self.view_settings.collage_grid
        grid = grids[torch.randint(len(grids), (), generator=generator).item()]
        side = max(self._draw_side(self.view_settings.collage_size, generator) // grid, 1)
        order = torch.randperm(len(self.images), generator=generator)[:COLLAGE_IMAGES].tolist()
        candidates = [self.images[index] for index in order]
        side = min(side, max(min(image.size) for image in candidates))
        areas = [
            max(image.size[0] - side + 1, 0) * max(image.size[1] - side + 1, 0) for image in candidates
        ]  # the number of positions of a crop
        weights = torch.tensor(areas, dtype=torch.float64)
        chosen = torch.multinomial(weights, grid**2, replacement=True, generator=generator).tolist()
        crops = [draw_crop(candidates[index], side, generator, self.view_settings.turn) for index in chosen]
        return self._assemble(f"collage@{draw_number(generator)}", crops)

    def _window_areas(self, image: AnnotatedImage, overlap: int) -> list[Window | None]:
        """Return the windows that cover an image, or `[None]` if it is used as a whole."""
        window = self.view_settings.window
        has_windows = window is not None and image.label is None and not image.captions
        return windows(image.size, window, overlap) if has_windows else [None]

    def _draw_side(self, side: int, generator: torch.Generator) -> int:
        low, high = self.view_settings.scale
        return round(side * (low + (high - low) * torch.rand((), generator=generator).item()))

    def _assemble(self, view_id: str, crops: list[Crop]) -> Collage:
        labels = compose_labels([crops])[0] if crops[0].image.mask is not None else None
        images = {crop.image.id: crop.image for crop in crops}
        boxes = {image_id: boxes_of(image) for image_id, image in images.items()}
        return make_collage(view_id, crops, labels, boxes)

    def rows(self) -> Dataset:
        """Return the rows of an epoch: one for each window of an image, and further ones for the share of collages.

        Columns: `id`, `image_index`, and `labels`, a hash of the image's labels, by which resumed runs see changes.
        """
        ids, indices, labels = [], [], []
        exact_total = 0.0
        for index, image in enumerate(self.images):
            exact_total += len(self._window_areas(image, 0)) / (1 - self.collage_share)
            number = round(exact_total) - len(ids)  # rounded for all images together, because most have few windows
            digest = labels_digest(image)
            for repeat in range(number):
                ids.append(f"{image.id}#{repeat}")
                indices.append(index)
                labels.append(digest)
        return Dataset.from_dict({"id": ids, "image_index": indices, "labels": labels})


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
        return {"spec": self.spec, "_stored": OrderedDict(), "_bytes": 0}  # for worker processes that are not forked

    def render(self, view: Collage) -> list[Image.Image | np.ndarray]:
        """Return the picture of a view, or the two pictures of a pair.

        Returns:
            RGB pictures, or arrays of shape `(bands, height, width)` of images with more bits or other bands.

        Raises:
            ValueError: if the images of a collage differ in bands or bits.
        """
        number = max(len(view.crops[0].image.paths), 1)
        return [self._render(view, index) for index in range(number)]

    def _render(self, view: Collage, path_index: int) -> Image.Image | np.ndarray:
        canvas = None
        for crop, (left, top) in zip(view.crops, corners_of(view.crops)):
            pixels = crop.orient(self._window(crop.image, path_index, crop.window))
            height, width, bands = pixels.shape
            if canvas is None:
                canvas = np.zeros((*view.size, bands), dtype=pixels.dtype)
            if (bands, pixels.dtype) != (canvas.shape[2], canvas.dtype):
                raise ValueError(
                    f"{crop.image.paths[path_index]} has {bands} bands of {pixels.dtype}, and another image of the "
                    f"collage has {canvas.shape[2]} of {canvas.dtype}. Set collages: 0 for images of several types."
                )
            canvas[top : top + height, left : left + width] = pixels
        is_rgb = canvas.dtype == np.uint8 and canvas.shape[2] == 3
        return Image.fromarray(canvas) if is_rgb else np.ascontiguousarray(canvas.transpose(2, 0, 1))

    def _window(self, image: AnnotatedImage, path_index: int, window: Window) -> np.ndarray:
        """Return a part of an image, `(height, width, bands)`. Of a large TIFF, only the part is read."""
        if image.window is not None:
            left, top = image.window[:2]
            window = (window[0] + left, window[1] + top, window[2] + left, window[3] + top)
        path = image.paths[path_index]
        is_large = image.picture is None and image.size[0] * image.size[1] > CACHE_BYTES // 16 and is_tiff(path)
        if is_large:
            return to_array(read_image(path, window, self.spec))
        key = (path_index, image.id if image.picture is not None else path)
        pixels = self._get(key, lambda: to_array(self._read(image, path)))
        left, top, right, bottom = window
        return pixels[top:bottom, left:right]

    def _read(self, image: AnnotatedImage, path) -> Image.Image | np.ndarray:
        return read_image(path, None, self.spec) if image.picture is None else image.picture()

    def labels(self, image: AnnotatedImage) -> LabelMap:
        """Return the label map of an image."""
        return self._get(("labels", image.id), image.mask)

    def _get(self, key: tuple, read) -> Any:
        if key in self._stored:
            self._stored.move_to_end(key)
            return self._stored[key]
        value = self._stored[key] = read()
        self._bytes += number_of_bytes(value)
        while self._bytes > CACHE_BYTES and len(self._stored) > 1:
            self._bytes -= number_of_bytes(self._stored.popitem(last=False)[1])
        return value


def number_of_bytes(value: np.ndarray | LabelMap) -> int:
    return value.numbers.nbytes if isinstance(value, LabelMap) else value.nbytes


def to_array(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Return a picture as an array `(height, width, bands)`; 8-bit pictures are converted to RGB."""
    if isinstance(picture, Image.Image) and picture.mode in PIL_8BIT_MODES:
        picture = to_rgb(picture)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode_picture(picture: Image.Image | np.ndarray) -> dict[str, Any]:
    """Return a rendered picture as an encoded image of a row: a PNG, or a TIFF of arrays."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    bands, height, width = picture.shape
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        shape = {"count": bands, "height": height, "width": width}
        with memory.open(driver="GTiff", dtype=picture.dtype, photometric="minisblack", **shape) as file:
            file.write(picture)
        return {"bytes": memory.read(), "path": None}


def draw_number(generator: torch.Generator) -> int:
    """Return a number that names a draw, so that its questions are drawn anew."""
    return torch.randint(2**62, (), generator=generator).item()


def messages_of(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    return [message for exchange in exchanges for message in exchange.messages]


def labels_digest(image: AnnotatedImage) -> str:
    """Return a hash of the labels of an image, including the pixels of its mask, and of the state of its files."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in image.paths]
    labels = (image.size, image.regions, image.label, image.captions, states)
    digest = hashlib.sha256(repr(labels).encode())
    if image.mask is not None:
        numbers, phrases = image.mask()
        digest.update(repr(phrases).encode() + numbers.tobytes())
    return digest.hexdigest()[:16]
