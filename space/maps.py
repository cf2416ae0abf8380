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

PCA = "Features as colors"
FOREGROUND = "Foreground as colors"
SEGMENTS = "Segments"
SIMILARITY = "Similarity to the point"
ATTENTION = "Attention"
HEADS = "Attention of every head"
ROLLOUT = "Attention through all layers"
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
FROM_CLS = "CLS token"
FROM_POINT = "the point"
NO_BACKBONE = "none"
TWIN = "the same with random weights"
MIN_RESOLUTION = 4
MAX_RESOLUTION = 48
OPACITY = 0.75
INFERNO = "inferno"
CIVIDIS = "cividis"  # looks the same with and without color blindness
COLOR_MAPS = [INFERNO, CIVIDIS]
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#444444")  # Okabe and Ito
BOX_COLOR = "#00e5ff"  # not a color of the color maps
DISPLAY_SIDE = 768
PACKED_BYTES = 100_000
COMPONENTS = "red, green and blue are the first three principal components (PCA)"


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

    def values(
        self,
        backbone: LoadedBackbone,
        layer: int,
        image: np.ndarray,
        features: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the map, of shape `(rows, columns)`, or `(n, rows, columns)` for principal scores and all heads."""
        if self.kind == PCA and self.component:
            return principal_scores(features, self.component)[-1:]
        if self.kind == PCA:
            return principal_scores(features)
        if self.kind == FOREGROUND:
            return foreground_scores(features)
        if self.kind == SEGMENTS:
            return segment_labels(features, self.segments)
        row, column = patch_at(self.point, *features.shape[1:])
        if self.kind == SIMILARITY:
            return similarity_to_point(features, row, column)
        query = (row, column) if self.source == FROM_POINT else None
        if self.kind == ROLLOUT:
            return rollout_map(backbone, image, self.resolution, query)
        heads = attention_heads(backbone, image, self.resolution, layer, query)
        if self.kind == HEADS:
            return heads
        if self.head:
            return heads[min(self.head, backbone.heads) - 1]
        return heads.mean(0)


class BackboneMap(NamedTuple):
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
        if kind == ROLLOUT:
            return f"{self.name}, all layers"
        return f"{self.name}, layer {self.layer} of {self.backbone.depth}"


class Opened(NamedTuple):
    """Image opened for a backbone: for display, as its input, and a note."""

    rgb: np.ndarray
    pixels: np.ndarray
    note: str


@lru_cache(maxsize=16)
def image_of(
    models: Models,
    path: str,
    name: str,
    adjustment: Adjustment = UNADJUSTED,
) -> Opened:
    backbone = models.backbone(name)
    pixels, note = open_pixels(path, input_spec=backbone.input_spec, adjustment=adjustment)
    return Opened(in_colors(pixels, backbone.band_names), pixels, note)


@lru_cache(maxsize=16)
def features_of(
    models: Models,
    path: str,
    name: str,
    resolution: int,
    layer: int,
    adjustment: Adjustment = UNADJUSTED,
) -> torch.Tensor:
    pixels = image_of(models, path, name, adjustment).pixels
    return patch_features(models.backbone(name), pixels, resolution, layer)


def selected_backbones(first: str, second: str | None) -> list[str]:
    """Return the names of the selected backbones."""
    if second in (None, "", NO_BACKBONE):
        return [first]
    if second == TWIN:
        second = first.removesuffix(RANDOM) + RANDOM
    return [first, second]


def look(
    models: Models,
    path: str,
    names: Sequence[str],
    view: View,
    progress: Callable = PROGRESS,
) -> Iterator[list[BackboneMap]]:
    """Yield the list of maps of an image after each backbone."""
    num_steps = 2 * len(names)
    backbones = []
    for index, name in enumerate(names):
        progress((index, num_steps), desc=f"Opening {name}")
        backbones.append(models.backbone(name))
    selected_layers = (view.layer, view.second_layer)
    maps = []
    with turn(progress):
        for index, (name, backbone) in enumerate(zip(names, backbones)):
            progress((len(names) + index, num_steps), desc=f"Computing with {name}")
            layer = min(selected_layers[index] or backbone.depth, backbone.depth)
            features = features_of(models, path, name, view.resolution, layer, view.adjustment)
            pixels = image_of(models, path, name, view.adjustment).pixels
            values = view.values(backbone, layer, pixels, features)
            maps.append(BackboneMap(name, layer, backbone, features, values))
            # All maps are drawn again, on the image as the first backbone sees it.
            rgb = image_of(models, path, names[0], view.adjustment).rgb
            pictures = draw(view, [backbone_map.values for backbone_map in maps], rgb)
            drawn_maps = []
            for backbone_map, (picture, meaning) in zip(maps, pictures):
                drawn_maps.append(backbone_map._replace(picture=picture, meaning=meaning))
            yield drawn_maps


def draw(view: View, maps: list[torch.Tensor], image: np.ndarray) -> list[tuple[Image.Image, str]]:
    """Draw each map over the image and return the pictures with their meaning. PCA maps share their colors."""
    if view.kind == PCA and not view.component:
        return _draw_principal_components(view, maps, image)
    drawn_maps = []
    for values in maps:
        if view.kind == FOREGROUND:
            picture = draw_foreground(values, image, view)
            meaning = f"{COMPONENTS} of the foreground; the rest is gray"
        elif view.kind == SEGMENTS:
            picture = draw_segments(values, image, view)
            meaning = f"{int(values.max()) + 1} segments"
        elif view.kind == HEADS:
            picture = draw_heads(values, image, view)
            meaning = "each head from its minimum (dark) to its maximum (bright)"
        else:
            picture, meaning = heat_map(values, image, view)
        drawn_maps.append((picture, meaning))
    return drawn_maps


def _draw_principal_components(
    view: View, maps: list[torch.Tensor], image: np.ndarray
) -> list[tuple[Image.Image, str]]:
    first_scores = maps[0]
    drawn_maps = [(_draw_in_colors(first_scores, image, view), COMPONENTS)]
    for scores in maps[1:]:
        picture = _draw_in_colors(align_scores(scores, first_scores), image, view)
        drawn_maps.append((picture, f"{COMPONENTS}, rotated to match those of the first backbone"))
    return drawn_maps


def _draw_in_colors(scores: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw three principal scores of each patch as red, green and blue."""
    return draw_map(colors_of(view.refined(scores, image)), image, opacity=view.opacity)


def heat_map(
    values: torch.Tensor,
    image: np.ndarray,
    view: View,
    has_point: bool = True,
) -> tuple[Image.Image, str]:
    """Draw a map of one value a patch, of the image with the point or another, and return picture and meaning."""
    unit = ""
    if view.kind == PCA:
        values = values[0]
        low = -2.0
        high = 2.0
        unit = f" standard deviations of principal component {view.component} (PCA)"
    else:
        low = values.min().item()
        high = 1.0 if view.kind == SIMILARITY else values.max().item()
    point = view.point if view.has_point and has_point else None
    colors = heat_of(view.refined(values, image), low, high, view.colors)
    picture = draw_map(colors, image, point, view.opacity)
    if view.kind == SIMILARITY:
        rows, columns = values.shape
        patch_of_point = None if point is None else patch_at(point, rows, columns)
        windows = []
        for row, column in most_similar(values, view.boxes, patch_of_point):
            windows.append((column / columns, row / rows, (column + 1) / columns, (row + 1) / rows))
        picture = boxed(picture, windows, BOX_COLOR)
    return picture, f"from dark, {low:.3g}, to bright, {high:.3g}{unit}"


def draw_foreground(scores: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw the colors of the foreground; the background shows the image in gray."""
    foreground = Image.fromarray(scores[0].isfinite().numpy())
    colored = _draw_in_colors(scores.nan_to_num(), image, view)
    gray = draw_map(np.zeros((1, 1, 3), np.uint8), image, opacity=0.0)
    return Image.composite(colored, gray, foreground.resize(colored.size, Image.Resampling.NEAREST))


def draw_segments(labels: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw each segment in a color of its own."""
    if view.is_smooth:
        memberships = F.one_hot(labels).movedim(-1, 0)
        labels = smoothed(memberships, image).argmax(0)
    colors = np.array([ImageColor.getrgb(color) for color in PALETTE], dtype=np.uint8)
    return draw_map(colors[labels.numpy()], image, opacity=view.opacity)


def draw_heads(values: torch.Tensor, image: np.ndarray, view: View) -> Image.Image:
    """Draw the maps of all heads on a numbered sheet. Each map has its own color range."""
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    full_width, full_height = display_size(image)
    width = max(1, full_width // columns)
    height = max(1, full_height // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, head_values in enumerate(values):
        low = head_values.min().item()
        high = head_values.max().item()
        colors = heat_of(view.refined(head_values, image), low, high, view.colors)
        picture = draw_map(colors, image, opacity=view.opacity)
        small = picture.resize((width, height), Image.Resampling.BILINEAR)
        ImageDraw.Draw(small).text(
            (4, 2),
            str(index + 1),
            fill="white",
            stroke_width=2,
            stroke_fill="black",
            font_size=18,
        )
        row, column = divmod(index, columns)
        sheet.paste(small, (column * width, row * height))
    return sheet


def grid_of(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return rows and columns of patches of an image, with `resolution` patches along its longer side."""
    longer = max(height, width)
    rows = round(resolution * height / longer)
    columns = round(resolution * width / longer)
    return max(1, rows), max(1, columns)


def pixel_values(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the normalized pixels of whole patches, of shape `(1, bands, height, width)`, on the backbone's device.

    Args:
        resolution: patches along the longer side.
        grid: rows and columns of patches, in place of `resolution`.
    """
    rows, columns = grid or grid_of(*image.shape[:2], resolution)
    patch_height, patch_width = backbone.patch
    inputs = backbone.image_processor(
        image,
        input_data_format="channels_last",
        size={"height": rows * patch_height, "width": columns * patch_width},
        crop_to_patches=False,
        return_tensors="pt",
    )
    return inputs["pixel_values"].to(backbone.model.device, backbone.model.dtype)


def patch_features(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    layer: int | None = None,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the patch features after a layer, from 1. Those of the last one, the default, are `last_hidden_state`."""
    pixels = pixel_values(backbone, image, resolution, grid)
    return backbone.states(pixels, layer or backbone.depth).float().cpu()


def attention_heads(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    layer: int,
    query: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the attention to the patches in a layer, from 1, float32 of shape `(heads, rows, columns)`.

    Args:
        query: the attending patch. Default: the CLS token.
    """
    pixels = pixel_values(backbone, image, resolution)
    grid = backbone.grid(pixels)

    def of_query(weights: torch.Tensor) -> torch.Tensor:
        return weights[:, _token(weights, query, grid)]

    (weights_of_query,) = _attention(backbone, pixels, [layer - 1], of_query)
    return _map_of(weights_of_query, grid, image, resolution)


def rollout_map(
    backbone: LoadedBackbone,
    image: np.ndarray,
    resolution: int,
    query: tuple[int, int] | None = None,
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
    backbone: LoadedBackbone,
    pixels: torch.Tensor,
    layers: Iterable[int],
    reduce: Callable,
) -> list[torch.Tensor]:
    """Return `reduce(weights)` of some layers, with weights of shape `(heads, tokens, tokens)`.

    `output_attentions` would keep the weights of all layers, which takes gigabytes for a ViT-L.
    """
    reduced_weights = []

    def collect(position: int, module, inputs, outputs) -> None:
        weights = outputs[position]
        if weights is None:
            raise RuntimeError(f"{backbone.name} must be loaded with eager attention to return attention weights.")
        reduced_weights.append(reduce(weights[0]).float().cpu())

    attention_layers = backbone.attention_layers()
    handles = []
    for layer in layers:
        module, position = attention_layers[layer]
        handles.append(module.register_forward_hook(partial(collect, position)))
    try:
        backbone.run(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return reduced_weights


def _token(weights: torch.Tensor, query: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """Return the index of the CLS token, which is the first, or of a patch; the patches are the last tokens."""
    rows, columns = grid
    num_other_tokens = weights.shape[-1] - rows * columns
    if query is not None:
        row, column = query
        return num_other_tokens + row * columns + column
    if num_other_tokens == 0:
        raise ValueError("This ViT has no CLS token. Choose the attention of the point.")
    return 0


def _map_of(
    weights: torch.Tensor,
    grid: tuple[int, int],
    image: np.ndarray,
    resolution: int,
) -> torch.Tensor:
    """Reshape the weights of the patches (last dimension) to rows and columns, without padding."""
    num_patches = grid[0] * grid[1]
    rows, columns = grid_of(*image.shape[:2], resolution)
    return weights[..., -num_patches:].unflatten(-1, grid)[..., :rows, :columns]


def similarity_to_point(
    features: torch.Tensor,
    row: int,
    column: int,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cosine similarity of one patch to every patch, or to every patch of another image (`others`)."""
    if others is None:
        others = features
    return F.cosine_similarity(others, features[:, row, column, None, None], dim=0)


def foreground_scores(features: torch.Tensor) -> torch.Tensor:
    """Return the principal scores of the foreground patches, float64 of shape `(3, rows, columns)`, otherwise NaN.

    A patch is foreground if the sign of its first principal score differs from that of most patches along the border.
    """
    first_scores = principal_scores(features)[0]
    border = torch.cat([first_scores[0], first_scores[-1], first_scores[:, 0], first_scores[:, -1]])
    is_foreground = first_scores > 0 if border.sign().sum() <= 0 else first_scores < 0
    scores = torch.full((3, *first_scores.shape), torch.nan, dtype=torch.float64)
    if is_foreground.any():
        foreground_features = features[:, is_foreground].unsqueeze(-1)
        scores[:, is_foreground] = principal_scores(foreground_features).squeeze(-1)
    return scores


def segment_labels(features: torch.Tensor, count: int) -> torch.Tensor:
    """Group the patches by their normalized features with k-means (k-means++, seed 0). Label 0 is the largest."""
    patches = F.normalize(features.flatten(1).double(), dim=0).T
    centers = _first_centers(patches, count)
    for _ in range(100):
        nearest_centers = torch.cdist(patches, centers).argmin(1)
        membership = F.one_hot(nearest_centers, len(centers)).double()
        sizes = membership.sum(0)
        means = membership.T @ patches / sizes.clamp(min=1)[:, None]
        moved_centers = torch.where(sizes[:, None] > 0, means, centers)
        if moved_centers.equal(centers):
            break
        centers = moved_centers
    rank_by_size = sizes.argsort(descending=True).argsort()
    return rank_by_size[membership.argmax(1)].view(features.shape[1:])


def _first_centers(patches: torch.Tensor, count: int) -> torch.Tensor:
    """Draw the first centers by k-means++, fewer than `count` if there are fewer different patches."""
    generator = torch.Generator().manual_seed(0)
    centers = patches[torch.randint(len(patches), (1,), generator=generator)]
    while len(centers) < count:
        squared_distances = torch.cdist(patches, centers).amin(1).square()
        if not squared_distances.max() > 1e-9:
            break
        index = torch.multinomial(squared_distances, 1, generator=generator)
        centers = torch.cat([centers, patches[index]])
    return centers


def most_similar(
    values: torch.Tensor, count: int, excluded_patch: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """Return the patches with the largest values of a map, without the excluded one, the largest first."""
    patches = []
    for index in values.flatten().argsort(descending=True).tolist():
        patch = divmod(index, values.shape[1])
        if patch != excluded_patch:
            patches.append(patch)
    return patches[:count]


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
    all_patches = torch.cat([image_features.flatten(1) for image_features in features], 1)
    patches = F.normalize(all_patches, dim=0).T
    counts = [image_features[0].numel() for image_features in features]
    dimensions = PACKED_BYTES // max(counts)
    moments = (patches.T @ patches).double()
    axes = torch.linalg.eigh(moments).eigenvectors[:, -dimensions:].float()
    projected = patches @ axes
    scales = projected.abs().amax(0).clamp(min=1e-9) / 127
    codes = (projected / scales).round().to(torch.int8)
    restored = F.normalize(codes * scales)
    num_first = counts[0]
    similarities = patches[:num_first] @ patches.T
    restored_similarities = restored[:num_first] @ restored.T
    error = (restored_similarities - similarities).abs().max().item()
    images = []
    for image_features, image_codes in zip(features, codes.split(counts)):
        _, rows, columns = image_features.shape
        text = base64.b64encode(image_codes.numpy()).decode()
        images.append({"rows": rows, "columns": columns, "codes": text})
    return Packed(images, scales.tolist(), error)


def heat_of(
    values: torch.Tensor,
    low: float | None = None,
    high: float | None = None,
    colors: str = INFERNO,
) -> np.ndarray:
    """Convert values `(rows, columns)` to uint8 colors from dark (`low`, default: the minimum) to bright (`high`)."""
    normalized = Normalize(low, high)(values.numpy())
    return colormaps[colors](normalized, bytes=True)[..., :3]


def smoothed(values: torch.Tensor, image: np.ndarray) -> torch.Tensor:
    """Interpolate a map, `(…, rows, columns)`, to the size at which it is shown (bicubic)."""
    width, height = display_size(image)
    *leading_dimensions, rows, columns = values.shape
    fine = F.interpolate(values.reshape(1, -1, rows, columns).float(), (height, width), mode="bicubic")
    return fine.reshape(*leading_dimensions, height, width)


def display_size(image: np.ndarray) -> tuple[int, int]:
    """Return width and height, in pixels, at which an image and its maps are shown."""
    height, width = image.shape[:2]
    scale = DISPLAY_SIDE / max(height, width)
    return max(1, round(scale * width)), max(1, round(scale * height))


def draw_map(
    colors: np.ndarray,
    image: np.ndarray,
    point: tuple[float, float] | None = None,
    opacity: float = 1.0,
) -> Image.Image:
    """Draw a map in colors, uint8 of shape `(rows, columns, 3)`, over its image, with a ring around a point."""
    size = display_size(image)
    picture = Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)
    if opacity < 1:
        large_image = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        gray = large_image.convert("L").convert("RGB")
        picture = Image.blend(gray, picture, opacity)
    return picture if point is None else ringed(picture, point)


def patch_at(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    x, y = point
    row = min(int(y * rows), rows - 1)
    column = min(int(x * columns), columns - 1)
    return row, column


def ringed(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """Draw a ring around a point on a copy of a picture: white between black, so that it is visible on any color."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    x = point[0] * picture.width
    y = point[1] * picture.height
    for radius, color, width in ((20, "black", 12), (17, "white", 6)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def boxed(
    picture: Image.Image, windows: Iterable[tuple[float, float, float, float]], color: str = "white"
) -> Image.Image:
    """Draw the outlines of windows (left, top, right, bottom as fractions of the sides) on a copy of a picture."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for left_fraction, top_fraction, right_fraction, bottom_fraction in windows:
        # The outline and its black border lie within the picture.
        left = max(left_fraction * picture.width, 6)
        top = max(top_fraction * picture.height, 6)
        right = max(min(right_fraction * picture.width, picture.width - 7), left)
        bottom = max(min(bottom_fraction * picture.height, picture.height - 7), top)
        for margin, line_color, width in ((6, "black", 8), (4, color, 4)):
            outline = (left - margin, top - margin, right + margin, bottom + margin)
            pen.rectangle(outline, outline=line_color, width=width)
    return picture
