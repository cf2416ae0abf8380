"""ViT-Adapter (arXiv 2205.08534) on ViTP's ViT: feature maps at strides 4, 8, 16 and 32 for dense prediction.

A convolutional stem (spatial prior) computes maps at strides 4 to 32. The last three, as one sequence of tokens,
exchange features with the ViT in four interactions. Before a range of the ViT's layers an injector adds them to the
patch tokens; after the range an extractor adds the patch tokens to them. Both use deformable attention.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from transformers.models.dinov3_vit.modeling_dinov3_vit import Dinov3ViTDropPath

from .configuration_vitp_dense import ViTPAdapterConfig
from .modeling_vitp_backbone import ViTPMultiScaleBackbone
from .vision_towers import VisionTower


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3) with values of reduced width.

    Queries of shape `(batch_size, num_queries, hidden_size)` with reference points `(num_queries, 2)`, x and y in
    [0, 1], attend to `features` of shape `(batch_size, sum of height * width, hidden_size)`, one map for each of
    `shapes`.
    """

    def __init__(self, config: ViTPAdapterConfig, num_levels: int):
        super().__init__()
        self.num_heads = config.deformable_heads
        self.num_levels = num_levels
        self.num_points = config.deformable_points
        width = int(config.hidden_size * config.deformable_ratio)
        samples = self.num_heads * num_levels * self.num_points
        self.sampling_offsets = nn.Linear(config.hidden_size, samples * 2)
        self.attention_weights = nn.Linear(config.hidden_size, samples)
        self.value_proj = nn.Linear(config.hidden_size, width)
        self.output_proj = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.deformable_dropout)
        self.sample = MultiScaleDeformableAttention()

    def forward(
        self,
        queries: torch.Tensor,
        reference_points: torch.Tensor,
        features: torch.Tensor,
        shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        batch_size, num_queries, _ = queries.shape
        samples = (self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).view(batch_size, num_queries, self.num_heads, *samples, 2)
        weights = self.attention_weights(queries).view(batch_size, num_queries, self.num_heads, -1)
        weights = weights.softmax(-1).unflatten(-1, samples)
        values = self.value_proj(features).unflatten(-1, (self.num_heads, -1))

        # Locations are float32 at least: bfloat16 has 8 bits, fewer than a coordinate in a map needs.
        dtype = torch.promote_types(values.dtype, torch.float32)
        sizes = torch.tensor(shapes, device=queries.device)
        widths_and_heights = sizes.flip(-1)
        reference_points = reference_points.to(dtype)[None, :, None, None, None]
        locations = reference_points + offsets.to(dtype) / widths_and_heights[:, None]
        ends = sizes.prod(-1).cumsum(0)
        starts = F.pad(ends, (1, -1))
        attended = self.sample(
            values.to(dtype),
            sizes,
            shapes,
            starts,
            locations,
            weights.to(dtype),
            64,
        )
        return self.dropout(self.output_proj(attended.to(values.dtype)))

    def init_weights(self):
        """Initialize the offsets of the heads in evenly spread directions, of their points at growing distances."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * distances[:, None]
        init.zeros_(self.sampling_offsets.weight)
        init.copy_(self.sampling_offsets.bias, offsets.expand(-1, self.num_levels, -1, -1).flatten())
        init.zeros_(self.attention_weights.weight)
        init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            init.xavier_uniform_(linear.weight)
            init.zeros_(linear.bias)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position of a map `(batch_size, channels, height, width)`."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {"layer_norm": ChannelLayerNorm, "batch_norm": nn.BatchNorm2d}


class SpatialPrior(nn.Module):
    """Convolutional stem with maps at strides 4, 8, 16 and 32, all of width `hidden_size`."""

    def __init__(self, config: ViTPAdapterConfig):
        super().__init__()
        norm_class = NORMS[config.spatial_prior_norm]
        width = config.spatial_prior_channels

        def block(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
            return [convolution, norm_class(out_channels), nn.ReLU()]

        self.stem = nn.Sequential(
            *block(config.num_channels, width, 2),
            *block(width, width, 1),
            *block(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stages = nn.ModuleList()
        for in_channels, out_channels in pairwise(widths):
            self.stages.append(nn.Sequential(*block(in_channels, out_channels, 2)))
        self.projections = nn.ModuleList()
        for channels in widths:
            self.projections.append(nn.Conv2d(channels, config.hidden_size, 1))

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.stem(pixel_values)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [projection(features) for projection, features in zip(self.projections, maps)]


class Injector(nn.Module):
    """Attention that adds the spatial prior's tokens to the patch tokens, with a gate for each channel."""

    def __init__(self, config: ViTPAdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size)
        self.feature_norm = nn.LayerNorm(config.hidden_size)
        self.attention = DeformableAttention(config, num_levels=3)
        self.gate = nn.Parameter(torch.full((config.hidden_size,), float(config.injector_init_value)))

    def forward(
        self,
        patches: torch.Tensor,
        patch_points: torch.Tensor,
        tokens: torch.Tensor,
        shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        queries = self.query_norm(patches)
        features = self.feature_norm(tokens)
        attended = self.attention(queries, patch_points, features, shapes)
        return patches + self.gate * attended


class ConvolutionalFeedForward(nn.Module):
    """Feed-forward network with a depthwise convolution over each of the three maps of the tokens."""

    def __init__(self, config: ViTPAdapterConfig):
        super().__init__()
        width = int(config.hidden_size * config.feed_forward_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        tokens: torch.Tensor,
        shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        hidden = self.fc1(tokens)
        maps = [self.depthwise(features) for features in to_maps(hidden, shapes)]
        return self.fc2(F.gelu(to_tokens(maps)))


class Extractor(nn.Module):
    """Attention that adds the patch tokens to the spatial prior's tokens, or to the norm of these."""

    def __init__(self, config: ViTPAdapterConfig):
        super().__init__()
        self.adds_to_norm = config.extractor_residual == "normed_tokens"
        self.query_norm = nn.LayerNorm(config.hidden_size)
        self.feature_norm = nn.LayerNorm(config.hidden_size)
        self.attention = DeformableAttention(config, num_levels=1)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = ConvolutionalFeedForward(config)
        self.drop_path = Dinov3ViTDropPath(config.drop_path_rate)

    def forward(
        self,
        tokens: torch.Tensor,
        token_points: torch.Tensor,
        shapes: list[tuple[int, int]],
        patches: torch.Tensor,
        grid: tuple[int, int],
    ) -> torch.Tensor:
        queries = self.query_norm(tokens)
        features = self.feature_norm(patches)
        attended = self.attention(queries, token_points, features, [grid])
        if self.adds_to_norm:
            tokens = queries + attended
        else:
            tokens = tokens + attended
        output = self.feed_forward(self.feed_forward_norm(tokens), shapes)
        return tokens + self.drop_path(output)


class Interaction(GradientCheckpointingLayer):
    """Interaction of one injector, a range of the ViT's layers, and one extractor, or several in the last one."""

    def __init__(self, config: ViTPAdapterConfig, num_extractors: int):
        super().__init__()
        self.injector = Injector(config)
        self.extractors = nn.ModuleList(Extractor(config) for _ in range(num_extractors))

    def forward(
        self,
        patches: torch.Tensor,
        tokens: torch.Tensor,
        layers: nn.ModuleList,
        grid: tuple[int, int],
        patch_points: torch.Tensor,
        shapes: list[tuple[int, int]],
        token_points: torch.Tensor,
        prefix: torch.Tensor,
        tower: VisionTower,
        layer_inputs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the patch tokens, the spatial prior's tokens and the prefix tokens after the interaction."""
        injected = self.injector(patches, patch_points, tokens, shapes)
        states = torch.cat([prefix, injected], dim=1)
        for layer in layers:
            states = tower.run_layer(layer, states, layer_inputs)
        prefix, patches = states.split([prefix.shape[1], patches.shape[1]], dim=1)
        for extractor in self.extractors:
            tokens = extractor(tokens, token_points, shapes, patches, grid)
        return patches, tokens, prefix


def init_convolution(convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Draw weights with the variance 2 / fan-out (He et al., arXiv 1502.01852).

    The fan-out counts the outputs of one group, as in the ViT-Adapter: a depthwise convolution of 3 x 3 has 9.
    """
    fan_out = math.prod(convolution.kernel_size) * convolution.out_channels // convolution.groups
    init.normal_(convolution.weight, std=math.sqrt(2 / fan_out))


class ViTPAdapter(ViTPMultiScaleBackbone):
    """Backbone of the ViT and an adapter, with feature maps at strides 4, 8, 16 and 32.

    `ViTPAdapter.from_backbone(folder)` loads an exported backbone and initializes a new adapter. ViTP's ViT runs
    without its CLS token, as in the authors' release; a ViT of another family keeps its CLS token and registers.
    """

    config: ViTPAdapterConfig
    config_class = ViTPAdapterConfig
    _keys_to_ignore_on_load_missing = [r"embeddings\.cls_token$"]  # not used
    _keys_to_ignore_on_load_unexpected = [r"^layernorm\."]

    def __init__(self, config: ViTPAdapterConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * 4
        self.build_vit(config)
        if config.vit_config is None:
            self.embeddings.cls_token.requires_grad_(False)
        else:
            tower, vit = self.tower
            tower.freeze_unused(vit, with_norm=True)
        self.spatial_prior = SpatialPrior(config)
        self.level_embeddings = nn.Parameter(torch.zeros(3, config.hidden_size))
        self.interactions = nn.ModuleList()
        num_interactions = len(config.interaction_layers)
        for index in range(num_interactions):
            is_last = index == num_interactions - 1
            num_extractors = 1 + config.extra_extractors if is_last else 1
            self.interactions.append(Interaction(config, num_extractors))
        self.upsample = nn.ConvTranspose2d(config.hidden_size, config.hidden_size, 2, 2)
        norm_class = NORMS[config.spatial_prior_norm]
        self.norms = nn.ModuleList(norm_class(config.hidden_size) for _ in range(4))
        self.freeze_skipped_maps()
        self.post_init()

    def layers_of_map(self, index: int) -> list[nn.Module]:
        layers = [self.norms[index]]
        if index == 0:
            layers += [self.spatial_prior.projections[0], self.upsample]
        return layers

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # that of the ViT; transformers would check this file's own attention

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Injector):
            init.constant_(module.gate, self.config.injector_init_value)
        elif isinstance(module, ViTPAdapter):
            init.normal_(module.level_embeddings)
            # Done here because transformers skips modules without parameters of their own.
            for submodule in module.modules():
                if isinstance(submodule, DeformableAttention):
                    submodule.init_weights()
            for part in (module.spatial_prior, module.interactions, module.upsample):
                for submodule in part.modules():
                    if isinstance(submodule, (nn.Conv2d, nn.ConvTranspose2d)):
                        init_convolution(submodule)

    def maps(
        self,
        pixel_values: torch.Tensor,
        indices: list[int],
    ) -> list[torch.Tensor]:
        finest_map, *prior_maps = self.spatial_prior(pixel_values)
        shapes = [tuple(features.shape[-2:]) for features in prior_maps]
        embedded_maps = []
        for features, embedding in zip(prior_maps, self.level_embeddings):
            embedded_maps.append(to_tokens([features]) + embedding)
        tokens = torch.cat(embedded_maps, dim=1)
        grid = shapes[1]  # of the patches
        tokens, patches = self.interact(pixel_values, tokens, shapes, grid)

        stride8, *coarser_maps = to_maps(tokens, shapes)
        stride4 = self.upsample(stride8) + finest_map
        maps = [stride4, stride8, *coarser_maps]
        if self.config.add_vit_features:
            (vit_map,) = to_maps(patches, [grid])
            for index, features in enumerate(maps):
                size = features.shape[-2:]
                maps[index] = features + F.interpolate(vit_map, size=size, mode="bilinear", align_corners=False)
        return [self.norms[index](maps[index]) for index in indices]

    def interact(
        self,
        pixel_values: torch.Tensor,
        tokens: torch.Tensor,
        shapes: list[tuple[int, int]],
        grid: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the ViT and the interactions. Return the tokens of the spatial prior and those of the patches."""
        patch_points = cell_centers([grid], pixel_values.device)
        token_points = cell_centers(shapes, pixel_values.device)
        tower, vit = self.tower
        states, layer_inputs = tower.embed(vit, pixel_values)
        height, width = grid
        num_prefix_tokens = states.shape[1] - height * width
        prefix, patches = states.tensor_split([num_prefix_tokens], dim=1)
        if vit is self:
            prefix = prefix[:, :0]
        layers = vit.get_submodule(tower.layers)
        for interaction, (start, end) in zip(self.interactions, self.config.interaction_layers):
            patches, tokens, prefix = interaction(
                patches,
                tokens,
                layers[start : end + 1],
                grid,
                patch_points,
                shapes,
                token_points,
                prefix,
                tower,
                layer_inputs,
            )
        return tokens, patches


def to_tokens(maps: list[torch.Tensor]) -> torch.Tensor:
    """Convert maps `(batch_size, channels, height, width)` to `(batch_size, sum of height * width, channels)`."""
    tokens_of_map = [features.flatten(2).transpose(1, 2) for features in maps]
    return torch.cat(tokens_of_map, dim=1)


def to_maps(tokens: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Convert tokens back to maps, the inverse of [`to_tokens`]."""
    counts = [height * width for height, width in shapes]
    maps = []
    for map_tokens, shape in zip(tokens.split(counts, dim=1), shapes):
        maps.append(map_tokens.transpose(1, 2).unflatten(2, shape))
    return maps


def cell_centers(shapes: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Return x and y, in [0, 1], of the cell centers of all maps, `(sum of height * width, 2)`."""
    points = []
    for height, width in shapes:
        rows = (torch.arange(height, device=device) + 0.5) / height
        columns = (torch.arange(width, device=device) + 0.5) / width
        points.append(torch.cartesian_prod(rows, columns).flip(-1))
    return torch.cat(points)


__all__ = ["ViTPAdapter"]
