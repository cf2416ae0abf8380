"""Opened models: a vision-language model, a ViT, or a fine-tuned model."""

import inspect
from dataclasses import dataclass

import torch
from computing import device
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPForConditionalGeneration,
    ViTPImageClassificationConfig,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationConfig,
)
from modeling_vitp.modeling_vitp_backbone import ViTPMultiScaleBackbone

MAPS = (ViTPSegmentationConfig.model_type, ViTPChangeDetectionConfig.model_type)
MULTIPLE = 32  # The ViT of a detector or segmentation model pads image sides to a multiple of this.


@dataclass(frozen=True)
class FullModel:
    """Vision-language model with its processor, in evaluation mode on the device, with eager attention."""

    name: str
    model: ViTPForConditionalGeneration
    processor: ViTPProcessor


@dataclass(frozen=True)
class LoadedBackbone:
    """ViT of any type with its image processor, in evaluation mode on the device, with eager attention."""

    name: str
    model: PreTrainedModel
    image_processor: ViTPImageProcessor
    """Image processor with the mean and std of the model, for 8-bit RGB or for its bands."""
    input_spec: dict | None
    """Input spec with which the model was trained on images that are not 8-bit RGB."""

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, image_processor: BaseImageProcessor) -> "LoadedBackbone":
        """Wrap a ViT and take mean, std and bands from an image processor of any class."""
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
        settings = {key: value for key in names if (value := getattr(image_processor, key, None)) is not None}
        bands = getattr(image_processor, "band_names", None)
        plain = ViTPImageProcessor(**settings, input_spec=bands and {"band_names": bands})
        return cls(name, model.eval().to(device()), plain, getattr(image_processor, "input_spec", None))

    @property
    def band_names(self) -> list[str] | None:
        """Names of the model's bands, if they are not RGB."""
        return self.image_processor.band_names

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = self.model.config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def native(self) -> int:
        """Number of patches a side at the image size of the configuration."""
        size = self.model.config.image_size
        return (size if isinstance(size, int) else size[0]) // self.patch[0]

    @property
    def is_padded(self) -> bool:
        """True for the ViT of a detector or segmentation model, which pads images."""
        return isinstance(self.model, ViTPMultiScaleBackbone)

    def states(self, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the patch features after a layer, from 1, of shape `(channels, rows, columns)`.

        For the last layer, the result is `last_hidden_state`, which includes the final norm if the ViT has one.
        """
        # Backbones with `stage_names` do not return a last_hidden_state.
        is_last = layer == self.depth and not hasattr(self.model, "stage_names")
        outputs = self.run(pixel_values, output_hidden_states=not is_last)
        states = outputs.last_hidden_state if is_last else outputs.hidden_states[layer]
        rows, columns = self.grid(pixel_values)
        kept = states[0, -rows * columns :].T.unflatten(1, (rows, columns))
        height, width = self.patch
        return kept[:, : pixel_values.shape[-2] // height, : pixel_values.shape[-1] // width]

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return rows and columns of patches of an image, including padding."""
        sides = pixel_values.shape[-2:]
        if self.is_padded:
            sides = [side + -side % MULTIPLE for side in sides]
        return sides[0] // self.patch[0], sides[1] // self.patch[1]

    @torch.no_grad()
    def run(self, pixel_values: torch.Tensor, **options):
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        return self.model(pixel_values=pixel_values, **options)

    def attention_layers(self) -> list[tuple[nn.Module, int]]:
        """Return the attention module of each layer and the index of the attention weights in its outputs."""
        recorded = self.model._can_record_outputs["attentions"]
        kind, index = (recorded.target_class, recorded.index) if isinstance(recorded, OutputRecorder) else (recorded, 1)
        return [(module, index) for module in self.model.modules() if isinstance(module, kind)]


@dataclass(frozen=True)
class FineTuned:
    """Model for detection, classification, segmentation or change detection, in evaluation mode on the device."""

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    """Image processor for 8-bit RGB or for the bands of the model."""
    input_spec: dict | None
    """Input spec with which the model was trained on images that are not 8-bit RGB."""

    @property
    def band_names(self) -> list[str] | None:
        """Names of the model's bands, if they are not RGB."""
        return getattr(self.image_processor, "band_names", None)

    @property
    def is_detector(self) -> bool:
        return self.model.config.model_type not in MAPS and not self.is_classifier

    @property
    def is_classifier(self) -> bool:
        """True for a model that classifies whole images."""
        return self.model.config.model_type == ViTPImageClassificationConfig.model_type

    @property
    def takes_pairs(self) -> bool:
        return self.model.config.model_type == ViTPChangeDetectionConfig.model_type

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
