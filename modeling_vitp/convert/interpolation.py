"""Interpolation between the weights of a ViT before and after a training, which keeps more of what the ViT knew."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling_vitp_backbone import open_vit, resize_backbone, square
from ..vision_towers import pair


def interpolate_vit(
    start: str | Path | PreTrainedModel,
    trained: str | Path | PreTrainedModel,
    alpha: float,
) -> PreTrainedModel:
    """Return the ViT with the weights `start + alpha * (trained - start)` (WiSE-FT, arXiv 2109.01903).

    With 1 the weights are those of `trained`, with 0 those of `start`, to the bit. `start` is resized to the images of
    `trained`.

    Args:
        start: ViT before the training, see [`~modeling_vitp.modeling_vitp_backbone.open_vit`].
        trained: ViT after it.
        alpha: share of the way from `start` to `trained`, from 0 to 1.

    Returns:
        A new model with the configuration of `trained`, in evaluation mode.

    Raises:
        ValueError: if `alpha` is not in [0, 1], or the two ViTs differ in the names or shapes of their weights.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
    model = copy.deepcopy(open_vit(trained))
    start_vit = open_vit(start)
    if pair(start_vit.config.image_size) != pair(model.config.image_size):
        start_vit = resize_backbone(start_vit, image_size=square(model.config.image_size, "image_size"))
    start_weights = start_vit.state_dict()
    weights = model.state_dict()
    for name in sorted(start_weights.keys() | weights.keys()):
        start_shape = start_weights[name].shape if name in start_weights else None
        shape = weights[name].shape if name in weights else None
        if start_shape != shape:
            raise ValueError(
                f"Expected one ViT before and after a training, but {name} has the shape {start_shape} in `start` and "
                f"{shape} in `trained`."
            )
    for name, weight in weights.items():
        if weight.is_floating_point():
            start_weight = start_weights[name].to(weight)
            weight.copy_(torch.lerp(start_weight, weight, alpha))
    return model.eval()
