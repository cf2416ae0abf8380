"""Configurations of the ViT as a backbone for dense tasks, and of the models on top of it."""

import dataclasses

from huggingface_hub.dataclasses import strict
from transformers import InternVLVisionConfig, PreTrainedConfig, UperNetConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp import ViTPVisionConfig
from .opening import ConfigNamesItsFiles


@strict
class ViTPBackboneConfig(BackboneConfigMixin, ViTPVisionConfig):
    r"""Configuration of [`ViTPBackbone`]: the ViT with its layers as stages, `stem` (the embeddings), `stage1`, …

    Args:
        out_features (`list[str]`, *optional*):
            Stages to give as feature maps; the last one if neither this nor `out_indices` is given.
        out_indices (`list[int]`, *optional*):
            The same by number, 0 for the stem.

    The other arguments are those of [`ViTPVisionConfig`].
    """

    model_type = "vitp_backbone"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = self.list_stages()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def list_stages(self) -> list[str]:
        return ["stem", *(f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1))]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Also reads an exported backbone and a [`ViTPVisionModel`]: the same weights."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") in (InternVLVisionConfig.model_type, ViTPVisionConfig.model_type):
            config["model_type"] = cls.model_type
            config.pop("auto_map", None)
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Settings given beside the folder are those that the configuration is made and checked with."""
        names = {field.name for field in dataclasses.fields(cls)} | {"out_features", "out_indices"}
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        if given.keys() & {"out_features", "out_indices"}:
            config_dict = {**config_dict, "out_features": None, "out_indices": None}
        return super().from_dict({**config_dict, **given}, **kwargs)


@strict
class ViTPMultiScaleConfig(ViTPBackboneConfig):
    r"""What the configurations of the backbones with maps at strides 4, 8, 16 and 32 have in common: patches of 16
    pixels, and the four maps as stages, all of which are given by default.
    """

    patch_size: int | list[int] | tuple[int, int] = (16, 16)

    def __post_init__(self, **kwargs):
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_features"] = self.list_stages()
        super().__post_init__(**kwargs)

    def list_stages(self) -> list[str]:
        return ["stride4", "stride8", "stride16", "stride32"]

    def validate_patch_size(self):
        if tuple(self.patch_size) != (16, 16):
            raise ValueError(
                f"patch_size={self.patch_size}: maps at strides 4 to 32 need patches of 16 pixels. `from_backbone` "
                "resamples the patches."
            )


@strict
class ViTPAdapterConfig(ViTPMultiScaleConfig):
    r"""Configuration of [`ViTPAdapter`] (ViT-Adapter, arXiv 2205.08534). The defaults are those of ViTP's fine-tuning.

    Args:
        interaction_layers (`list[list[int]]`, *optional*):
            First and last layer of the ViT in each interaction, which must follow on one another and cover all
            layers. For 24 layers, by default, 0-7, 8-11, 12-15 and 16-23; otherwise four equal parts.
        deformable_heads (`int`, defaults to 16), deformable_points (`int`, defaults to 4):
            Heads, and sampling points a head and level, of the deformable attention.
        deformable_ratio (`float`, defaults to 0.25):
            Width of the deformable attention's values, as a share of `hidden_size`.
        deformable_dropout (`float`, defaults to 0):
            Dropout of the deformable attention's output in training.
        extractor_residual (`str`, defaults to `"tokens"`):
            What an extractor's attention is added to: the `"tokens"`, as ViT-Adapter is published, or
            `"normed_tokens"`, their LayerNorm, as its code computes with mmcv's attention, which adds its query (with
            a `deformable_ratio` of 1 and a `deformable_dropout` of 0.1).
        feed_forward_ratio (`float`, defaults to 0.25):
            Width of the extractors' convolutional feed-forward, as a share of `hidden_size`.
        injector_init_value (`float`, defaults to 0.1):
            Start of the injectors' gate.
        extra_extractors (`int`, defaults to 2):
            Extractors after the last interaction.
        spatial_prior_channels (`int`, defaults to 64):
            Base width of the convolutional stem.
        spatial_prior_norm (`str`, defaults to `"layer_norm"`):
            `"layer_norm"` (over channels) or `"batch_norm"`, which the published ViT-Adapter has (synchronised; see
            `torch.nn.SyncBatchNorm.convert_sync_batchnorm`). Also the norm of the four maps.
        add_vit_features (`bool`, defaults to `True`):
            Whether the ViT's last features are added to the four maps.

    The other arguments are those of [`ViTPBackboneConfig`]; the stages are the maps at strides 4, 8, 16 and 32, all
    four of which are given by default.
    """

    model_type = "vitp_adapter"

    interaction_layers: list[list[int]] | None = None
    deformable_heads: int = 16
    deformable_points: int = 4
    deformable_ratio: float | int = 0.25
    deformable_dropout: float | int = 0.0
    extractor_residual: str = "tokens"
    feed_forward_ratio: float | int = 0.25
    injector_init_value: float | int = 0.1
    extra_extractors: int = 2
    spatial_prior_channels: int = 64
    spatial_prior_norm: str = "layer_norm"
    add_vit_features: bool = True

    def __post_init__(self, **kwargs):
        if self.interaction_layers is None:
            depth = self.num_hidden_layers
            ends = [8, 12, 16, 24] if depth == 24 else [round(depth * part / 4) for part in (1, 2, 3, 4)]
            self.interaction_layers = [[start, end - 1] for start, end in zip([0, *ends], ends)]
        super().__post_init__(**kwargs)

    def validate_adapter(self):
        if [len(pair) for pair in self.interaction_layers] != [2] * 4 or not self._covers_all_layers():
            raise ValueError(
                f"interaction_layers={self.interaction_layers} must be four [first, last] ranges that follow on one "
                f"another and cover layers 0 to {self.num_hidden_layers - 1}."
            )
        if self.spatial_prior_norm not in ("layer_norm", "batch_norm"):
            raise ValueError(
                f"spatial_prior_norm={self.spatial_prior_norm!r} is neither 'layer_norm' nor 'batch_norm'."
            )
        if self.extractor_residual not in ("tokens", "normed_tokens"):
            raise ValueError(f"extractor_residual={self.extractor_residual!r} is neither 'tokens' nor 'normed_tokens'.")
        if not 0 <= self.deformable_dropout < 1:
            raise ValueError(f"deformable_dropout={self.deformable_dropout} is not within [0, 1).")
        width = int(self.hidden_size * self.deformable_ratio)
        if self.deformable_heads < 1 or width % self.deformable_heads:
            fits = max((heads for heads in range(1, self.deformable_heads) if width % heads == 0), default=1)
            raise ValueError(
                f"deformable_heads={self.deformable_heads} does not divide the values' width of {width} (hidden_size * "
                f"deformable_ratio): give one that does; in a recipe backbone: {{deformable_heads: {fits}}}, in Python "
                "backbone_kwargs of from_backbone. The feature pyramid (neck: pyramid) has none."
            )

    def _covers_all_layers(self) -> bool:
        starts = [0, *(last + 1 for _, last in self.interaction_layers)]
        follows = all(first == start <= last + 1 for (first, last), start in zip(self.interaction_layers, starts))
        return follows and starts[-1] == self.num_hidden_layers


@strict
class ViTPFeaturePyramidConfig(ViTPMultiScaleConfig):
    r"""Configuration of [`ViTPFeaturePyramid`] (the simple feature pyramid of ViTDet, arXiv 2203.16527).

    Args:
        pyramid_channels (`int`, defaults to 256):
            Width of the four maps.

    The other arguments are those of [`ViTPBackboneConfig`]; the stages are the maps at strides 4, 8, 16 and 32, all
    four of which are given by default.
    """

    model_type = "vitp_feature_pyramid"

    pyramid_channels: int = 256


MULTI_SCALE_CONFIGS = {config.model_type: config for config in (ViTPAdapterConfig, ViTPFeaturePyramidConfig)}


def multi_scale_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """A `backbone_config` as an object; an adapter's if a dictionary names no `model_type`.

    Raises:
        ValueError: if it is of a backbone that does not give maps at four strides.
    """
    if config is None:
        return None
    # transformers looks for its model type among those that are registered, which saved code is not.
    is_object = isinstance(config, PreTrainedConfig)
    model_type = config.model_type if is_object else config.get("model_type", ViTPAdapterConfig.model_type)
    if model_type not in MULTI_SCALE_CONFIGS:
        raise ValueError(f"backbone_config is a {model_type!r} and none of {', '.join(MULTI_SCALE_CONFIGS)}.")
    return config if is_object else MULTI_SCALE_CONFIGS[model_type].from_dict(config)


@strict
class ViTPSegmentationConfig(ConfigNamesItsFiles, UperNetConfig):
    r"""Configuration of [`ViTPForSemanticSegmentation`].

    Args:
        backbone_config (`dict`, [`ViTPAdapterConfig`] or [`ViTPFeaturePyramidConfig`], *optional*):
            The ViT and what makes its features maps at four strides; an adapter if a dictionary names no `model_type`.
        decode_head (`str`, defaults to `"upernet"`):
            Name of the head that turns the maps into logits, see [`register_head`].
        decode_head_kwargs (`dict`, *optional*):
            Settings of that head. Those of UPerNet are fields of this configuration.
        class_weights (`list[float]`, *optional*):
            Weights of the classes in the loss, in the order of `id2label`.

    The other arguments are those of [`~transformers.UperNetConfig`].
    """

    model_type = "vitp_segmentation"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=ViTPAdapterConfig)}

    auxiliary_in_channels: int | None = None
    decode_head: str = "upernet"
    decode_head_kwargs: dict | None = None
    class_weights: list[float] | None = None

    def __post_init__(self, **kwargs):
        self.backbone_config = multi_scale_config(self.backbone_config)
        super().__post_init__(**kwargs)

    def validate_class_weights(self):
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(f"class_weights has {len(self.class_weights)} values for {self.num_labels} classes.")


@strict
class ViTPChangeDetectionConfig(ViTPSegmentationConfig):
    r"""Configuration of [`ViTPForChangeDetection`]; the arguments are those of [`ViTPSegmentationConfig`]."""

    model_type = "vitp_change_detection"


__all__ = [
    "ViTPAdapterConfig",
    "ViTPBackboneConfig",
    "ViTPChangeDetectionConfig",
    "ViTPFeaturePyramidConfig",
    "ViTPSegmentationConfig",
]
