"""Models for other bands than red, green and blue: names of the bands and initial weights."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import InternVLVisionConfig, PreTrainedConfig, PreTrainedModel

COLORS = (("red", "b4", "b04"), ("green", "b3", "b03"), ("blue", "b2", "b02"))  # with the band numbers of Sentinel-2
MEAN_COLOR = 3  # of a band that takes the mean of red (0), green (1) and blue (2)
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
    band_names = check_band_names(band_names)
    configs = configs_of(model)
    if not any(isinstance(config, InternVLVisionConfig) for config in configs):
        model_type = model.config.model_type
        raise ValueError(f"band_names: only InternViT takes other bands than RGB, and {model_type!r} has none.")
    is_changed = False
    for config in configs:
        if spread_config(config, band_names):
            is_changed = True
    if not is_changed:
        return model
    for name, module in model.named_modules():
        if name.endswith(FIRST_CONVOLUTIONS):
            kernel = spread_kernel(module.weight.detach(), band_names)
            module.weight = nn.Parameter(kernel, requires_grad=module.weight.requires_grad)
            module.in_channels = len(band_names)
        elif name.endswith("patch_embeddings"):
            module.num_channels = len(band_names)
    return model


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the different configurations of the modules of a model."""
    configs = {}
    for module in model.modules():
        # By `vars`, because `getattr` of a wrapper may return the configuration of the module in it.
        config = vars(module).get("config")
        if config is not None:
            configs[id(config)] = config
    return list(configs.values())


def spread_config(config: PreTrainedConfig, band_names: Sequence[str]) -> bool:
    """Set the bands in the configuration of a model, or of its ViT, and return whether the configuration changed.

    Raises:
        ValueError: if the configuration is for other bands, or for a neck on a ViT of another family.
    """
    candidates = [
        config,
        getattr(config, "vision_config", None),
        getattr(config, "backbone_config", None),
    ]
    is_changed = False
    for vision_config in candidates:
        if not isinstance(vision_config, InternVLVisionConfig):
            continue
        vit_config = getattr(vision_config, "vit_config", None)
        if vit_config is not None:
            raise ValueError(f"band_names: only InternViT takes other bands than RGB, not {vit_config.model_type!r}.")
        model_bands = getattr(vision_config, "band_names", None)
        if model_bands == list(band_names):
            continue
        if model_bands is not None or vision_config.num_channels != 3:
            model_input = f"{vision_config.num_channels} channels"
            if model_bands:
                model_input = describe_bands(model_bands)
            raise ValueError(f"Expected a model for red, green and blue, got one that takes {model_input}.")
        vision_config.band_names = list(band_names)
        vision_config.num_channels = len(band_names)
        is_changed = True
    return is_changed


def spread_kernel(weight: torch.Tensor, band_names: Sequence[str]) -> torch.Tensor:
    """Return a kernel `(out, 3, height, width)` as one `(out, bands, height, width)`, see [`spread_bands`]."""
    kernel = spread(weight.float(), band_names, dim=1)
    kernel = kernel * (3 / len(band_names))
    return kernel.to(weight.dtype)


def spread(values: torch.Tensor, band_names: Sequence[str], dim: int = 0) -> torch.Tensor:
    """Spread values for red, green and blue along `dim` over the bands: each takes its color's or their mean."""
    mean = values.mean(dim, keepdim=True)
    sources = torch.cat([values, mean], dim)
    indices = torch.tensor(band_sources(band_names), device=values.device)
    return sources.index_select(dim, indices)


def band_sources(band_names: Sequence[str]) -> list[int]:
    """Return each band's color: 0 red, 1 green, 2 blue, 3 the mean of the three. Colors are equally frequent."""
    colors = color_bands(band_names) or []
    other_bands = [band for band in range(len(band_names)) if band not in colors]
    # The largest multiple of three, so that each color is taken equally often.
    num_in_turn = len(other_bands) // 3 * 3

    sources = [MEAN_COLOR] * len(band_names)
    for color, band in enumerate(colors):
        sources[band] = color
    for index, band in enumerate(other_bands[:num_in_turn]):
        sources[band] = index % 3
    return sources


def color_bands(band_names: Sequence[str]) -> list[int] | None:
    """Return the indices of the red, green and blue bands by their names, or `None` unless all three are found."""
    lower_names = [name.lower() for name in band_names]
    indices = []
    for color_names in COLORS:
        for color_name in color_names:
            if color_name in lower_names:
                index = lower_names.index(color_name)
                indices.append(index)
                break
    if len(indices) < len(COLORS):
        return None
    return indices


def check_band_names(band_names: Sequence[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: if the list is empty, or a name is empty or repeated.
    """
    is_list = isinstance(band_names, (list, tuple)) and len(band_names) > 0
    are_names = is_list and all(isinstance(name, str) and name for name in band_names)
    if not are_names or len(set(band_names)) < len(band_names):
        raise ValueError(f"Expected `band_names` to be different names, one for each band, got {band_names!r}.")
    return list(band_names)


def describe_bands(band_names: Sequence[str]) -> str:
    """Return the number and the names of bands for a message."""
    noun = "band" if len(band_names) == 1 else "bands"
    return f"{len(band_names)} {noun} ({', '.join(band_names)})"


def check_same_bands(
    model: str,
    model_bands: Sequence[str] | None,
    source: str,
    source_bands: Sequence[str] | None,
) -> None:
    """Raise a `ValueError` unless a model takes the bands that `source` (data or a processor) has.

    Both are described in words. Bands that are not named are red, green and blue.
    """
    if list(model_bands or []) == list(source_bands or []):
        return
    model_input = describe_bands(model_bands) if model_bands else "red, green and blue"
    source_output = describe_bands(source_bands) if source_bands else "red, green and blue"
    raise ValueError(f"{model} takes {model_input}, but {source} has {source_output}.")


__all__ = ["spread_bands"]
