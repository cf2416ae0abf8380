"""Models for semantic segmentation and change detection: a decode head, by default UPerNet, on ViTP's feature maps."""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.models.upernet.modeling_upernet import (
    UperNetFCNHead,
    UperNetForSemanticSegmentation,
    UperNetHead,
)
from transformers.utils.generic import can_return_tuple

from .configuration_vitp import check_keys
from .configuration_vitp_dense import ViTPChangeDetectionConfig, ViTPSegmentationConfig
from .modeling_vitp_backbone import pad_to_multiple
from .modeling_vitp_multi_scale import OnMultiScaleBackbone

CLASSIFIER_STD = 0.01
HEADS: dict[str, type[nn.Module]] = {}


def register_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a class decorator that registers a decode head for segmentation and change detection.

    The head is created as `head(config, in_channels, **config.decode_head_kwargs)`, where `in_channels` are the widths
    of the maps at strides 4, 8, 16 and 32. Its `forward` takes the four maps and returns logits of shape `(batch_size,
    config.num_labels, …)` at any stride. Select it with `decode_head=name`. Before loading a saved model with a head
    from outside this package, import the file that registers the head.

    Raises:
        ValueError: if another class has this name.
    """

    def register(head: type[nn.Module]) -> type[nn.Module]:
        registered = HEADS.get(name, head)
        # The class of a notebook cell that is run again is another object of the same name.
        if (registered.__module__, registered.__qualname__) != (head.__module__, head.__qualname__):
            raise ValueError(f"A decode head named {name!r} is registered already: {registered}. Use another name.")
        HEADS[name] = head
        return head

    return register


def find_head(name: str, settings: dict | None = None) -> type[nn.Module]:
    """Return the class of a registered decode head. Raise a `ValueError` for an unknown name or setting."""
    if name not in HEADS:
        raise ValueError(
            f"Unknown decode_head {name!r}. Registered: {', '.join(HEADS)}. Import the file that registers it before "
            "creating the model, or name the file in `plugins`."
        )
    head = HEADS[name]
    _, _, *setting_names = inspect.signature(head).parameters  # after `config` and `in_channels`
    check_keys(
        "decode_head_kwargs",
        settings,
        setting_names,
        head.__name__,
    )
    return head


@register_head("upernet")
class ViTPUperNetHead(UperNetHead):
    """UPerNet with a dropout of whole channels before the classifier, as in mmsegmentation."""

    def __init__(self, config: ViTPSegmentationConfig, in_channels: list[int]):
        super().__init__(config, in_channels)
        # The activation has no weights, so that the names of the weights stay those of the parent.
        dropout = nn.Dropout2d(config.classifier_dropout)
        self.fpn_bottleneck.activation = nn.Sequential(self.fpn_bottleneck.activation, dropout)
        self.classifier.initial_std = CLASSIFIER_STD


class ViTPForSemanticSegmentation(OnMultiScaleBackbone, UperNetForSemanticSegmentation):
    """Semantic segmentation model: a decode head on the maps of [`ViTPAdapter`] or [`ViTPFeaturePyramid`].

    The head is UPerNet (arXiv 1807.10221) by default.
    """

    config: ViTPSegmentationConfig
    config_class = ViTPSegmentationConfig
    images_per_sample = 1

    def __init__(self, config: ViTPSegmentationConfig):
        super(UperNetForSemanticSegmentation, self).__init__(config)
        self.backbone = self.backbone_of(config)
        channels = [width * self.images_per_sample for width in self.backbone.channels]
        head_class = find_head(config.decode_head, config.decode_head_kwargs)
        self.decode_head = head_class(config, channels, **(config.decode_head_kwargs or {}))
        self.auxiliary_head = None
        if config.use_auxiliary_head:
            self.auxiliary_head = UperNetFCNHead(config, in_channels=channels)
            self.auxiliary_head.classifier.initial_std = CLASSIFIER_STD
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize convolutions of the heads by He et al. over their outputs, or with their `initial_std`.

        These are the distributions of mmsegmentation.
        """
        super()._init_weights(module)
        if not isinstance(module, nn.Conv2d):
            return
        if hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)
        else:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | SemanticSegmenterOutput:
        r"""Compute logits and, with `labels`, the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size. Internally they are padded with zeros at the right and at the bottom to a
                multiple of 32.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Classes from 0 to `num_labels - 1`, and `loss_ignore_index` for unlabeled pixels.

        Returns:
            `logits` of shape `(batch_size, num_labels, height, width)`, and with labels `loss`, the mean over the
            labeled pixels, or 0 without any (see `loss_average`). If requested (`output_hidden_states=True`),
            `hidden_states` and `attentions` of the ViT, see [`ViTPAdapter`] and [`ViTPFeaturePyramid`].
        """
        outputs = self.run_backbone(pad_to_multiple(pixel_values, 32, 32), **kwargs)
        return self.decode(
            outputs,
            outputs.feature_maps,
            pixel_values.shape[-2:],
            labels,
        )

    def decode(
        self,
        outputs: BackboneOutput,
        feature_maps: tuple[torch.Tensor, ...],
        size: tuple[int, int],
        labels: torch.LongTensor | None,
    ) -> SemanticSegmenterOutput:
        logits = enlarge(self.decode_head(feature_maps), size)
        loss = None
        if labels is not None:
            loss = self.segmentation_loss(logits, labels)
            if self.auxiliary_head is not None:
                auxiliary_logits = enlarge(self.auxiliary_head(feature_maps), size)
                auxiliary_loss = self.segmentation_loss(auxiliary_logits, labels)
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def segmentation_loss(
        self,
        logits: torch.Tensor,
        labels: torch.LongTensor,
    ) -> torch.Tensor:
        weights = self.config.class_weights
        if weights is not None:
            weights = torch.tensor(weights, device=logits.device)
        ignored = self.config.loss_ignore_index
        num_averaged = labels.numel()
        if self.config.loss_average == "labeled":
            num_averaged = (labels != ignored).sum().clamp(min=1)
        try:
            losses = F.cross_entropy(
                logits.float(),
                labels,
                weights,
                ignore_index=ignored,
                reduction="none",
            )
        except IndexError as error:
            raise ValueError(
                f"Expected labels from 0 to {self.config.num_labels - 1}, or loss_ignore_index={ignored}, got "
                f"{labels.unique().tolist()}."
            ) from error
        return losses.sum() / num_averaged


