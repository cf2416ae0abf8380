"""Maps of the tab Backbone: computation by one or two backbones, drawing, and captions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from adjusting import Adjustment
from computing import turn
from loading import RANDOM, Models
from maps import (
    attention_heads,
    attention_map,
    draw_map,
    foreground_scores,
    heat_of,
    patch_at,
    patch_features,
    rollout_map,
    similarity_elsewhere,
    similarity_to_point,
)
from opened import LoadedBackbone
from PIL import Image, ImageDraw
from reading import in_colors
from uploading import open_pixels

from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

PCA, SIMILARITY, ATTENTION, ROLLOUT = "PCA of features", "Similarity to the point", "Attention", "Attention rollout"
FOREGROUND, HEADS = "PCA of the foreground", "Attention of every head"
KINDS = [PCA, FOREGROUND, SIMILARITY, ATTENTION, HEADS, ROLLOUT]
OF_ATTENTION = (ATTENTION, HEADS, ROLLOUT)
FROM_CLS, FROM_POINT = "CLS token", "the point"
NO_BACKBONE, TWIN = "none", "the same with random weights"
MIN_RESOLUTION, MAX_RESOLUTION = 4, 48
OPACITY = 0.75


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
        adjustment: settings for reading the image.
    """

    kind: str
    layers: tuple[int | None, ...]
    head: int
    from_point: bool
    point: tuple[float, float]
    resolution: int
    opacity: float = OPACITY
    adjustment: Adjustment = Adjustment()

    @property
    def has_point(self) -> bool:
        return self.kind == SIMILARITY or (self.kind in OF_ATTENTION and self.from_point)

    def layer_of(self, backbone: LoadedBackbone, index: int) -> int:
        layer = self.layers[index] if index < len(self.layers) else None
        return min(int(layer or backbone.depth), backbone.depth)

    def values(self, backbone: LoadedBackbone, layer: int, image: np.ndarray, features: torch.Tensor) -> torch.Tensor:
        """Compute the map, of shape `(rows, columns)`, or `(n, rows, columns)` for principal scores and all heads."""
        place = patch_at(self.point, *features.shape[1:])
        if self.kind == PCA:
            return principal_scores(features)
        if self.kind == FOREGROUND:
            return foreground_scores(features)
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

    def caption(self, kind: str) -> str:
        where = "all layers" if kind == ROLLOUT else f"layer {self.layer} of {self.depth}"
        return f"{kind} of {self.name}, {where}"


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
    own = "red, green and blue are the first three principal components"
    if view.kind == PCA:
        scores = [maps[0], *(align_scores(other, maps[0]) for other in maps[1:])]
        meanings = [own] + [f"{own}, rotated to match those of the first backbone"] * (len(maps) - 1)
        return [
            (draw_map(colors_of(one), image, opacity=view.opacity), meaning) for one, meaning in zip(scores, meanings)
        ]
    if view.kind == FOREGROUND:
        return [
            (draw_foreground(one, image, view.opacity), f"{own} of the foreground; the rest is gray") for one in maps
        ]
    if view.kind == HEADS:
        return [
            (draw_heads(one, image, view.opacity), "each head from its minimum (dark) to its maximum (bright)")
            for one in maps
        ]
    return [heat_map(one, image, view) for one in maps]


def heat_map(values: torch.Tensor, image: np.ndarray, view: View, has_point: bool = True) -> tuple[Image.Image, str]:
    """Draw a map of one value a patch and return the picture with its meaning."""
    low, high = values.min().item(), 1.0 if view.kind == SIMILARITY else values.max().item()
    point = view.point if view.has_point and has_point else None
    picture = draw_map(heat_of(values, low, high), image, point, view.opacity)
    return picture, f"from dark, {low:.3g}, to bright, {high:.3g}"


def draw_foreground(scores: torch.Tensor, image: np.ndarray, opacity: float) -> Image.Image:
    """Draw the colors of the foreground; the background shows the image in gray."""
    colored = draw_map(colors_of(scores.nan_to_num()), image, opacity=opacity)
    gray = draw_map(np.zeros((*scores.shape[1:], 3), np.uint8), image, opacity=0.0)
    inside = Image.fromarray(scores[0].isfinite().numpy().astype(np.uint8) * 255)
    return Image.composite(colored, gray, inside.resize(colored.size, Image.Resampling.NEAREST))


def draw_heads(values: torch.Tensor, image: np.ndarray, opacity: float) -> Image.Image:
    """Draw the maps of all heads on a numbered sheet. Each map has its own color range."""
    columns = math.ceil(math.sqrt(len(values)))
    pictures = [draw_map(heat_of(one), image, opacity=opacity) for one in values]
    width, height = (max(1, side // columns) for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(values) / columns) * height))
    for index, picture in enumerate(pictures):
        small = picture.resize((width, height), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(small)
        pen.text((4, 2), str(index + 1), fill="white", stroke_width=2, stroke_fill="black", font_size=18)
        sheet.paste(small, (index % columns * width, index // columns * height))
    return sheet


def elsewhere(models: Models, path: str, second_path: str, one: Seen, view: View) -> tuple[Image.Image, str]:
    """Draw the similarity of another image to the patch at the point, by backbone and layer of a map."""
    place = patch_at(view.point, *one.features.shape[1:])
    with turn():
        others = features_of(models, second_path, one.name, view.resolution, one.layer)
    values = similarity_elsewhere(one.features, *place, others)
    return heat_map(values, image_of(models, second_path, one.name).rgb, view, has_point=False)
