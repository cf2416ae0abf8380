"""Feature pyramid, and the base class of the models on a backbone with maps at strides 4, 8, 16 and 32."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLVisionModel, PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput

from .configuration_vitp import settings_of_head
from .configuration_vitp_dense import ViTPFeaturePyramidConfig
from .modeling_vitp import TaskModel, final_norm
from .modeling_vitp_adapter import ChannelLayerNorm, ViTPAdapter
from .modeling_vitp_backbone import ViTPMultiScaleBackbone, resize_backbone


class PyramidLevel(nn.Sequential):
    """Level of the pyramid: a change of stride, then a 1×1 and a 3×3 convolution with LayerNorm."""

    def __init__(
        self,
        config: ViTPFeaturePyramidConfig,
        rescale: list[nn.Module],
        in_channels: int,
    ):
        channels = config.pyramid_channels
        super().__init__(
            *rescale,
            nn.Conv2d(in_channels, channels, 1, bias=False),
            ChannelLayerNorm(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ChannelLayerNorm(channels),
        )


class ViTPFeaturePyramid(ViTPMultiScaleBackbone):
    """Backbone of the ViT and a simple feature pyramid, with feature maps at strides 4, 8, 16 and 32.

    `ViTPFeaturePyramid.from_backbone(folder)` loads an exported backbone and initializes a new pyramid. Unlike in
    ViTDet, all attention is global, as in pretraining.
    """

    config: ViTPFeaturePyramidConfig
    config_class = ViTPFeaturePyramidConfig

    def __init__(self, config: ViTPFeaturePyramidConfig):
        super().__init__(config)
        self.num_features = [config.pyramid_channels] * 4
        self.build_vit(config)
        if config.vit_config is None:
            self.layernorm = final_norm(config)
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
        self.freeze_skipped_maps()
        self.post_init()

    def layers_of_map(self, index: int) -> list[nn.Module]:
        return [self.pyramid[index]]

    def maps(
        self,
        pixel_values: torch.Tensor,
        indices: list[int],
    ) -> list[torch.Tensor]:
        height, width = pixel_values.shape[-2:]
        tower, vit = self.tower
        # Layer by layer, because the hidden states of a whole model within this one are not recorded.
        embedded, layer_inputs = tower.embed(vit, pixel_values)
        tokens = tower.encode(vit, embedded, layer_inputs)
        first_patch = tower.num_prefix_tokens(vit.config)
        patches = tokens[:, first_patch:]
        features = patches.transpose(1, 2).unflatten(2, (height // 16, width // 16))
        return [self.pyramid[index](features) for index in indices]


NECKS = {"adapter": ViTPAdapter, "pyramid": ViTPFeaturePyramid}
# By model type, because the saved code of a model and that of its configuration are loaded as separate modules.
BACKBONES = {backbone.config_class.model_type: backbone for backbone in NECKS.values()}


class OnMultiScaleBackbone(TaskModel):
    """Base class of the models with a multi-scale `backbone`, [`ViTPAdapter`] or [`ViTPFeaturePyramid`]."""

    _keys_to_ignore_on_load_missing = [r"backbone\.embeddings\.cls_token$"]  # not used by the adapter

    @staticmethod
    def backbone_of(config: PreTrainedConfig) -> ViTPMultiScaleBackbone:
        backbone_config = config.backbone_config
        backbone_class = BACKBONES[backbone_config.model_type]
        return backbone_class(backbone_config)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | InternVLVisionModel,
        neck: str = "adapter",
        *,
        id2label: dict[int, str] | list[str] | None = None,
        image_size: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        r"""Load a pretrained backbone in float32 and initialize a new head on it with torch's random state.

        Args:
            backbone (`str`, `Path`, [`ViTPVisionModel`] or [`~transformers.InternVLVisionModel`]):
                Folder or Hub id of an exported backbone, of a [`ViTPVisionModel`] or of the class of `neck`, or a ViT
                itself. Patches of 14 pixels are interpolated to 16.
            neck (`str`, defaults to `"adapter"`):
                Neck that computes maps at four strides from the ViT's features: `"adapter"` ([`ViTPAdapter`]) or
                `"pyramid"` ([`ViTPFeaturePyramid`], faster).
            id2label (`dict[int, str]` or `list[str]`, *optional*):
                Names of the classes. Alternatives are `label2id` and `num_labels`.
            image_size (`int`, *optional*):
                Side of the training images in pixels, a multiple of 16. The position embeddings are interpolated to it
                once rather than in every step. Defaults to the backbone's image size.
            backbone_kwargs (`dict`, *optional*):
                Settings of the backbone's configuration, such as `drop_path_rate`, and arguments of `from_pretrained`,
                such as `revision`.
            kwargs:
                Settings of the model's configuration, such as `class_weights`.

        Raises:
            ValueError: if a setting or the neck is unknown, the folder has another model type, or `image_size` is not a
                multiple of the patch size.
        """
        pretrained = open_neck(backbone, neck, image_size, backbone_kwargs)
        kwargs = settings_of_head(cls.config_class, kwargs, id2label)
        config = cls.config_class(
            backbone_config=pretrained.config,
            attn_implementation=pretrained.config._attn_implementation,  # not part of the fields
            **kwargs,
        )
        model = cls(config)
        model.backbone = pretrained
        return model

    def run_backbone(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        return self.backbone(pixel_values, return_dict=True, **self.requested_outputs(kwargs))


def open_neck(
    backbone: str | Path | InternVLVisionModel,
    neck: str,
    image_size: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
) -> ViTPMultiScaleBackbone:
    """Load a backbone with a neck, see [`OnMultiScaleBackbone.from_backbone`]."""
    if neck not in NECKS:
        raise ValueError(f"Expected `neck` to be one of {list(NECKS)}, got {neck!r}.")
    pretrained = NECKS[neck].from_backbone(backbone, **(backbone_kwargs or {}))
    if image_size is None:
        return pretrained
    return resize_backbone(pretrained, image_size=image_size)


__all__ = ["ViTPFeaturePyramid"]