class ViTPForChangeDetection(ViTPForSemanticSegmentation):
    """Change detection model: one backbone for both images, and a decode head on their concatenated feature maps."""

    config: ViTPChangeDetectionConfig
    config_class = ViTPChangeDetectionConfig
    main_input_name = "pixel_values_before"
    images_per_sample = 2

    @can_return_tuple
    def forward(
        self,
        pixel_values_before: torch.Tensor,
        pixel_values_after: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | SemanticSegmenterOutput:
        r"""Compute logits and, with `labels`, the loss.

        Args:
            pixel_values_before, pixel_values_after (`torch.Tensor`):
                Normalized images of the same place, `(batch_size, num_channels, height, width)`.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                0 for unchanged pixels, 1 (or a class of change) for changed ones, `loss_ignore_index` for unlabeled
                ones.

        Returns:
            The outputs of [`ViTPForSemanticSegmentation`]. Hidden states and attentions have another dimension of size
            two, for the image before and the image after: `(batch_size, 2, patches, hidden_size)`.
        """
        images = torch.cat([pixel_values_before, pixel_values_after])
        outputs = self.run_backbone(pad_to_multiple(images, 32, 32), **kwargs)
        outputs.hidden_states = paired(outputs.hidden_states)
        outputs.attentions = paired(outputs.attentions)
        joined_maps = tuple(torch.cat(features.chunk(2), dim=1) for features in outputs.feature_maps)
        return self.decode(
            outputs,
            joined_maps,
            pixel_values_before.shape[-2:],
            labels,
        )


def enlarge(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Interpolate maps of padded images (multiples of 32) to pixels, and crop off the padding.

    Args:
        maps: `(batch_size, channels, …)` at any stride.
        size: height and width of the images.

    Returns:
        `(batch_size, channels, height, width)`.
    """
    height, width = size
    padded_height = height + -height % 32
    padded_width = width + -width % 32
    enlarged = F.interpolate(
        maps,
        size=(padded_height, padded_width),
        mode="bilinear",
        align_corners=False,
    )
    return enlarged[..., :height, :width]


def paired(states: tuple[torch.Tensor | None, ...] | None) -> tuple[torch.Tensor | None, ...] | None:
    """Convert states of all images before, then all after, to pairs `(batch_size, 2, …)`; `None` stays `None`."""
    if states is None:
        return None
    pairs = []
    for state in states:
        if state is None:
            pairs.append(None)
        else:
            pairs.append(torch.stack(state.chunk(2), dim=1))
    return tuple(pairs)


__all__ = ["ViTPForChangeDetection", "ViTPForSemanticSegmentation", "register_head"]
