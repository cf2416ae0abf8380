"""Models for other bands than red, green and blue: the names of the bands, and the weights that they start with."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import InternVLVisionConfig, PreTrainedConfig, PreTrainedModel

COLORS = (("red", "b4", "b04"), ("green", "b3", "b03"), ("blue", "b2", "b02"))  # numbered as Sentinel-2 does
# Of the ViT, and of the adapter's stem: the convolutions that are given the image.
FIRST_CONVOLUTIONS = ("patch_embeddings.projection", "spatial_prior.stem.0")


def spread_bands(model: PreTrainedModel, band_names: Sequence[str]) -> PreTrainedModel:
    r"""Makes of a model for three channels, red, green and blue, one for other bands, in place.

    The kernels that are given the image, those of the patches and, with an adapter, of its stem, are spread: each band
    has the weights of one color, times three divided by the number of bands. Bands that are red, green and blue by
    their names (`red` … or, as Sentinel-2 numbers them, `B4` or `B04` …), if all three are there, have their own
    color's. The others take the three in turn, as in timm (`adapt_input_conv`, of
    https://github.com/huggingface/pytorch-image-models), and the last ones, where three do not divide them, the mean
    of the three. So an image that has the same values in all its bands gives what it gives in the model for three.

    Args:
        model ([`ViTPVisionModel`], [`ViTPBackbone`], [`ViTPAdapter`], [`ViTPForConditionalGeneration`] …):
            Any model with a ViT of ViTP's or of transformers' InternVL in it.
        band_names (`Sequence[str]`):
            Of the channels, in their order.

    Returns:
        The model. Its configuration has the `band_names`, and their number as `num_channels`.

    Raises:
        ValueError: if the names are empty or twice the same, or the model is one for other bands already.
    """
    names = check_band_names(band_names)
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    changed = [spread_config(config, names) for config in configs.values()]
    if not any(changed):
        return model
    for name, module in model.named_modules():
        if name.endswith(FIRST_CONVOLUTIONS):
            module.weight = nn.Parameter(spread_kernel(module.weight.detach(), names), module.weight.requires_grad)
            module.in_channels = len(names)
        elif name.endswith("patch_embeddings"):
            module.num_channels = len(names)
    return model


def spread_config(config: PreTrainedConfig, band_names: Sequence[str]) -> bool:
    """Has the configuration of a model, or of the ViT in it, say the bands; whether it did not yet.

    Raises:
        ValueError: if it is for other bands.
    """
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    parts = [part for part in parts if isinstance(part, InternVLVisionConfig)]
    changed = False
    for part in parts:
        own = getattr(part, "band_names", None)
        if own == list(band_names):
            continue
        if own is not None or part.num_channels != 3:
            takes = describe_bands(own) if own else f"{part.num_channels} channels"
            raise ValueError(f"the model takes {takes}; only one for red, green and blue can be spread over others.")
        part.band_names, part.num_channels, changed = list(band_names), len(band_names), True
    return changed


def spread_kernel(weight: torch.Tensor, band_names: Sequence[str]) -> torch.Tensor:
    """A kernel `(out, 3, height, width)` as one `(out, bands, height, width)`, see [`spread_bands`]."""
    return (spread(weight.float(), band_names, dim=1) * (3 / len(band_names))).to(weight.dtype)


def spread(values: torch.Tensor, band_names: Sequence[str], dim: int = 0) -> torch.Tensor:
    """What is given for red, green and blue along `dim`, for each band: that of its color, or the mean of the three."""
    sources = torch.cat([values, values.mean(dim, keepdim=True)], dim)
    return sources.index_select(dim, torch.tensor(band_sources(band_names), device=values.device))


def band_sources(band_names: Sequence[str]) -> list[int]:
    """Of each band 0 for red, 1 for green, 2 for blue or 3 for the mean of these; each color is there as often."""
    colors = {band: color for color, band in enumerate(color_bands(band_names) or ())}
    others = [band for band in range(len(band_names)) if band not in colors]
    whole = len(others) // 3 * 3
    colors |= {band: place % 3 if place < whole else 3 for place, band in enumerate(others)}
    return [colors[band] for band in range(len(band_names))]


def color_bands(band_names: Sequence[str]) -> list[int] | None:
    """Which bands are red, green and blue by their names, if all three are there."""
    lower = [name.lower() for name in band_names]
    found = [next((lower.index(name) for name in names if name in lower), None) for names in COLORS]
    return None if None in found else found


def check_band_names(band_names: Sequence[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: if there is none, or one is empty or there twice.
    """
    is_list = isinstance(band_names, (list, tuple)) and all(isinstance(name, str) and name for name in band_names)
    if not is_list or not band_names or len({*band_names}) < len(band_names):
        raise ValueError(f"band_names={band_names!r}, but a list of different names, one for each band, is needed.")
    return list(band_names)


def describe_bands(band_names: Sequence[str]) -> str:
    """For messages: how many bands, and which."""
    return f"{len(band_names)} band{'s' * (len(band_names) > 1)} ({', '.join(band_names)})"


def check_same_bands(what: str, own: Sequence[str] | None, where: str, given: Sequence[str] | None) -> None:
    """Raises a `ValueError` unless `what`, a model, takes the bands that `where`, data or a processor, has."""
    if list(own or []) != list(given or []):
        own, given = (describe_bands(names) if names else "red, green and blue" for names in (own, given))
        raise ValueError(f"{what} takes {own}, but {where} has {given}.")


__all__ = ["spread_bands"]
