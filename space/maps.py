"""Maps of a backbone's patch features and attention: settings, computation by one or two backbones, and drawing.

An image is resized to whole patches at its own aspect ratio, so that a map of `(rows, columns)` spans all of it.
Images are uint8 RGB of shape `(height, width, 3)`, or, as the input of a model with other bands, float32 of shape
`(height, width, bands)` in [0, 1]. Features are float32 of shape `(channels, rows, columns)`. Points are fractions of
the image from the left and from the top, and patches are given as row and column.
"""

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from answers import PROGRESS
from computing import turn
from loading import RANDOM, LoadedBackbone, Models
from matplotlib import colormaps
from matplotlib.colors import Normalize
from PIL import Image, ImageColor, ImageDraw
from reading import UNADJUSTED, Adjustment, in_colors
from torch.nn import functional as F
from uploading import open_pixels

from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

PCA, FOREGROUND, SEGMENTS = "Features as colors", "Foreground as colors", "Segments"
SIMILARITY = "Similarity to the point"
ATTENTION, HEADS, ROLLOUT = "Attention", "Attention of every head", "Attention through all layers"
EXPLANATIONS = {
    PCA: "Patches with similar colors have similar features. No label was used.",
    FOREGROUND: "The colors of the patches that differ most from those at the border.",
    SEGMENTS: "Groups of patches with similar features, found by k-means: each belongs to the nearest of a few means.",
    SIMILARITY: "The brighter a patch, the more similar are its features to those at the point (cosine similarity). "
    "Boxes mark the most similar patches. The maps follow the mouse; a click keeps its point.",
    ATTENTION: "Attention is the weight with which a token reads each patch, in one head of a layer or their mean.",
    HEADS: "Each head of a layer reads the patches with its own weights.",
    ROLLOUT: "Rollout: the attention of all layers, multiplied. It estimates how much of each patch reaches the token "
    "in the last layer.",
}
KINDS = list(EXPLANATIONS)
OF_ATTENTION = (ATTENTION, HEADS, ROLLOUT)
FROM_CLS, FROM_POINT = "CLS token", "the point"
NO_BACKBONE, TWIN = "none", "the same with random weights"
MIN_RESOLUTION, MAX_RESOLUTION = 4, 48
OPACITY = 0.75
INFERNO, CIVIDIS = COLOR_MAPS = ["inferno", "cividis"]  # cividis looks the same with and without color blindness
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#444444")  # Okabe and Ito
BOX_COLOR = "#00e5ff"  # not a color of the color maps
DISPLAY_SIDE = 768
PACKED_BYTES = 100_000


@dataclass(frozen=True)
class View:
    """Settings of a map, with the values of the page's controls in their order.

    Args:
        kind: one of `KINDS`.
        layer, second_layer: layer of each backbone, from 1; the last layer if empty or out of range.
        head: attention head, from 1; 0 for the mean over heads.
        source: token whose attention is shown, `FROM_CLS` or `FROM_POINT`.
        x, y: the point, in percent from the left and from the top.
        resolution: patches along the longer side of the image.
        opacity: opacity of the map over the image.
        colors: one of `COLOR_MAPS`.
        is_smooth: whether values are interpolated between patches (bicubic) before they are colored.
        component: principal component, from 1; 0 for the first three as red, green and blue.
        segments: number of segments, at most 8.
        boxes: number of most similar patches to mark.
        adjustment: settings for reading the image.
    """

    kind: str
    layer: int | None = None
    second_layer: int | None = None
    head: int = 0
    source: str = FROM_CLS
    x: float = 50.0
    y: float = 50.0
    resolution: int = 16
    opacity: float = OPACITY
    colors: str = INFERNO
    is_smooth: bool = False
    component: int = 0
    segments: int = 5
    boxes: int = 0
    adjustment: Adjustment = UNADJUSTED

    @property
    def point(self) -> tuple[float, float]:
        return self.x / 100, self.y / 100

    @property
    def has_point(self) -> bool:
        return self.kind == SIMILARITY or (self.kind in OF_ATTENTION and self.source == FROM_POINT)

    def refined(self, values: torch.Tensor, image: np.ndarray) -> torch.Tensor:
        return smoothed(values, image) if self.is_smooth else values

    def values(self, backbone: LoadedBackbone, layer: int, image: np.ndarray, features: torch.Tensor) -> torch.Tensor:
        """Compute the map, of shape `(rows, columns)`, or `(n, rows, columns)` for principal scores and all heads."""
        place = patch_at(self.point, *features.shape[1:])
        if self.kind == PCA:
            return principal_scores(features, self.component)[-1:] if self.component else principal_scores(features)
        if self.kind == FOREGROUND:
            return foreground_scores(features)
        if self.kind == SEGMENTS:
            return segment_labels(features, self.segments)
        if self.kind == SIMILARITY:
            return similarity_to_point(features, *place)
        query = place if self.source == FROM_POINT else None
        if self.kind == ROLLOUT:
            return rollout_map(backbone, image, self.resolution, query)
        heads = attention_heads(backbone, image, self.resolution, layer, query)
        if self.kind == HEADS:
            return heads
        return heads[min(self.head, backbone.heads) - 1] if self.head else heads.mean(0)


