"""Families of vision transformers that a vision-language model and the task models can be built on.

A family is described once, by the names that its model in transformers uses. [`register_tower`] adds one, also from
outside this package.
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

TOWERS: dict[str, "VisionTower"] = {}


def register_tower(*model_types: str):
    """Return a decorator that adds an instance of a [`VisionTower`] for `model_types`."""

    def register(tower: type["VisionTower"]) -> type["VisionTower"]:
        for model_type in model_types:
            TOWERS[model_type] = tower()
        return tower

    return register


def tower_of(config: PreTrainedConfig) -> "VisionTower":
    """Return the family of a ViT's configuration.

    Raises:
        ValueError: if the family is not registered.
    """
    if config.model_type not in TOWERS:
        raise ValueError(
            f"Expected a vision transformer of a known family, got {config.model_type!r}. Known: {', '.join(TOWERS)}."
        )
    return TOWERS[config.model_type]


def other_families() -> list[str]:
    """Return the model types of the registered families except InternViT."""
    return [model_type for model_type in TOWERS if not model_type.startswith(("internvl_", "vitp_"))]


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Return a height and a width from one side or from both."""
    if isinstance(size, int):
        return size, size
    return tuple(size)


def like(stored_size: int | list[int], size: tuple[int, int]) -> int | list[int]:
    """Return a size as a configuration stores it, as one side or as both."""
    if isinstance(stored_size, int):
        return size[0]
    return list(size)


