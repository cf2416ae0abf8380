"""Maps of what a backbone makes of an image: PCA of its patch features, similarity to a point, attention.

An image is resized to whole patches at its own aspect ratio, so that a map of `(rows, columns)` spans all of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from matplotlib import colormaps
from opened import LoadedBackbone
from PIL import Image, ImageDraw
from torch.nn import functional as F

from modeling_vitp.images.pixels import principal_scores

DISPLAY_SIDE = 768


def grid_of(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Rows and columns of patches for an image: `resolution` along its longer side, at least one along the other."""
    longer = max(height, width)
    return max(1, round(resolution * height / longer)), max(1, round(resolution * width / longer))


def pixel_values(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """The image as the backbone takes it.

    Args:
        image: uint8 RGB of shape `(height, width, 3)`, or of other bands float32 of shape `(height, width, bands)` in
            [0, 1].
        resolution: patches along the longer side.
        grid: rows and columns of patches instead, for an image whose proportions are nearly theirs.

    Returns:
        Of shape `(1, bands, rows * patch, columns * patch)`, normalised, on the backbone's device and in its dtype.
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
    """Features of the patches after a layer.

    Args:
        image, resolution, grid: as for [`pixel_values`].
        layer: from 1; the last if not given, for which it is the `last_hidden_state`.

    Returns:
        float32 of shape `(channels, rows, columns)`, on the CPU.
    """
    return backbone.states(pixel_values(backbone, image, resolution, grid), layer or backbone.depth).float().cpu()


def attention_heads(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, layer: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Attention of one token to the patches in each head of a layer.

    Args:
        image, resolution: as for [`pixel_values`].
        layer: from 1.
        query: row and column of the patch that attends; the CLS token if not given.

    Returns:
        float32 of shape `(heads, rows, columns)` on the CPU; each with what goes to the CLS token sums to 1.
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
    """As [`attention_heads`], of one head, from 1, or the mean of all: of shape `(rows, columns)`."""
    heads = attention_heads(backbone, image, resolution, layer, query)
    return heads.mean(0) if head is None else heads[head - 1]


def rollout_map(
    backbone: LoadedBackbone, image: np.ndarray, resolution: int, query: tuple[int, int] | None = None
) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928) of one token to the patches of the input.

    Each layer passes on half by its residual connection and half by the mean attention of its heads; the product over
    all layers is what reaches the token.

    Args:
        image, resolution, query: as for [`attention_map`].

    Returns:
        float32 of shape `(rows, columns)` on the CPU; with what comes from the CLS token it sums to 1.
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


def similarity_to_point(features: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Cosine similarity of every patch to one.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        float32 of shape `(rows, columns)` in [-1, 1].
    """
    return F.cosine_similarity(features, features[:, row, column, None, None], dim=0)


def foreground_scores(features: torch.Tensor) -> torch.Tensor:
    """Principal scores of the patches that differ from those along the border, where the background is as a rule.

    The foreground is where the score on the first component has another sign than most of the border.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        float64 of shape `(3, rows, columns)`, NaN in the background; of an image without a foreground everywhere.
    """
    first = principal_scores(features)[0]
    border = torch.cat([first[0], first[-1], first[:, 0], first[:, -1]])
    inside = first * (1 if border.sign().sum() <= 0 else -1) > 0
    scores = torch.full((3, *first.shape), torch.nan, dtype=torch.float64)
    if inside.any():
        scores[:, inside] = principal_scores(features[:, inside].unsqueeze(-1)).squeeze(-1)
    return scores


def similarity_elsewhere(features: torch.Tensor, row: int, column: int, others: torch.Tensor) -> torch.Tensor:
    """As [`similarity_to_point`], of the patches of another image, `others`, to a patch of the first."""
    return F.cosine_similarity(others, features[:, row, column, None, None], dim=0)


def heat_of(values: torch.Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values as colours from dark to bright, from `low` to `high` (the smallest and the largest if not given).

    Returns:
        uint8 of shape `(rows, columns, 3)`.
    """
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    unit = ((values - low) / (high - low if high > low else 1)).clamp(0, 1).numpy()
    return colormaps["inferno"](unit, bytes=True)[..., :3]


def display_size(height: int, width: int) -> tuple[int, int]:
    """Width and height in pixels at which an image of another height and width, and its maps, are shown."""
    scale = DISPLAY_SIDE / max(height, width)
    return max(1, round(scale * width)), max(1, round(scale * height))


def draw_map(
    colors: np.ndarray, image: np.ndarray, point: tuple[float, float] | None = None, opacity: float = 1.0
) -> Image.Image:
    """A map over its image as a picture in the image's proportions, each patch a block of one colour.

    Args:
        colors: uint8 of shape `(rows, columns, 3)`.
        image: uint8 RGB of shape `(height, width, 3)`.
        point: fractions from the left and from the top of a place to be ringed.
        opacity: of the map over the image.
    """
    size = display_size(*image.shape[:2])
    picture = Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)
    if opacity < 1:
        under = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
        picture = Image.blend(under, picture, opacity)
    return picture if point is None else ringed(picture, point)


def patch_at(point: tuple[float, float], rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the patch at fractions from the left and from the top."""
    x, y = point
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def ringed(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy with a ring around a point, in fractions from the left and from the top."""
    y, x = np.ogrid[: picture.height, : picture.width]
    distance = np.hypot(x - point[0] * picture.width, y - point[1] * picture.height)
    pixels = np.array(picture)
    pixels[(distance >= 5) & (distance < 11)] = 0
    pixels[(distance >= 6.5) & (distance < 9.5)] = 255
    return Image.fromarray(pixels)


def boxed(image: np.ndarray, window: tuple[float, float, float, float]) -> Image.Image:
    """An image, uint8 RGB, as it is shown, with the outline of a part of it, in fractions of its sides."""
    picture = Image.fromarray(image).resize(display_size(*image.shape[:2]))
    left, top, right, bottom = (at * side for at, side in zip(window, picture.size * 2))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=6)
    pen.rectangle((left, top, right, bottom), outline="white", width=2)
    return picture


def _token(weights: torch.Tensor, query: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """The index of a token: those of the patches are the last ones, the CLS token is the first of what precedes them.

    Raises:
        ValueError: if there is no CLS token.
    """
    prefix = weights.shape[-1] - grid[0] * grid[1]
    if query is None and not prefix:
        raise ValueError("This ViT has no CLS token: choose the attention of the point.")
    return 0 if query is None else prefix + query[0] * grid[1] + query[1]


def _map_of(weights: torch.Tensor, grid: tuple[int, int], image: np.ndarray, resolution: int) -> torch.Tensor:
    """What goes to the patches, the last dimension, as rows and columns, without those of a padding."""
    rows, columns = grid_of(*image.shape[:2], resolution)
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)[..., :rows, :columns]


@contextmanager
def _attention_of(backbone: LoadedBackbone, layers: Sequence[int], reduce) -> Iterator[list[torch.Tensor]]:
    """Collects `reduce(weights)`, of weights `(heads, tokens, tokens)`, of some layers as they are computed.

    `output_attentions` would keep the weights of all layers, which takes gigabytes for a ViT-L.
    """
    collected: list[torch.Tensor] = []

    def collector(place: int):
        def collect(module, inputs, outputs):
            if outputs[place] is None:
                raise RuntimeError(
                    f"{backbone.name} was not loaded with eager attention: there are no weights to show."
                )
            collected.append(reduce(outputs[place][0]).float().cpu())

        return collect

    found = backbone.attention_layers()
    handles = [found[index][0].register_forward_hook(collector(found[index][1])) for index in layers]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