class Seen(NamedTuple):
    """Map of an image by one backbone."""

    name: str
    layer: int
    backbone: LoadedBackbone
    features: torch.Tensor
    values: torch.Tensor
    """Result of [`View.values`]."""
    picture: Image.Image | None = None
    """Map in colors, over the image."""
    meaning: str = ""
    """Meaning of the colors."""

    def title(self, kind: str) -> str:
        return self.name + (", all layers" if kind == ROLLOUT else f", layer {self.layer} of {self.backbone.depth}")


class Opened(NamedTuple):
    """Image opened for a backbone: for display, as its input, and a note."""

    rgb: np.ndarray
    pixels: np.ndarray
    note: str


@lru_cache(maxsize=16)
def image_of(models: Models, path: str, name: str, adjustment: Adjustment = UNADJUSTED) -> Opened:
    one = models.backbone(name)
    pixels, note = open_pixels(path, input_spec=one.input_spec, adjustment=adjustment)
    return Opened(in_colors(pixels, one.band_names), pixels, note)


@lru_cache(maxsize=16)
def features_of(
    models: Models, path: str, name: str, resolution: int, layer: int, adjustment: Adjustment = UNADJUSTED
) -> torch.Tensor:
    return patch_features(models.backbone(name), image_of(models, path, name, adjustment).pixels, resolution, layer)


def chosen(first: str, second: str | None) -> list[str]:
    """Return the names of the selected backbones."""
    if second == TWIN:
        second = first.removesuffix(RANDOM) + RANDOM
    return [first] + [second] * (second not in (None, "", NO_BACKBONE))


def look(
    models: Models, path: str, names: Sequence[str], view: View, progress: Callable = PROGRESS
) -> Iterator[list[Seen]]:
    """Yield the list of maps of an image after each backbone."""
    opened, seen = [], []
    for index, name in enumerate(names):
        progress((index, 2 * len(names)), desc=f"Opening {name}")
        opened.append(models.backbone(name))
    with turn(progress):
        for index, (name, one) in enumerate(zip(names, opened)):
            progress((len(names) + index, 2 * len(names)), desc=f"Computing with {name}")
            layer = min((view.layer, view.second_layer)[index] or one.depth, one.depth)
            features = features_of(models, path, name, view.resolution, layer, view.adjustment)
            pixels = image_of(models, path, name, view.adjustment).pixels
            seen.append(Seen(name, layer, one, features, view.values(one, layer, pixels, features)))
            drawn = draw(view, [one.values for one in seen], image_of(models, path, names[0], view.adjustment).rgb)
            yield [one._replace(picture=picture, meaning=meaning) for one, (picture, meaning) in zip(seen, drawn)]


def draw(view: View, maps: list[torch.Tensor], image: np.ndarray) -> list[tuple[Image.Image, str]]:
    """Draw each map over the image and return the pictures with their meaning. PCA maps share their colors."""
    own = "red, green and blue are the first three principal components (PCA)"
    if view.kind == PCA and not view.component:
        maps = [maps[0], *(align_scores(other, maps[0]) for other in maps[1:])]
        pictures = [draw_map(colors_of(view.refined(one, image)), image, opacity=view.opacity) for one in maps]
        return list(zip(pictures, [own, f"{own}, rotated to match those of the first backbone"]))
    if view.kind == FOREGROUND:
        return [(draw_foreground(one, image, view), f"{own} of the foreground; the rest is gray") for one in maps]
    if view.kind == SEGMENTS:
        return [(draw_segments(one, image, view), f"{int(one.max()) + 1} segments") for one in maps]
    if view.kind == HEADS:
        meaning = "each head from its minimum (dark) to its maximum (bright)"
        return [(draw_heads(one, image, view), meaning) for one in maps]
    return [heat_map(one, image, view) for one in maps]


