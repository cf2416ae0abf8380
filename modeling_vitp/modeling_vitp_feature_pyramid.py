"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3) on ViTP's ViT: a light alternative to the adapter.

The last map of the ViT, at stride 16, alone gives the maps at strides 4, 8, 16 and 32.
"""

import torch
from torch import nn

from .configuration_vitp_dense import ViTPFeaturePyramidConfig
from .modeling_vitp import ViTPVisionModel
from .modeling_vitp_adapter import ChannelLayerNorm
from .modeling_vitp_backbone import ViTPMultiScaleBackbone


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

    def maps(self, pixel_values: torch.Tensor, wanted: list[int]) -> list[torch.Tensor]:
        states = self.layernorm(self.encoder(self.embeddings(pixel_values)).last_hidden_state)[:, 1:]
        features = states.transpose(1, 2).unflatten(2, (pixel_values.shape[-2] // 16, pixel_values.shape[-1] // 16))
        return [self.pyramid[index](features) for index in wanted]


__all__ = ["ViTPFeaturePyramid"]
