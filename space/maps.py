"""Maps of a backbone's patch features and attention: PCA, similarity to a point, attention, rollout.

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


def similarity_to_point(features: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Return the cosine similarity of every patch to one patch.

    Args:
        features: of shape `(channels, rows, columns)`.

    Returns:
        float32 of shape `(rows, columns)` in [-1, 1].
    """
    return F.cosine_similarity(features, features[:, row, column, None, None], dim=0)


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


def similarity_elsewhere(features: torch.Tensor, row: int, column: int, others: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of the patches of another image, `others`, to a patch of the first image."""
    return F.cosine_similarity(others, features[:, row, column, None, None], dim=0)


def heat_of(values: torch.Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Convert values to colors from dark (`low`, default: the minimum) to bright (`high`, default: the maximum).

    Returns:
        uint8 of shape `(rows, columns, 3)`.
    """
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    unit = ((values - low) / (high - low if high > low else 1)).clamp(0, 1).numpy()
    return colormaps["inferno"](unit, bytes=True)[..., :3]


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
    """Draw a ring around a point, given as fractions from the left and from the top, on a copy of a picture."""
    y, x = np.ogrid[: picture.height, : picture.width]
    distance = np.hypot(x - point[0] * picture.width, y - point[1] * picture.height)
    pixels = np.array(picture)
    pixels[(distance >= 5) & (distance < 11)] = 0
    pixels[(distance >= 6.5) & (distance < 9.5)] = 255
    return Image.fromarray(pixels)


def boxed(image: np.ndarray, window: tuple[float, float, float, float]) -> Image.Image:
    """Draw the outline of a window, given as fractions of the sides, on a uint8 RGB image at display size."""
    picture = Image.fromarray(image).resize(display_size(*image.shape[:2]))
    left, top, right, bottom = (at * side for at, side in zip(window, picture.size * 2))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=6)
    pen.rectangle((left, top, right, bottom), outline="white", width=2)
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