def heat_map(values: torch.Tensor, image: np.ndarray, view: View, has_point: bool = True) -> tuple[Image.Image, str]:
    """Draw a map of one value a patch, of the image with the point or another, and return picture and meaning."""
    if view.kind == PCA:
        values, low, high = values[0], -2.0, 2.0
    else:
        low, high = values.min().item(), 1.0 if view.kind == SIMILARITY else values.max().item()
    point = view.point if view.has_point and has_point else None
    picture = draw_map(heat_of(view.refined(values, image), low, high, view.colors), image, point, view.opacity)
    if view.kind == SIMILARITY:
        rows, columns = values.shape
        places = most_similar(values, view.boxes, patch_at(point, rows, columns) if point else None)
        windows = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y, x in places]
        picture = boxed(picture, windows, BOX_COLOR)
    unit = f" standard deviations of principal component {view.component} (PCA)" if view.kind == PCA else ""
    return picture, f"from dark, {low:.3g}, to bright, {high:.3g}{unit}"


def draw_foreground(scores: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw the colors of the foreground; the background shows the image in gray."""
    inside, scores = Image.fromarray(scores[0].isfinite().numpy()), scores.nan_to_num()
    colored = draw_map(colors_of(view.refined(scores, image)), image, opacity=view.opacity)
    gray = draw_map(np.zeros((1, 1, 3), np.uint8), image, opacity=0.0)
    return Image.composite(colored, gray, inside.resize(colored.size, Image.Resampling.NEAREST))


def draw_segments(labels: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw each segment in a color of its own."""
    if view.is_smooth:
        labels = smoothed(F.one_hot(labels).movedim(-1, 0), image).argmax(0)
    colors = np.array([ImageColor.getrgb(color) for color in PALETTE], dtype=np.uint8)
    return draw_map(colors[labels.numpy()], image, opacity=view.opacity)


def draw_heads(values: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw the maps of all heads on a numbered sheet. Each map has its own color range."""
    columns = math.ceil(math.sqrt(len(values)))
    width, height = (max(1, side // columns) for side in display_size(image))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(values) / columns) * height))
    for index, one in enumerate(values):
        colors = heat_of(view.refined(one, image), one.min().item(), one.max().item(), view.colors)
        small = draw_map(colors, image, opacity=view.opacity).resize((width, height), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(small)
        pen.text((4, 2), str(index + 1), fill="white", stroke_width=2, stroke_fill="black", font_size=18)
        sheet.paste(small, (index % columns * width, index // columns * height))
    return sheet


def grid_of(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return rows and columns of patches of an image, with `resolution` patches along its longer side."""
    longer = max(height, width)
    return max(1, round(resolution * height / longer)), max(1, round(resolution * width / longer))


def pixel_values(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the normalized pixels of whole patches, of shape `(1, bands, height, width)`, on the backbone's device.

    Args:
        resolution: patches along the longer side.
        grid: rows and columns of patches, in place of `resolution`.
    """
    (rows, columns), (patch_height, patch_width) = grid or grid_of(*image.shape[:2], resolution), backbone.patch
    size = {"height": rows * patch_height, "width": columns * patch_width}
    options = {"size": size, "crop_to_patches": False, "return_tensors": "pt"}
    inputs = backbone.image_processor(image, input_data_format="channels_last", **options)
    return inputs["pixel_values"].to(backbone.model.device, backbone.model.dtype)


def patch_features(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    layer: int | None = None,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the patch features after a layer, from 1. Those of the last one, the default, are `last_hidden_state`."""
    return backbone.states(pixel_values(backbone, image, resolution, grid), layer or backbone.depth).float().cpu()


def attention_heads(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, layer: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the attention to the patches in a layer, from 1, float32 of shape `(heads, rows, columns)`.

    Args:
        query: the attending patch. Default: the CLS token.
    """
    pixels = pixel_values(backbone, image, resolution)
    grid = backbone.grid(pixels)
    (rows,) = _attention(backbone, pixels, [layer - 1], lambda weights: weights[:, _token(weights, query, grid)])
    return _map_of(rows, grid, image, resolution)


def rollout_map(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the attention rollout (Abnar and Zuidema, arXiv 2005.00928) from one token to the patches of the input.

    The rollout is the product over all layers of the mean of the identity (residual connection) and the attention
    averaged over heads. `query` is that of [`attention_heads`].
    """
    pixels = pixel_values(backbone, image, resolution)
    grid = backbone.grid(pixels)
    means = _attention(backbone, pixels, range(backbone.depth), lambda weights: weights.mean(0))
    flow = torch.zeros(len(means[0]))
    flow[_token(means[0], query, grid)] = 1
    for mean in reversed(means):
        flow = (flow + flow @ mean) / 2
    return _map_of(flow, grid, image, resolution)


def _attention(
    backbone: LoadedBackbone, pixels: torch.Tensor, layers: Iterable[int], reduce: Callable
) -> list[torch.Tensor]:
    """Return `reduce(weights)` of some layers, with weights of shape `(heads, tokens, tokens)`.

    `output_attentions` would keep the weights of all layers, which takes gigabytes for a ViT-L.
    """
    collected, found = [], backbone.attention_layers()

    def collect(position: int, module, inputs, outputs) -> None:
        if outputs[position] is None:
            raise RuntimeError(f"{backbone.name} must be loaded with eager attention to return attention weights.")
        collected.append(reduce(outputs[position][0]).float().cpu())

    handles = [found[layer][0].register_forward_hook(partial(collect, found[layer][1])) for layer in layers]
    try:
        backbone.run(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return collected


def _token(weights: torch.Tensor, query: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """Return the index of the CLS token, which is the first, or of a patch; the patches are the last tokens."""
    prefix = weights.shape[-1] - grid[0] * grid[1]
    if query is None and not prefix:
        raise ValueError("This ViT has no CLS token. Choose the attention of the point.")
    return 0 if query is None else prefix + query[0] * grid[1] + query[1]


def _map_of(weights: torch.Tensor, grid: tuple[int, int], image: np.ndarray, resolution: int) -> torch.Tensor:
    """Reshape the weights of the patches (last dimension) to rows and columns, without padding."""
    rows, columns = grid_of(*image.shape[:2], resolution)
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)[..., :rows, :columns]


def similarity_to_point(
    features: torch.Tensor, row: int, column: int, others: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cosine similarity of one patch to every patch, or to every patch of another image (`others`)."""
    others = features if others is None else others
    return F.cosine_similarity(others, features[:, row, column, None, None], dim=0)


def foreground_scores(features: torch.Tensor) -> torch.Tensor:
    """Return the principal scores of the foreground patches, float64 of shape `(3, rows, columns)`, otherwise NaN.

    A patch is foreground if the sign of its first principal score differs from that of most patches along the border.
    """
    first = principal_scores(features)[0]
    border = torch.cat([first[0], first[-1], first[:, 0], first[:, -1]])
    inside = first * (1 if border.sign().sum() <= 0 else -1) > 0
    scores = torch.full((3, *first.shape), torch.nan, dtype=torch.float64)
    if inside.any():
        scores[:, inside] = principal_scores(features[:, inside].unsqueeze(-1)).squeeze(-1)
    return scores


def segment_labels(features: torch.Tensor, count: int) -> torch.Tensor:
    """Group the patches by their normalized features with k-means (k-means++, seed 0). Label 0 is the largest."""
    patches = F.normalize(features.flatten(1).double(), dim=0).T
    generator = torch.Generator().manual_seed(0)
    centers = patches[torch.randint(len(patches), (1,), generator=generator)]
    while len(centers) < count and (far := torch.cdist(patches, centers).amin(1).square()).max() > 1e-9:
        centers = torch.cat([centers, patches[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(100):
        member = F.one_hot(torch.cdist(patches, centers).argmin(1), len(centers)).double()
        sizes = member.sum(0)
        moved = torch.where(sizes[:, None] > 0, member.T @ patches / sizes.clamp(min=1)[:, None], centers)
        if moved.equal(centers):
            break
        centers = moved
    return sizes.argsort(descending=True).argsort()[member.argmax(1)].view(features.shape[1:])


def most_similar(values: torch.Tensor, count: int, but: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Return the patches with the largest values of a map, without the patch `but`, the largest first."""
    places = [divmod(index, values.shape[1]) for index in values.flatten().argsort(descending=True).tolist()]
    return [place for place in places if place != but][:count]


class Packed(NamedTuple):
    """Patch features of images, reduced for similarities that the browser computes."""

    images: list[dict]
    """Rows, columns, and 8-bit features `(rows * columns, dimensions)` in base64, for each image."""
    scales: list[float]
    """Scale of each dimension."""
    error: float
    """Largest error of a cosine similarity between a patch of the first image and any patch."""


@lru_cache(maxsize=16)
def pack_features(*features: torch.Tensor) -> Packed:
    """Project normalized features to the dimensions with the largest second moments, and round them to 8 bits."""
    patches = F.normalize(torch.cat([one.flatten(1) for one in features], 1), dim=0).T
    counts = [one[0].numel() for one in features]
    dimensions = PACKED_BYTES // max(counts)
    axes = torch.linalg.eigh((patches.T @ patches).double()).eigenvectors[:, -dimensions:].float()
    scales = (patches @ axes).abs().amax(0).clamp(min=1e-9) / 127
    codes = (patches @ axes / scales).round().to(torch.int8)
    restored = F.normalize(codes * scales)
    error = (restored[: counts[0]] @ restored.T - patches[: counts[0]] @ patches.T).abs().max().item()
    images = [
        {"rows": one.shape[1], "columns": one.shape[2], "codes": base64.b64encode(part.numpy()).decode()}
        for one, part in zip(features, codes.split(counts))
    ]
    return Packed(images, scales.tolist(), error)


def heat_of(
    values: torch.Tensor, low: float | None = None, high: float | None = None, colors: str = INFERNO
) -> np.ndarray:
    """Convert values `(rows, columns)` to uint8 colors from dark (`low`, default: the minimum) to bright (`high`)."""
    return colormaps[colors](Normalize(low, high)(values.numpy()), bytes=True)[..., :3]


def smoothed(values: torch.Tensor, image: np.ndarray) -> torch.Tensor:
    """Interpolate a map, `(…, rows, columns)`, to the size at which it is shown (bicubic)."""
    size = display_size(image)[::-1]
    fine = F.interpolate(values.reshape(1, -1, *values.shape[-2:]).float(), size, mode="bicubic")
    return fine.reshape(*values.shape[:-2], *size)


def display_size(image: np.ndarray) -> tuple[int, int]:
    """Return width and height, in pixels, at which an image and its maps are shown."""
    height, width = image.shape[:2]
    scale = DISPLAY_SIDE / max(height, width)
    return max(1, round(scale * width)), max(1, round(scale * height))


def draw_map(
    colors: np.ndarray, image: np.ndarray, point: tuple[float, float] | None = None, opacity: float = 1.0
) -> Image.Image:
    """Draw a map in colors, uint8 of shape `(rows, columns, 3)`, over its image, with a ring around a point."""
    size = display_size(image)
    picture = Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)
    if opacity < 1:
        under = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
        picture = Image.blend(under, picture, opacity)
    return picture if point is None else ringed(picture, point)


def patch_at(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    x, y = point
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def ringed(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """Draw a ring around a point on a copy of a picture: white between black, so that it is visible on any color."""
    picture = picture.copy()
    x, y = (at * side for at, side in zip(point, picture.size))
    for radius, color, width in ((20, "black", 12), (17, "white", 6)):
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def boxed(
    picture: Image.Image, windows: Iterable[tuple[float, float, float, float]], color: str = "white"
) -> Image.Image:
    """Draw the outlines of windows (left, top, right, bottom as fractions of the sides) on a copy of a picture."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for window in windows:
        left, top, right, bottom = (at * side for at, side in zip(window, picture.size * 2))
        left, top = max(left, 6), max(top, 6)
        right, bottom = max(min(right, picture.width - 7), left), max(min(bottom, picture.height - 7), top)
        for around, line, width in ((6, "black", 8), (4, color, 4)):
            pen.rectangle((left - around, top - around, right + around, bottom + around), outline=line, width=width)
    return picture
