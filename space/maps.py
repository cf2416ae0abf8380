"""Maps of a backbone's patch features and attention: settings, computation by one or two backbones, and drawing.

An image is resized to whole patches at its own aspect ratio, so that a map of `(rows, columns)` spans all of it.
"""

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from computing import turn
from loading import RANDOM, LoadedBackbone, Models
from matplotlib import colormaps
from PIL import Image, ImageColor, ImageDraw
from reading import Adjustment, in_colors
from torch.nn import functional as F
from uploading import open_pixels

from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

PCA, FOREGROUND, SEGMENTS, SIMILARITY = (
    "Features as colors",
    "Foreground as colors",
    "Segments",
    "Similarity to the point",
)
ATTENTION, HEADS, ROLLOUT = "Attention", "Attention of every head", "Attention through all layers"
EXPLANATIONS = {
    PCA: "Patches with similar colors have similar features. No label was used.",
    FOREGROUND: "The colors of the foreground only: of the patches that differ most from those at the border.",
    SEGMENTS: "Groups of patches with similar features, found by k-means: each patch belongs to the nearest of a few "
    "mean features.",
    SIMILARITY: "The brighter a patch, the more similar are its features to those of the patch at the point (cosine "
    "similarity). The boxes mark the most similar patches. The maps follow the mouse, and a click keeps its point.",
    ATTENTION: "Attention is the weight with which a token reads each patch, here in one head of a layer or as their "
    "mean.",
    HEADS: "Each head of a layer reads the patches with its own weights.",
    ROLLOUT: "Attention rollout: the attention of all layers multiplied. It estimates how much of each patch reaches "
    "the token in the last layer.",
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
    """Settings of a map.

    Args:
        kind: one of `KINDS`.
        layers: layer of each backbone, from 1; the last layer if `None` or out of range.
        head: attention head, from 1; 0 for the mean over heads.
        from_point: whether to show the attention of the patch at the point instead of the CLS token.
        point: fractions from the left and from the top.
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
    layers: tuple[int | None, ...]
    head: int
    from_point: bool
    point: tuple[float, float]
    resolution: int
    opacity: float = OPACITY
    colors: str = INFERNO
    is_smooth: bool = False
    component: int = 0
    segments: int = 5
    boxes: int = 0
    adjustment: Adjustment = Adjustment()

    @property
    def has_point(self) -> bool:
        return self.kind == SIMILARITY or (self.kind in OF_ATTENTION and self.from_point)

    def layer_of(self, backbone: LoadedBackbone, index: int) -> int:
        layer = self.layers[index] if index < len(self.layers) else None
        return min(int(layer or backbone.depth), backbone.depth)

    def refined(self, values: torch.Tensor, image: np.ndarray) -> torch.Tensor:
        """Return the values of a map, interpolated to the size at which it is shown if it is smooth."""
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
        query = place if self.from_point else None
        if self.kind == ROLLOUT:
            return rollout_map(backbone, image, self.resolution, query)
        if self.kind == HEADS:
            return attention_heads(backbone, image, self.resolution, layer, query)
        return attention_map(backbone, image, self.resolution, layer, min(self.head, backbone.heads) or None, query)


@dataclass(frozen=True)
class Seen:
    """Map of an image by one backbone.

    Args:
        name: name of the backbone.
        layer: layer of the features.
        depth: number of layers.
        heads: number of attention heads.
        features: float32 of shape `(channels, rows, columns)`.
        values: result of [`View.values`].
        picture: map in colors, over the image.
        meaning: meaning of the colors.
    """

    name: str
    layer: int
    depth: int
    heads: int
    features: torch.Tensor
    values: torch.Tensor
    picture: Image.Image
    meaning: str

    def title(self, kind: str) -> str:
        return f"{self.name}, all layers" if kind == ROLLOUT else f"{self.name}, layer {self.layer} of {self.depth}"


class Opened(NamedTuple):
    """Image opened for a backbone."""

    rgb: np.ndarray
    """Image for display, uint8 of shape `(height, width, 3)`."""
    pixels: np.ndarray
    """Input of the backbone: `rgb`, or float32 of shape `(height, width, bands)` in [0, 1] for other bands."""
    note: str


@lru_cache(maxsize=16)
def image_of(
    models: Models,
    path: str,
    name: str,
    adjustment: Adjustment = Adjustment(),  # noqa: B008
) -> Opened:
    one = models.backbone(name)
    pixels, note = open_pixels(path, input_spec=one.input_spec, adjustment=adjustment)
    return Opened(in_colors(pixels, one.band_names), pixels, note)


@lru_cache(maxsize=16)
def features_of(
    models: Models,
    path: str,
    name: str,
    resolution: int,
    layer: int,
    adjustment: Adjustment = Adjustment(),  # noqa: B008
) -> torch.Tensor:
    return patch_features(models.backbone(name), image_of(models, path, name, adjustment).pixels, resolution, layer)


def chosen(first: str, second: str | None) -> list[str]:
    """Return the names of the selected backbones."""
    if second == TWIN:
        second = first.removesuffix(RANDOM) + RANDOM
    return [first] + [second] * (second not in (None, "", NO_BACKBONE))


def look(
    models: Models, path: str, names: Sequence[str], view: View, progress: Callable | None = None
) -> Iterator[list[Seen]]:
    """Yield the list of maps of an image after each backbone."""
    opened = []
    for index, name in enumerate(names):
        if progress is not None:
            progress(index / (2 * len(names)), desc=f"Opening {name}")
        opened.append(models.backbone(name))
    features, values, layers = [], [], []
    with turn(progress):
        for index, (name, one) in enumerate(zip(names, opened)):
            if progress is not None:
                progress((len(names) + index) / (2 * len(names)), desc=f"Computing with {name}")
            layers.append(view.layer_of(one, index))
            features.append(features_of(models, path, name, view.resolution, layers[-1], view.adjustment))
            image = image_of(models, path, name, view.adjustment).pixels
            values.append(view.values(one, layers[-1], image, features[-1]))
            pictures = draw(view, values, image_of(models, path, names[0], view.adjustment).rgb)
            facts = zip(names, layers, opened, features, values, pictures)
            yield [
                Seen(name, layer, one.depth, one.heads, feature, value, picture, meaning)
                for name, layer, one, feature, value, (picture, meaning) in facts
            ]


def draw(view: View, maps: list[torch.Tensor], image: np.ndarray) -> list[tuple[Image.Image, str]]:
    """Draw each map over the image and return the pictures with their meaning. PCA maps share their colors."""
    own = "red, green and blue are the first three principal components (PCA)"
    if view.kind == PCA and not view.component:
        scores = [maps[0], *(align_scores(other, maps[0]) for other in maps[1:])]
        meanings = [own] + [f"{own}, rotated to match those of the first backbone"] * (len(maps) - 1)
        colors = [colors_of(view.refined(one, image)) for one in scores]
        return [(draw_map(one, image, opacity=view.opacity), meaning) for one, meaning in zip(colors, meanings)]
    if view.kind == FOREGROUND:
        return [(draw_foreground(one, image, view), f"{own} of the foreground; the rest is gray") for one in maps]
    if view.kind == SEGMENTS:
        return [(draw_segments(one, image, view), f"{int(one.max()) + 1} segments") for one in maps]
    if view.kind == HEADS:
        meaning = "each head from its minimum (dark) to its maximum (bright)"
        return [(draw_heads(one, image, view), meaning) for one in maps]
    return [heat_map(one, image, view) for one in maps]


def heat_map(values: torch.Tensor, image: np.ndarray, view: View, has_point: bool = True) -> tuple[Image.Image, str]:
    """Draw a map of one value a patch and return the picture with its meaning."""
    if view.kind == PCA:
        values, low, high = values[0], -2.0, 2.0
    else:
        low, high = values.min().item(), 1.0 if view.kind == SIMILARITY else values.max().item()
    point = view.point if view.has_point and has_point else None
    colors = heat_of(view.refined(values, image), low, high, view.colors)
    picture = draw_map(colors, image, point, view.opacity)
    if view.kind == SIMILARITY:
        rows, columns = values.shape
        places = most_similar(values, view.boxes, patch_at(view.point, rows, columns) if has_point else None)
        windows = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y, x in places]
        picture = boxed(picture, windows, BOX_COLOR)
    unit = f" standard deviations of principal component {view.component} (PCA)" if view.kind == PCA else ""
    return picture, f"from dark, {low:.3g}, to bright, {high:.3g}{unit}"


def draw_foreground(scores: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw the colors of the foreground; the background shows the image in gray."""
    inside = Image.fromarray(scores[0].isfinite().numpy().astype(np.uint8) * 255)
    scores = scores.nan_to_num()
    colored = draw_map(colors_of(view.refined(scores, image)), image, opacity=view.opacity)
    gray = draw_map(np.zeros((*scores.shape[1:], 3), np.uint8), image, opacity=0.0)
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
    width, height = (max(1, side // columns) for side in display_size(*image.shape[:2]))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(values) / columns) * height))
    for index, one in enumerate(values):
        fine = view.refined(one, image)
        picture = draw_map(heat_of(fine, one.min().item(), one.max().item(), view.colors), image, opacity=view.opacity)
        small = picture.resize((width, height), Image.Resampling.BILINEAR)
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
    """Preprocess an image for the backbone.

    Args:
        image: uint8 RGB of shape `(height, width, 3)`, or float32 of shape `(height, width, bands)` in [0, 1] for other
            bands.
        resolution: patches along the longer side.
        grid: rows and columns of patches, in place of `resolution`.

    Returns:
        Normalized pixels of shape `(1, bands, rows * patch, columns * patch)` on the backbone's device, in its dtype.
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
    """Return the patch features after a layer.

    Args:
        image, resolution, grid: as for [`pixel_values`].
        layer: number of the layer, from 1. Default: the last one, whose features are the `last_hidden_state`.

    Returns:
        float32 of shape `(channels, rows, columns)`, on the CPU.
    """
    return backbone.states(pixel_values(backbone, image, resolution, grid), layer or backbone.depth).float().cpu()


def attention_heads(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, layer: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the attention from one token to the patches, for each head of a layer.

    Args:
        image, resolution: as for [`pixel_values`].
        layer: number of the layer, from 1.
        query: row and column of the attending patch. Default: the CLS token.

    Returns:
        float32 of shape `(heads, rows, columns)` on the CPU. With the attention to the CLS token, each head sums to 1.
    """
    pixels = pixel_values(backbone, image, resolution)
    grid = backbone.grid(pixels)
    with _attention_of(backbone, [layer - 1], lambda weights: weights[:, _token(weights, query, grid)]) as rows:
        backbone.run(pixels)
    return _map_of(rows[0], grid, image, resolution)


def attention_map(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    layer: int,
    head: int | None = None,
    query: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the map of [`attention_heads`] of one head, from 1, or the mean over heads, of shape `(rows, columns)`."""
    heads = attention_heads(backbone, image, resolution, layer, query)
    return heads.mean(0) if head is None else heads[head - 1]


def rollout_map(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the attention rollout (Abnar and Zuidema, arXiv 2005.00928) from one token to the patches of the input.

    The rollout is the product over all layers of the mean of the identity (residual connection) and the attention
    averaged over heads.

    Args:
        image, resolution, query: as for [`attention_map`].

    Returns:
        float32 of shape `(rows, columns)` on the CPU. Together with the value of the CLS token, it sums to 1.
    """
    pixels = pixel_values(backbone, image, resolution)
    grid = backbone.grid(pixels)
    with _attention_of(backbone, range(backbone.depth), lambda weights: weights.mean(0)) as means:
        backbone.run(pixels)
    flow = torch.zeros(len(means[0]))
    flow[_token(means[0], query, grid)] = 1
    for mean in reversed(means):
        flow = (flow + flow @ mean) / 2
    return _map_of(flow, grid, image, resolution)


def similarity_to_point(
    features: torch.Tensor, row: int, column: int, others: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cosine similarity of every patch, or every patch of another image, to one patch.

    Args:
        features: of shape `(channels, rows, columns)`.
        others: features of the other image.

    Returns:
        float32 of shape `(rows, columns)` in [-1, 1].
    """
    others = features if others is None else others
    return F.cosine_similarity(others, features[:, row, column, None, None], dim=0)


def foreground_scores(features: torch.Tensor) -> torch.Tensor:
    """Return the principal scores of the foreground patches.

    A patch is foreground if the sign of its first principal score differs from that of most patches along the border.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        float64 of shape `(3, rows, columns)`, NaN in the background.
    """
    first = principal_scores(features)[0]
    border = torch.cat([first[0], first[-1], first[:, 0], first[:, -1]])
    inside = first * (1 if border.sign().sum() <= 0 else -1) > 0
    scores = torch.full((3, *first.shape), torch.nan, dtype=torch.float64)
    if inside.any():
        scores[:, inside] = principal_scores(features[:, inside].unsqueeze(-1)).squeeze(-1)
    return scores


def segment_labels(features: torch.Tensor, count: int) -> torch.Tensor:
    """Group the patches by their normalized features with k-means, started by k-means++ with seed 0.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        int64 of shape `(rows, columns)`. Label 0 is the largest segment.
    """
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
    """Return row and column of the largest values of a map, without the patch `but`, the largest first."""
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
    """Reduce normalized patch features of images, `(channels, rows, columns)`, to at most `PACKED_BYTES` an image.

    The features are projected to the dimensions with the largest second moments, and rounded to 8 bits.
    """
    patches = F.normalize(torch.cat([one.flatten(1) for one in features], 1), dim=0).T
    dimensions = PACKED_BYTES // max(one[0].numel() for one in features)
    axes = torch.linalg.eigh((patches.T @ patches).double()).eigenvectors[:, -dimensions:].float()
    scales = (patches @ axes).abs().amax(0).clamp(min=1e-9) / 127
    codes = (patches @ axes / scales).round().to(torch.int8)
    restored, first = F.normalize(codes * scales), features[0][0].numel()
    error = (restored[:first] @ restored.T - patches[:first] @ patches.T).abs().max().item()
    parts = codes.split([one[0].numel() for one in features])
    images = [
        {"rows": one.shape[1], "columns": one.shape[2], "codes": base64.b64encode(part.numpy()).decode()}
        for one, part in zip(features, parts)
    ]
    return Packed(images, scales.tolist(), error)


def heat_of(
    values: torch.Tensor, low: float | None = None, high: float | None = None, colors: str = INFERNO
) -> np.ndarray:
    """Convert values to colors from dark (`low`, default: the minimum) to bright (`high`, default: the maximum).

    Returns:
        uint8 of shape `(rows, columns, 3)`.
    """
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    unit = ((values - low) / (high - low if high > low else 1)).clamp(0, 1).numpy()
    return colormaps[colors](unit, bytes=True)[..., :3]


def smoothed(values: torch.Tensor, image: np.ndarray) -> torch.Tensor:
    """Interpolate a map, `(…, rows, columns)`, to the size at which it is shown (bicubic)."""
    size = display_size(*image.shape[:2])[::-1]
    fine = F.interpolate(values.reshape(1, -1, *values.shape[-2:]).float(), size, mode="bicubic")
    return fine.reshape(*values.shape[:-2], *size)


def display_size(height: int, width: int) -> tuple[int, int]:
    """Return width and height, in pixels, at which an image and its maps are shown."""
    scale = DISPLAY_SIDE / max(height, width)
    return max(1, round(scale * width)), max(1, round(scale * height))


def draw_map(
    colors: np.ndarray, image: np.ndarray, point: tuple[float, float] | None = None, opacity: float = 1.0
) -> Image.Image:
    """Draw a map over its image, with each patch as a block of one color.

    Args:
        colors: uint8 of shape `(rows, columns, 3)`.
        image: uint8 RGB of shape `(height, width, 3)`.
        point: point to mark with a ring, as fractions from the left and from the top.
        opacity: opacity of the map over the image.
    """
    size = display_size(*image.shape[:2])
    picture = Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)
    if opacity < 1:
        under = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
        picture = Image.blend(under, picture, opacity)
    return picture if point is None else ringed(picture, point)


def patch_at(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    """Return row and column of the patch at a point, given as fractions from the left and from the top."""
    x, y = point
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def ringed(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """Draw a ring around a point, given as fractions from the left and from the top, on a copy of a picture.

    The ring is white between black, so that it is visible on any color.
    """
    y, x = np.ogrid[: picture.height, : picture.width]
    distance = np.hypot(x - point[0] * picture.width, y - point[1] * picture.height)
    pixels = np.array(picture)
    pixels[(distance >= 8) & (distance < 20)] = 0
    pixels[(distance >= 11) & (distance < 17)] = 255
    return Image.fromarray(pixels)


def boxed(
    picture: Image.Image, windows: Iterable[tuple[float, float, float, float]], color: str = "white"
) -> Image.Image:
    """Draw the outlines of windows, given as fractions of the sides, on a copy of a picture."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for window in windows:
        left, top, right, bottom = (at * side for at, side in zip(window, picture.size * 2))
        left, top = max(left, 6), max(top, 6)
        right, bottom = max(min(right, picture.width - 7), left), max(min(bottom, picture.height - 7), top)
        pen.rectangle((left - 6, top - 6, right + 6, bottom + 6), outline="black", width=8)
        pen.rectangle((left - 4, top - 4, right + 4, bottom + 4), outline=color, width=4)
    return picture


def _token(weights: torch.Tensor, query: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """Return the index of the CLS token, which is the first, or of a patch; the patches are the last tokens.

    Raises:
        ValueError: if the ViT has no CLS token.
    """
    prefix = weights.shape[-1] - grid[0] * grid[1]
    if query is None and not prefix:
        raise ValueError("This ViT has no CLS token. Choose the attention of the point.")
    return 0 if query is None else prefix + query[0] * grid[1] + query[1]


def _map_of(weights: torch.Tensor, grid: tuple[int, int], image: np.ndarray, resolution: int) -> torch.Tensor:
    """Reshape the weights of the patches (last dimension) to rows and columns, without padding."""
    rows, columns = grid_of(*image.shape[:2], resolution)
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)[..., :rows, :columns]


@contextmanager
def _attention_of(backbone: LoadedBackbone, layers: Sequence[int], reduce) -> Iterator[list[torch.Tensor]]:
    """Collect `reduce(weights)` of some layers during a forward pass, with weights `(heads, tokens, tokens)`.

    `output_attentions` would keep the weights of all layers, which takes gigabytes for a ViT-L.
    """
    collected: list[torch.Tensor] = []

    def collector(position: int):
        def collect(module, inputs, outputs):
            if outputs[position] is None:
                raise RuntimeError(f"{backbone.name} must be loaded with eager attention to return attention weights.")
            collected.append(reduce(outputs[position][0]).float().cpu())

        return collect

    found = backbone.attention_layers()
    handles = [found[index][0].register_forward_hook(collector(found[index][1])) for index in layers]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
