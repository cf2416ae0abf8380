"""Models for other bands than red, green and blue: names of the bands and initial weights."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import InternVLVisionConfig, PreTrainedConfig, PreTrainedModel

COLORS = (("red", "b4", "b04"), ("green", "b3", "b03"), ("blue", "b2", "b02"))  # with the band numbers of Sentinel-2
# The convolutions of the ViT and of the adapter's stem that read the image.
FIRST_CONVOLUTIONS = ("patch_embeddings.projection", "spatial_prior.stem.0")


def spread_bands(model: PreTrainedModel, band_names: Sequence[str]) -> PreTrainedModel:
    r"""Convert a model for red, green and blue to one for other bands, in place.

    The convolutions that read the image (the patch embeddings and, in an adapter, the first layer of its stem) get
    one kernel for each band: that of one color, times three divided by the number of bands. If red, green and blue
    are all recognized by their names (`red` … or, as Sentinel-2 numbers them, `B4` or `B04` …), these bands keep the
    kernels of their colors. The other bands take the three colors in turn, as in timm (`adapt_input_conv`, of
    https://github.com/huggingface/pytorch-image-models); if their number is not a multiple of three, the last ones
    take the mean of the three. An image with the same values in all bands therefore has the same output as before.

    Args:
        model ([`ViTPVisionModel`], [`ViTPBackbone`], [`ViTPAdapter`], [`ViTPForConditionalGeneration`] …):
            Any model that contains a ViT of ViTP or of transformers' InternVL.
        band_names (`Sequence[str]`):
            Names of the channels, in their order.

    Returns:
        The model. Its configuration has the `band_names`, and their number as `num_channels`.

    Raises:
        ValueError: if a name is missing, empty or repeated, the model already takes other bands, or its ViT is of
            another family.
    """
    names = check_band_names(band_names)
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    if not any(isinstance(config, InternVLVisionConfig) for config in configs.values()):
        kind = model.config.model_type
        raise ValueError(f"band_names: only InternViT takes other bands than RGB, and {kind!r} has none.")
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
    """Set the bands in the configuration of a model, or of its ViT, and return whether the configuration changed.

    Raises:
        ValueError: if the configuration is for other bands, or for a neck on a ViT of another family.
    """
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    parts = [part for part in parts if isinstance(part, InternVLVisionConfig)]
    changed = False
    for part in parts:
        if (vit := getattr(part, "vit_config", None)) is not None:
            raise ValueError(f"band_names: only InternViT takes other bands than RGB, not {vit.model_type!r}.")
        own = getattr(part, "band_names", None)
        if own == list(band_names):
            continue
        if own is not None or part.num_channels != 3:
            takes = describe_bands(own) if own else f"{part.num_channels} channels"
            raise ValueError(f"Expected a model for red, green and blue, got one that takes {takes}.")
        part.band_names, part.num_channels, changed = list(band_names), len(band_names), True
    return changed


def spread_kernel(weight: torch.Tensor, band_names: Sequence[str]) -> torch.Tensor:
    """Return a kernel `(out, 3, height, width)` as one `(out, bands, height, width)`, see [`spread_bands`]."""
    return (spread(weight.float(), band_names, dim=1) * (3 / len(band_names))).to(weight.dtype)


def spread(values: torch.Tensor, band_names: Sequence[str], dim: int = 0) -> torch.Tensor:
    """Spread values for red, green and blue along `dim` over the bands: each takes its color's or their mean."""
    sources = torch.cat([values, values.mean(dim, keepdim=True)], dim)
    return sources.index_select(dim, torch.tensor(band_sources(band_names), device=values.device))


def band_sources(band_names: Sequence[str]) -> list[int]:
    """Return each band's color: 0 red, 1 green, 2 blue, 3 the mean of the three. Colors are equally frequent."""
    colors = {band: color for color, band in enumerate(color_bands(band_names) or ())}
    others = [band for band in range(len(band_names)) if band not in colors]
    whole = len(others) // 3 * 3
    colors |= {band: index % 3 if index < whole else 3 for index, band in enumerate(others)}
    return [colors[band] for band in range(len(band_names))]


def color_bands(band_names: Sequence[str]) -> list[int] | None:
    """Return the indices of the red, green and blue bands by their names, or `None` unless all three are found."""
    lower = [name.lower() for name in band_names]
    found = [next((lower.index(name) for name in names if name in lower), None) for names in COLORS]
    return None if None in found else found


def check_band_names(band_names: Sequence[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: if the list is empty, or a name is empty or repeated.
    """
    is_list = isinstance(band_names, (list, tuple)) and all(isinstance(name, str) and name for name in band_names)
    if not is_list or not band_names or len({*band_names}) < len(band_names):
        raise ValueError(f"Expected `band_names` to be different names, one for each band, got {band_names!r}.")
    return list(band_names)


def describe_bands(band_names: Sequence[str]) -> str:
    """Return the number and the names of bands for a message."""
    return f"{len(band_names)} band{'s' * (len(band_names) > 1)} ({', '.join(band_names)})"


def check_same_bands(what: str, own: Sequence[str] | None, where: str, given: Sequence[str] | None) -> None:
    """Raise a `ValueError` unless `what` (a model) takes the bands that `where` (data or a processor) has."""
    if list(own or []) != list(given or []):
        own, given = (describe_bands(names) if names else "red, green and blue" for names in (own, given))
        raise ValueError(f"{what} takes {own}, but {where} has {given}.")


__all__ = ["spread_bands"]
