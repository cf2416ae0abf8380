"""Image classifier, with one or several labels an image: a linear layer on the pooled tokens of the ViT."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLVisionModel, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .bands import spread_bands
from .configuration_vitp import ViTPVisionConfig, settings_of_head
from .configuration_vitp_classification import ViTPImageClassificationConfig
from .modeling_vitp import TaskModel, build_vit
from .modeling_vitp_backbone import check_no_dtype, open_vit, other_family_config, resize_backbone
from .vision_towers import tower_of


class ViTPForImageClassification(TaskModel, PreTrainedModel):
    """Image classification model: LayerNorm and a linear layer on the ViT's pooled tokens, as in BEiT.

    BEiT (arXiv 2106.08254) pools by the mean of the patch tokens. The CLS token can be used instead.
    """

    config: ViTPImageClassificationConfig
    config_class = ViTPImageClassificationConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ViTPVisionLayer"]

    def __init__(self, config: ViTPImageClassificationConfig):
        super().__init__(config)
        width = config.backbone_config.hidden_size
        self.backbone = build_vit(config.backbone_config)
        self.layernorm = nn.LayerNorm(width, eps=getattr(config.backbone_config, "layer_norm_eps", 1e-6))
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        id2label: dict[int, str] | list[str] | None = None,
        image_size: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "ViTPForImageClassification":
        r"""Load a pretrained ViT in float32 and initialize a new classifier on it with torch's random state.

        Args:
            backbone (`str`, `Path` or [`~transformers.PreTrainedModel`]):
                Folder or Hub id of an exported backbone, or of a ViT of any family, see [`register_tower`]; or the
                model itself. The patch size does not change.
            id2label (`dict[int, str]` or `list[str]`, *optional*):
                Names of the classes. Alternatives are `label2id` and `num_labels`.
            image_size (`int`, *optional*):
                Side of the training images in pixels, a multiple of the patch size. The position embeddings are
                interpolated to it once rather than in every step. Defaults to the backbone's image size.
            backbone_kwargs (`dict`, *optional*):
                Settings of the ViT's configuration, such as `drop_path_rate`, and arguments of `from_pretrained`, such
                as `revision`. Weights for red, green and blue are spread over `band_names`, see [`spread_bands`].
            kwargs:
                Settings of the model's configuration, such as `pooling` and `problem_type`.

        Raises:
            ValueError: if a setting is unknown, the folder has another model type, `image_size` is not a multiple of
                the patch size, or `dtype` is set (use [`~torch.nn.Module.to`]).
        """
        loading = dict(backbone_kwargs or {})
        check_no_dtype(loading)
        field_names = {field.name for field in dataclasses.fields(ViTPVisionConfig)}
        settings = {name: loading.pop(name) for name in field_names & loading.keys()}
        vit = open_vit(backbone, **loading)
        if image_size is not None:
            vit = resize_backbone(vit, image_size=image_size)
        band_names = settings.pop("band_names", None)
        kwargs = settings_of_head(cls.config_class, kwargs, id2label)
        if isinstance(vit, InternVLVisionModel):
            if band_names is not None:
                vit = spread_bands(copy.deepcopy(vit), band_names)
            fields = vit.config.to_dict()
            fields["model_type"] = ViTPVisionConfig.model_type
            fields["dtype"] = "float32"
            fields.update(settings)
            backbone_config = ViTPVisionConfig.from_dict(fields)
        else:
            backbone_config = other_family_config(vit, band_names, settings)
        config = cls.config_class(
            backbone_config=backbone_config,
            attn_implementation={"backbone_config": vit.config._attn_implementation},  # not part of the fields
            **kwargs,
        )
        model = cls(config)
        model.backbone.load_state_dict(vit.state_dict())
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | ImageClassifierOutput:
        r"""Compute logits and, with `labels`, the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images; height and width are multiples of the patch size.
            labels (`torch.Tensor`, *optional*):
                Classes, int64 of shape `(batch_size,)`. With several labels an image, 0 or 1 for each class, of shape
                `(batch_size, num_labels)`. Labels of -100 are unknown and left out of the loss.

        Returns:
            `logits` of shape `(batch_size, num_labels)`, and with labels `loss`, the mean over the known labels of the
            batch, according to `problem_type`. If requested, `hidden_states` and `attentions` of the ViT.
        """
        tower = tower_of(self.config.backbone_config)
        outputs = tower.run(
            self.backbone,
            pixel_values.to(self.dtype),
            return_dict=True,
            **self.requested_outputs(kwargs),
        )
        tokens = outputs.last_hidden_state
        if self.config.pooling == "mean":
            first_patch = tower.num_prefix_tokens(self.config.backbone_config)
            pooled = tokens[:, first_patch:].mean(dim=1)
        else:
            pooled = tokens[:, 0]
        logits = self.classifier(self.layernorm(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_of(logits, labels)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "multi_label_classification":
            is_known = labels != -100
            targets = labels.where(is_known, 0).to(logits.dtype)
            weights = is_known.to(logits.dtype)
            total = nn.functional.binary_cross_entropy_with_logits(
                logits,
                targets,
                weights,
                reduction="sum",
            )
            return total / is_known.sum().clamp(min=1)
        try:
            return self.loss_function(labels, logits, self.config)
        except IndexError as error:
            raise ValueError(
                f"Expected labels from 0 to {self.config.num_labels - 1}, got {labels.unique().tolist()}."
            ) from error


__all__ = ["ViTPForImageClassification"]
