"""The ViT as a backbone with transformers' backbone API: one map of features for each layer that is asked for."""

import torch
from torch.nn import functional as F
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vitp_dense import ViTPBackboneConfig
from .modeling_vitp import ViTPVisionModel


class ViTPBackbone(BackboneMixin, ViTPVisionModel):
    """The ViT's features as maps at the stride of its patches, from any of its layers.

    `from_pretrained` opens an exported backbone or a [`ViTPVisionModel`], as a folder or a Hub id:
    `ViTPBackbone.from_pretrained(folder, out_features=["stage6", "stage12"])`.
    """

    config: ViTPBackboneConfig
    config_class = ViTPBackboneConfig

    def __init__(self, config: ViTPBackboneConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalised images of any size. They are padded with zeros, the mean of the training images, at the
                right and at the bottom to whole patches.

        Returns:
            `feature_maps`, one for each of `out_features`, of shape
            `(batch_size, hidden_size, ceil(height / patch_size), ceil(width / patch_size))`.
        """
        pixel_values = pad_to_multiple(pixel_values, *self.config.patch_size)
        grid = [size // patch for size, patch in zip(pixel_values.shape[-2:], self.config.patch_size)]
        outputs = ViTPVisionModel.forward(self, pixel_values, **kwargs)
        states = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        feature_maps = tuple(
            state[:, 1:].transpose(1, 2).unflatten(2, grid)
            for stage, state in zip(self.stage_names, states)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def pad_to_multiple(pixel_values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pads with zeros at the bottom and at the right, to multiples of `height` and `width`."""
    missing_height, missing_width = -pixel_values.shape[-2] % height, -pixel_values.shape[-1] % width
    return F.pad(pixel_values, (0, missing_width, 0, missing_height))


__all__ = ["ViTPBackbone"]