class VisionTower:
    """Family of vision transformers whose models have the names of InternViT and DINOv2.

    After [`prepare`], a configuration has `hidden_size`, `num_hidden_layers`, `num_channels`, `image_size` and
    `patch_size`.

    Attributes:
        embeddings: prefixes of the parameters before the first layer.
        prefix_tokens: ends of the names of the CLS token and the registers.
        layers: path of the layers in the model.
        norm: path of the norm after the last layer, `None` if `last_hidden_state` is not normalized.
        patch_kernel: name of the weight that embeds the patches.
        positions: name of the position embeddings, `None` for rotary positions.
        interpolates: whether the model interpolates its position embeddings on request only.
        unused: modules and parameters that the patch features do not depend on, such as poolers. They are not trained.
        left_out: modules within a larger model that the ViT of this package does not have.
        layer_inputs: arguments of each layer.
    """

    embeddings: tuple[str, ...] = ("embeddings.",)
    prefix_tokens: tuple[str, ...] = ("cls_token", "register_tokens")
    layers = "encoder.layer"
    norm: str | None = "layernorm"
    patch_kernel = "embeddings.patch_embeddings.projection.weight"
    positions: str | None = "embeddings.position_embeddings"
    interpolates = False
    unused: tuple[str, ...] = ("embeddings.mask_token",)
    left_out: tuple[str, ...] = ()
    layer_inputs: dict[str, Any] = {}

    def prepare(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return a copy of a configuration for feature maps of images of any size."""
        return copy.deepcopy(config)

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        """Return the number of tokens before the patches: the CLS token and registers."""
        return 1 + getattr(config, "num_register_tokens", 0)

    def resize(
        self,
        config: PreTrainedConfig,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
    ) -> PreTrainedConfig:
        """Return a copy of a configuration for other sizes."""
        config = copy.deepcopy(config)
        config.image_size = like(config.image_size, image_size)
        config.patch_size = like(config.patch_size, patch_size)
        return config

    def set_depth(self, config: PreTrainedConfig, num_layers: int) -> None:
        """Change the number of layers of a configuration."""
        config.num_hidden_layers = num_layers

    def has_stochastic_depth(self, config: PreTrainedConfig) -> bool:
        """Return whether layers can be skipped at random in training."""
        return hasattr(config, "drop_path_rate")

    def drop_path_rate(self, config: PreTrainedConfig) -> float:
        """Return the rate of stochastic depth of a configuration, 0 if the family has none."""
        return getattr(config, "drop_path_rate", 0.0)

    def set_drop_path_rate(self, config: PreTrainedConfig, rate: float) -> None:
        """Change the rate of stochastic depth of a configuration.

        Raises:
            ValueError: if the family has no stochastic depth.
        """
        if not self.has_stochastic_depth(config):
            raise ValueError(f"drop_path_rate={rate}: {config.model_type!r} has no stochastic depth. Set it to null.")
        config.drop_path_rate = rate

    def resample_kernel(
        self,
        kernel: torch.Tensor,
        config: PreTrainedConfig,
        side: int,
    ) -> torch.Tensor:
        """Interpolate the kernel of the patch embedding to patches of `side` pixels."""
        return resample(kernel, side)

    def inputs(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
    ) -> dict[str, Any]:
        """Return the arguments of the model's `forward` for images `(batch_size, num_channels, height, width)`."""
        inputs = {"pixel_values": pixel_values}
        if self.interpolates:
            inputs["interpolate_pos_encoding"] = True
        return inputs

    def run(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        **options,
    ) -> ModelOutput:
        """Return the outputs of the model, with `last_hidden_state` `(batch_size, prefix + patches, hidden_size)`.

        Args:
            options: further arguments of the model's `forward`, such as `output_hidden_states`.
        """
        inputs = self.inputs(model, pixel_values)
        # The first argument by position, as older PEFT's wrapper of fully trained modules takes it.
        return model(inputs.pop("pixel_values"), **inputs, **options)

    def embed(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the input of the first layer, `(batch_size, prefix + patches, hidden_size)`, and layer arguments."""
        if self.interpolates:
            embedded = model.embeddings(pixel_values, interpolate_pos_encoding=True)
        else:
            embedded = model.embeddings(pixel_values)
        return embedded, self.layer_inputs

    def select_patches(
        self,
        layer_inputs: dict[str, Any],
        patches: torch.Tensor,
    ) -> dict[str, Any]:
        """Return the layer arguments of [`embed`] for some of the patches.

        Args:
            layer_inputs: layer arguments for all patches.
            patches: indices of the patches of each image, int64 `(batch_size, number)`.

        Raises:
            ValueError: if arguments depend on the patches, and the family does not select them.
        """
        names = [name for name, tensor in layer_inputs.items() if tensor is not None]
        if names:
            raise ValueError(f"{type(self).__name__} cannot leave out patches: its layers take {', '.join(names)}.")
        return layer_inputs

    def encode_patches(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        patches: torch.Tensor,
    ) -> torch.Tensor:
        """Return the model's output if all other patches are dropped after the position embeddings.

        Args:
            pixel_values: images `(batch_size, num_channels, height, width)`.
            patches: indices of the patches of each image, int64 `(batch_size, number)`.

        Returns:
            Prefix tokens and these patches in this order, `(batch_size, prefix + number, hidden_size)`.
        """
        tokens, layer_inputs = self.embed(model, pixel_values)
        prefix, all_patches = tokens.tensor_split([self.num_prefix_tokens(model.config)], dim=1)
        visible = all_patches.take_along_dim(patches[..., None], dim=1)
        layer_inputs = self.select_patches(layer_inputs, patches)
        return self.encode(model, torch.cat([prefix, visible], dim=1), layer_inputs)

    def run_layer(
        self,
        layer: nn.Module,
        tokens: torch.Tensor,
        layer_inputs: dict[str, Any],
    ) -> torch.Tensor:
        """Return the output of a layer for tokens `(batch_size, number, hidden_size)`, of the same shape."""
        return layer(tokens, **layer_inputs)

    def recorded_states(self, states: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return the output of a layer, as transformers records it, as `(batch_size, number, hidden_size)`."""
        return states

    def encode(
        self,
        model: nn.Module,
        tokens: torch.Tensor,
        layer_inputs: dict[str, Any],
    ) -> torch.Tensor:
        """Return the output of the layers and the last norm for tokens `(batch_size, number, hidden_size)`."""
        for layer in model.get_submodule(self.layers):
            tokens = self.run_layer(layer, tokens, layer_inputs)
        if self.norm is None:
            return tokens
        norm = model.get_submodule(self.norm)
        return norm(tokens)

    def patch_tokens(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        """Return the model's output for the patches, `(batch_size, patches, hidden_size)`."""
        outputs = self.run(model, pixel_values)
        first_patch = self.num_prefix_tokens(model.config)
        return outputs.last_hidden_state[:, first_patch:]

    def save(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Save a ViT as its own library does."""
        model.save_pretrained(folder)

    def freeze_unused(self, model: nn.Module, with_norm: bool = False) -> None:
        """Freeze weights without a gradient, which data-parallel training would wait for.

        Args:
            model: ViT.
            with_norm: whether the last norm is not used either.
        """
        unused = self.unused
        if with_norm and self.norm:
            unused += (f"{self.norm}.",)
        for name, parameter in model.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)


@register_tower(
    "internvl_vision",
    "vitp_vision",
    "vitp_backbone",
    "vitp_adapter",
    "vitp_feature_pyramid",
    "dinov2",
    "dinov2_with_registers",
)
class PlainTower(VisionTower):
    """InternViT, DINOv2 and DINOv2 with registers."""

    def has_stochastic_depth(self, config):
        return True


@register_tower("dinov3_vit")
class Dinov3Tower(VisionTower):
    """DINOv3, with rotary positions. In training its model scales them at random, see `pos_embed_rescale`."""

    layers = "model.layer"
    norm = "norm"
    positions = None
    patch_kernel = "embeddings.patch_embeddings.weight"

    def embed(self, model, pixel_values):
        tokens = model.embeddings(pixel_values)
        cos_and_sin = model.rope_embeddings(pixel_values)
        return tokens, {"position_embeddings": cos_and_sin}

    def select_patches(self, layer_inputs, patches):
        cos, sin = layer_inputs["position_embeddings"]
        return {"position_embeddings": (cos[patches][:, None], sin[patches][:, None])}


@register_tower("vit")
class ViTTower(VisionTower):
    """The original ViT, as in transformers' `ViTModel`."""

    layers = "layers"
    interpolates = True
    unused = ("pooler.",)


@register_tower("vit_mae")
class ViTMAETower(ViTTower):
    """Encoder of a masked autoencoder, without masking. Its sine and cosine positions are fixed."""

    unused = ("embeddings.position_embeddings",)

    def prepare(self, config):
        config = super().prepare(config)
        config.mask_ratio = 0.0
        return config

    def noise(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the noise that keeps the patches in their order: the model sorts them by it."""
        height, width = pixel_values.shape[-2:]
        patch_height, patch_width = pair(model.config.patch_size)
        num_patches = (height // patch_height) * (width // patch_width)
        order = torch.arange(num_patches, device=pixel_values.device)
        return order.expand(pixel_values.shape[0], -1)

    def inputs(self, model, pixel_values):
        inputs = super().inputs(model, pixel_values)
        inputs["noise"] = self.noise(model, pixel_values)
        return inputs

    def embed(self, model, pixel_values):
        noise = self.noise(model, pixel_values)
        tokens, _, _ = model.embeddings(pixel_values, noise=noise, interpolate_pos_encoding=True)
        return tokens, {}


@register_tower("siglip_vision_model")
class SiglipTower(VisionTower):
    """SigLIP, also SigLIP 2 at a fixed resolution, which has the same model. It has no CLS token."""

    layers = "encoder.layers"
    norm = "post_layernorm"
    patch_kernel = "embeddings.patch_embedding.weight"
    positions = "embeddings.position_embedding.weight"
    interpolates = True
    unused = ("head.",)
    layer_inputs = {"attention_mask": None}

    def num_prefix_tokens(self, config):
        return 0


@register_tower("siglip2_vision_model")
class Siglip2Tower(SiglipTower):
    """SigLIP 2 of any resolution (NaFlex), which interpolates its positions. All images of a batch have one size."""

    interpolates = False
    positions = None

    def prepare(self, config):
        config = super().prepare(config)
        if not hasattr(config, "image_size"):
            patches_of_side = round(config.num_patches**0.5)
            config.image_size = patches_of_side * config.patch_size
        return config

    def resample_kernel(self, kernel, config, side):
        # In the weight of a linear layer the channels come last.
        patch_size = config.patch_size
        maps = kernel.unflatten(1, (patch_size, patch_size, config.num_channels)).permute(0, 3, 1, 2)
        resampled = resample(maps, side).permute(0, 2, 3, 1)
        return resampled.flatten(1)

    def patches(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the patches `(batch_size, patches, patch_size² * num_channels)` and the grid of each image."""
        patch_size = model.config.patch_size
        pixel_values = whole_patches(pixel_values, patch_size)
        height, width = pixel_values.shape[-2:]
        rows = height // patch_size
        columns = width // patch_size
        blocks = pixel_values.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
        patches = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.tensor([[rows, columns]], device=pixel_values.device)
        shapes = grid.expand(pixel_values.shape[0], -1)
        return {"pixel_values": patches, "spatial_shapes": shapes}

    def inputs(self, model, pixel_values):
        inputs = self.patches(model, pixel_values)
        batch_size, num_patches, _ = inputs["pixel_values"].shape
        mask = torch.ones(batch_size, num_patches, dtype=torch.long, device=pixel_values.device)
        inputs["pixel_attention_mask"] = mask
        return inputs

    def embed(self, model, pixel_values):
        tokens = model.embeddings(**self.patches(model, pixel_values))
        return tokens, self.layer_inputs


@register_tower("clip_vision_model")
class ClipTower(SiglipTower):
    """CLIP, whose last norm is applied to the pooled CLS token only."""

    embeddings = ("embeddings.", "pre_layrnorm.")
    prefix_tokens = ("class_embedding",)
    norm = None
    unused = ("post_layernorm.",)

    def num_prefix_tokens(self, config):
        return 1

    def embed(self, model, pixel_values):
        tokens, layer_inputs = super().embed(model, pixel_values)
        return model.pre_layrnorm(tokens), layer_inputs


@register_tower("idefics3_vision", "smolvlm_vision")
class Idefics3Tower(SiglipTower):
    """SigLIP of Idefics3 and SmolVLM. At other sizes, a patch has the nearest position embedding at or before it."""

    interpolates = False

    def embed(self, model, pixel_values):
        patch_height, patch_width = pair(model.config.patch_size)
        batch_size, _, height, width = pixel_values.shape
        grid = (batch_size, height // patch_height, width // patch_width)
        is_patch = torch.ones(grid, dtype=torch.bool, device=pixel_values.device)
        return model.embeddings(pixel_values, patch_attention_mask=is_patch), self.layer_inputs


@register_tower("qwen3_vl_vision")
class Qwen3VLTower(VisionTower):
    """ViT of Qwen3-VL up to its last layer, before the patches are merged.

    transformers' own model takes the patches of all images as one sequence, in blocks of two by two. Here, its layers
    run on images of one size, whose patches are in the order of the image. Outputs for DeepStack are left out.
    """

    embeddings = ("patch_embed.", "pos_embed.")
    prefix_tokens = ()
    layers = "blocks"
    norm = None
    patch_kernel = "patch_embed.proj.weight"
    positions = None
    unused = ("merger.",)
    left_out = ("deepstack_merger_list.",)

    def prepare(self, config):
        config = super().prepare(config)
        config.deepstack_visual_indexes = []
        config.num_channels = config.in_channels
        # Newer transformers have these names as aliases.
        config.num_hidden_layers = config.depth
        config.num_attention_heads = config.num_heads
        if not hasattr(config, "image_size"):
            patches_of_side = round(config.num_position_embeddings**0.5)
            config.image_size = patches_of_side * config.patch_size
        return config

    def set_depth(self, config, num_layers):
        super().set_depth(config, num_layers)
        config.depth = num_layers

    def num_prefix_tokens(self, config):
        return 0

    def resample_kernel(self, kernel, config, side):
        # A kernel has a temporal axis too, for two frames of a video.
        maps = kernel.flatten(1, 2)
        return resample(maps, side).unflatten(1, kernel.shape[1:3])

    def run(self, model, pixel_values, output_hidden_states=False, **options):
        tokens, layer_inputs = self.embed(model, pixel_values)
        hidden_states = [tokens]
        for layer in model.get_submodule(self.layers):
            tokens = self.run_layer(layer, tokens, layer_inputs)
            hidden_states.append(tokens)
        return BaseModelOutput(
            last_hidden_state=tokens,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def embed(self, model, pixel_values):
        config = model.config
        pixel_values = whole_patches(pixel_values, config.patch_size)
        # An image is a video of equal frames.
        frames = pixel_values[:, :, None].expand(-1, -1, config.temporal_patch_size, -1, -1)
        kernel = model.patch_embed.proj
        patches = kernel(frames.to(kernel.weight.dtype))[:, :, 0]
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)

        positions = model.pos_embed(torch.arange(config.num_position_embeddings, device=tokens.device))
        side = round(config.num_position_embeddings**0.5)
        grid = positions.float().T.unflatten(1, (side, side))
        size = (rows, columns)
        resampled_grid = nn.functional.interpolate(grid[None], size=size, mode="bilinear", align_corners=True)
        tokens = tokens + resampled_grid.flatten(2).transpose(1, 2).to(tokens.dtype)

        row_indices = torch.arange(rows, device=tokens.device).repeat_interleave(columns)
        column_indices = torch.arange(columns, device=tokens.device).repeat(rows)
        frequencies = model.rotary_pos_emb.inv_freq.to(tokens.device, torch.float32)
        row_angles = row_indices[:, None] * frequencies
        column_angles = column_indices[:, None] * frequencies
        angles = torch.cat([row_angles, column_angles, row_angles, column_angles], dim=1)[None]
        return tokens.contiguous(), {"position_embeddings": (angles.cos(), angles.sin())}

    def select_patches(self, layer_inputs, patches):
        cos, sin = layer_inputs["position_embeddings"]
        return {"position_embeddings": (cos[0][patches], sin[0][patches])}

    def run_layer(self, layer, tokens, layer_inputs):
        batch_size, num_tokens, _ = tokens.shape
        position_embeddings = []
        for embedding in layer_inputs["position_embeddings"]:
            position_embeddings.append(embedding.expand(batch_size, -1, -1).flatten(0, 1))
        # Without FlashAttention, the layer reads the borders of images as numbers. In an array they are on the CPU, and
        # the layer need not wait for a GPU.
        borders = np.arange(batch_size + 1, dtype=np.int32) * num_tokens
        if "flash" in (layer.attn.config._attn_implementation or ""):
            borders = torch.from_numpy(borders).to(tokens.device)
        states = layer(tokens.flatten(0, 1), cu_seqlens=borders, position_embeddings=tuple(position_embeddings))
        return self.recorded_states(states, batch_size)

    def recorded_states(self, states, batch_size):
        return states.unflatten(0, (batch_size, -1))


@register_tower("timm_wrapper")
class TimmTower(VisionTower):
    """Vision transformers of timm."""

    prefix_tokens = ("cls_token", "reg_token")
    embeddings = (
        "timm_model.patch_embed.",
        "timm_model.pos_embed",
        "timm_model.norm_pre.",
        "timm_model.cls_token",
        "timm_model.reg_token",
    )
    layers = "timm_model.blocks"
    norm = "timm_model.norm"
    patch_kernel = "timm_model.patch_embed.proj.weight"
    positions = "timm_model.pos_embed"
    unused = ("timm_model.attn_pool", "timm_model.fc_norm", "timm_model.head")

    def prepare(self, config):
        config = super().prepare(config)
        config.model_args = {"dynamic_img_size": True, **(config.model_args or {})}
        config.model_args.pop("num_classes", None)  # written by timm, and given by transformers
        model = build_timm(config.architecture, json.dumps(config.model_args))
        config.hidden_size = model.embed_dim
        config.num_hidden_layers = len(model.blocks)
        config.image_size = list(model.patch_embed.img_size)
        config.patch_size = list(model.patch_embed.patch_size)
        config.num_channels = model.patch_embed.proj.in_channels
        config.num_prefix_tokens = model.num_prefix_tokens
        config.num_attention_heads = model.blocks[0].attn.num_heads
        return config

    def num_prefix_tokens(self, config):
        return config.num_prefix_tokens

    def save(self, model, folder):
        state = {name.removeprefix("timm_model."): weight for name, weight in model.state_dict().items()}
        config = model.config
        config.pretrained_cfg = {
            **(getattr(config, "pretrained_cfg", None) or {}),
            "input_size": [config.num_channels, *config.image_size],
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        config.num_labels = 0  # timm would expect the weights of a head
        model.save_pretrained(folder, state_dict=state)

    def resize(self, config, image_size, patch_size):
        config = super().resize(config, image_size, patch_size)
        config.model_args["img_size"] = list(image_size)
        config.model_args["patch_size"] = patch_size[0]
        return config

    def set_depth(self, config, num_layers):
        super().set_depth(config, num_layers)
        config.model_args = {**config.model_args, "depth": num_layers}

    def has_stochastic_depth(self, config):
        return True

    def drop_path_rate(self, config):
        return config.model_args.get("drop_path_rate", 0.0)

    def set_drop_path_rate(self, config, rate):
        config.model_args = {**config.model_args, "drop_path_rate": rate}

    def inputs(self, model, pixel_values):
        patch_size = getattr(model.config, "patch_size", 1)
        return {"pixel_values": whole_patches(pixel_values, patch_size), "do_pooling": False}

    def embed(self, model, pixel_values):
        vit = model.timm_model
        patches = vit.patch_embed(whole_patches(pixel_values, vit.patch_embed.patch_size))
        # timm has no public way to the input of the first block.
        tokens = vit._pos_embed(patches)
        tokens = vit.norm_pre(vit.patch_drop(tokens))
        return tokens, {}


@functools.lru_cache(maxsize=32)
def build_timm(architecture: str, model_args: str) -> nn.Module:
    """Return timm's model without weights, to read its shape.

    Raises:
        ValueError: if the architecture is not timm's `VisionTransformer`.
    """
    import timm  # optional

    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **json.loads(model_args))
    except (TypeError, RuntimeError):  # arguments that other architectures do not have
        model = None
    if not isinstance(model, timm.models.VisionTransformer):
        raise ValueError(
            f"Expected a VisionTransformer of timm, got {architecture!r}. Choose another model of "
            "https://huggingface.co/timm, or the same weights in transformers."
        )
    return model


def whole_patches(pixel_values: torch.Tensor, patch_size: int | list[int] | tuple[int, ...]) -> torch.Tensor:
    """Return images without the pixels at the right and the bottom that fill no patch, which a convolution ignores."""
    patch_height, patch_width = pair(patch_size)
    height, width = pixel_values.shape[-2:]
    return pixel_values[..., : height - height % patch_height, : width - width % patch_width]


def resample(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate `(n, c, height, width)` to `(n, c, side, side)` (bicubic, in float32), in the same dtype."""
    size = (side, side)
    if maps.shape[-2:] == size:
        return maps
    resampled = nn.functional.interpolate(
        maps.float(),
        size=size,
        mode="bicubic",
        align_corners=False,
    )
    return resampled.to(maps.dtype)


def resample_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate position embeddings, except those of prefix tokens, which come first.

    Args:
        positions: of shape `(prefix + n², width)` or `(1, prefix + n², width)`.
        side: side of the new grid.

    Returns:
        Position embeddings of `prefix + side²` tokens.
    """
    num_positions = positions.shape[-2]
    stored_side = int(num_positions**0.5)
    num_patches = stored_side**2
    prefix, grid = positions.flatten(0, -2).split([num_positions - num_patches, num_patches])
    grid = grid.unflatten(0, (stored_side, stored_side)).permute(2, 0, 1)
    resampled_grid = resample(grid[None], side)[0]
    resampled = torch.cat([prefix, resampled_grid.flatten(1).T])
    return resampled.reshape(*positions.shape[:-2], *resampled.shape)


__all__ = ["VisionTower", "register_tower"]
