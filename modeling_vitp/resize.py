"""Another patch size and another image size for a trained ViT, as dense tasks want them."""

import torch
from torch import nn
from transformers import InternVLVisionModel

PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"


def resize_backbone(
    model: InternVLVisionModel, patch_size: int | None = None, image_size: int | None = None
) -> InternVLVisionModel:
    """A copy of a ViT with its patch kernel and position grid resampled bicubically, in float32.

    The usual step to dense tasks: patches of 14 and images of 448 pixels become 16 and 512, which keeps the grid of 32.
    The stored grid is square; the model interpolates it at run time for images of another aspect ratio.

    Args:
        model: the ViT, ours or transformers' own; the copy has its class and dtype.
        patch_size: side of a patch in pixels; as it is if not given.
        image_size: side of an image in pixels, a multiple of the patch size; as it is if not given.

    Raises:
        ValueError: if a size is not positive, or the image is not whole patches.
    """
    patch_size = square(model.config.patch_size if patch_size is None else patch_size, "patch_size")
    image_size = square(model.config.image_size if image_size is None else image_size, "image_size")
    if image_size % patch_size:
        raise ValueError(f"image_size={image_size} is no multiple of patch_size={patch_size}.")
    fields = model.config.to_dict() | {"patch_size": [patch_size, patch_size], "image_size": [image_size, image_size]}
    state = model.state_dict()
    state[PATCH_KERNEL] = resample(state[PATCH_KERNEL], patch_size)
    if POSITIONS in state:
        state[POSITIONS] = resample_positions(state[POSITIONS], image_size // patch_size)
    with torch.device("meta"):
        # The fields do not say which attention the model was asked for.
        attention = model.config._attn_implementation
        resized = type(model)(type(model.config).from_dict(fields, attn_implementation=attention))
    resized.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return resized.train(model.training)


def square(size: int | list[int] | tuple[int, ...], name: str) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    side = sides.pop()
    if sides or side < 1:
        raise ValueError(f"{name}={size}, but one positive size is needed: stored grids and patches are square.")
    return side


def resample(maps: torch.Tensor, side: int) -> torch.Tensor:
    """`(n, c, height, width)` to `(n, c, side, side)`, in the dtype that was given."""
    if maps.shape[-2:] == (side, side):
        return maps
    resampled = nn.functional.interpolate(maps.float(), size=(side, side), mode="bicubic", align_corners=False)
    return resampled.to(maps.dtype)


def resample_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """`(1, 1 + n², c)` to `(1, 1 + side², c)`; the CLS token's, which comes first, stays."""
    cls_position, grid = positions[:, :1], positions[:, 1:]
    old_side = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    return torch.cat([cls_position, resample(grid, side).flatten(2).transpose(1, 2)], dim=1)
