"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3) on ViTP's ViT: a light alternative to the adapter.

The last map of the ViT, at stride 16, alone gives the maps at strides 4, 8, 16 and 32.
"""

import math

import torch
from torch import nn
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vitp_dense import ViTPFeaturePyramidConfig
from .modeling_vitp import ViTPVisionModel
from .modeling_vitp_adapter import ChannelLayerNorm
from .modeling_vitp_backbone import ViTPMultiScaleBackbone, pad_to_multiple


class PyramidLevel(nn.Sequential):
    """Another stride, then a 1×1 and a 3×3 convolution with LayerNorm to the width of the pyramid."""

    def __init__(self, config: ViTPFeaturePyramidConfig, rescale: list[nn.Module], in_channels: int):
        channels = config.pyramid_channels
        super().__init__(
            *rescale,
            nn.Conv2d(in_channels, channels, 1, bias=False),
            ChannelLayerNorm(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ChannelLayerNorm(channels),
        )


class ViTPFeaturePyramid(ViTPMultiScaleBackbone, ViTPVisionModel):
    """The ViT with a simple feature pyramid: a backbone that gives maps at strides 4, 8, 16 and 32.

    `ViTPFeaturePyramid.from_backbone(folder)` opens an exported backbone and starts the pyramid afresh. Unlike in
    ViTDet, all attention is global, as in pretraining.
    """

    config: ViTPFeaturePyramidConfig
    config_class = ViTPFeaturePyramidConfig

    def __init__(self, config: ViTPFeaturePyramidConfig):
        super().__init__(config)
        self.num_features = [config.pyramid_channels] * 4
        width = config.hidden_size
        to_stride8 = nn.ConvTranspose2d(width, width // 2, 2, 2)
        to_stride4 = [
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            ChannelLayerNorm(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
        ]
        self.pyramid = nn.ModuleList(
            [
                PyramidLevel(config, to_stride4, width // 4),
                PyramidLevel(config, [to_stride8], width // 2),
                PyramidLevel(config, [], width),
                PyramidLevel(config, [nn.MaxPool2d(2)], width),
            ]
        )
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalised images of any size, padded with zeros at the right and at the bottom to a multiple of 32
                while they are computed.

        Returns:
            `feature_maps`, by default four of shape
            `(batch_size, pyramid_channels, ceil(height / stride), ceil(width / stride))` at strides 4, 8, 16 and 32.
        """
        height, width = pixel_values.shape[-2:]
        pixel_values = pad_to_multiple(pixel_values.to(self.dtype), 32, 32)
        states = ViTPVisionModel.forward(self, pixel_values).last_hidden_state[:, 1:]
        features = states.transpose(1, 2).unflatten(2, (pixel_values.shape[-2] // 16, pixel_values.shape[-1] // 16))
        feature_maps = tuple(
            level(features)[:, :, : math.ceil(height / stride), : math.ceil(width / stride)]
            for stage, level, stride in zip(self.stage_names, self.pyramid, (4, 8, 16, 32))
            if stage in self.out_features
        )
        return BackboneOutput(feature_maps=feature_maps)


__all__ = ["ViTPFeaturePyramid"]
