"""Configurations of the ViT as a backbone for dense tasks, and of the models built on it."""

from huggingface_hub.dataclasses import strict
from transformers import InternVLVisionConfig, PreTrainedConfig, UperNetConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp import ViTPVisionConfig, own_vision_config
from .opening import ConfigNamesItsFiles
from .vision_towers import tower_of


@strict
class ViTPBackboneConfig(BackboneConfigMixin, ViTPVisionConfig):
    r"""Configuration of [`ViTPBackbone`]: the ViT with its layers as stages.

    The stages are `stem` (the embeddings), `stage1`, `stage2` …, one for each layer.

    Args:
        out_features (`list[str]`, *optional*):
            Stages to return as feature maps. Defaults to the last one if `out_indices` is not set either.
        out_indices (`list[int]`, *optional*):
            Indices of the stages to return, 0 for the stem.

    The other arguments are those of [`ViTPVisionConfig`].
    """

    model_type = "vitp_backbone"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = self.list_stages()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None),
            out_indices=kwargs.pop("out_indices", None),
        )
        super().__post_init__(**kwargs)

    def list_stages(self) -> list[str]:
        layers = range(1, self.num_hidden_layers + 1)
        return ["stem", *(f"stage{layer}" for layer in layers)]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a config.json, also that of an exported backbone or a [`ViTPVisionModel`] with the same weights."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") in (InternVLVisionConfig.model_type, ViTPVisionConfig.model_type):
            config["model_type"] = cls.model_type
            config.pop("auto_map", None)
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Create the configuration; keyword arguments replace the stages to return as a whole."""
        overrides = {name: kwargs.pop(name) for name in ("out_features", "out_indices") if name in kwargs}
        if overrides:
            config_dict = {**config_dict, "out_features": None, "out_indices": None, **overrides}
        return super().from_dict(config_dict, **kwargs)


@strict
class ViTPMultiScaleConfig(ViTPBackboneConfig):
    r"""Base configuration of the backbones with feature maps at strides 4, 8, 16 and 32.

    The patches have 16 pixels. The stages are the four maps, all of which are returned by default.

    Args:
        vit_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of a ViT of another family, see [`register_tower`]. The fields of [`ViTPVisionConfig`] then
            have its sizes. Defaults to the ViT that these fields describe.
    """

    patch_size: int | list[int] | tuple[int, int] = (16, 16)
    vit_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if self.vit_config is not None:
            self.vit_config = own_vision_config(self.vit_config)
            for name in ("hidden_size", "num_hidden_layers", "num_channels", "image_size", "patch_size"):
                setattr(self, name, getattr(self.vit_config, name))
            tower = tower_of(self.vit_config)
            if tower.has_stochastic_depth(self.vit_config):
                tower.set_drop_path_rate(self.vit_config, self.drop_path_rate)
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_features"] = self.list_stages()
        super().__post_init__(**kwargs)

    def list_stages(self) -> list[str]:
        return ["stride4", "stride8", "stride16", "stride32"]

    def validate_patch_size(self):
        if tuple(self.patch_size) != (16, 16):
            raise ValueError(
                f"Expected `patch_size` (16, 16), which maps at strides 4 to 32 need, got {self.patch_size}. "
                "`from_backbone` interpolates the patch embeddings."
            )


@strict
class ViTPAdapterConfig(ViTPMultiScaleConfig):
    r"""Configuration of [`ViTPAdapter`] (ViT-Adapter, arXiv 2205.08534). The defaults are those of ViTP's release.

    Args:
        interaction_layers (`list[list[int]]`, *optional*):
            First and last layer of the ViT in each of the four interactions. The ranges must be contiguous and cover
            all layers. Defaults to 0-7, 8-11, 12-15 and 16-23 for 24 layers, otherwise to four equal parts.
        deformable_heads (`int`, defaults to 16), deformable_points (`int`, defaults to 4):
            Heads of the deformable attention, and its sampling points for each head and level.
        deformable_ratio (`float`, defaults to 0.25):
            Width of the deformable attention's values, as a share of `hidden_size`.
        deformable_dropout (`float`, defaults to 0):
            Dropout of the deformable attention's output in training.
        extractor_residual (`str`, defaults to `"tokens"`):
            Tensor that the output of an extractor's attention is added to: the `"tokens"`, as published for
            ViT-Adapter, or `"normed_tokens"`, the tokens after LayerNorm, as in the published code with mmcv's
            attention (there with a `deformable_ratio` of 1 and a `deformable_dropout` of 0.1).
        feed_forward_ratio (`float`, defaults to 0.25):
            Width of the extractors' convolutional feed-forward network, as a share of `hidden_size`.
        injector_init_value (`float`, defaults to 0.1):
            Initial value of the injectors' gate.
        extra_extractors (`int`, defaults to 2):
            Number of extractors after the last interaction.
        spatial_prior_channels (`int`, defaults to 64):
            Base width of the convolutional stem.
        spatial_prior_norm (`str`, defaults to `"layer_norm"`):
            Norm of the stem and of the four maps: `"layer_norm"` (over channels), or `"batch_norm"` as in the
            published ViT-Adapter (there synchronized; see `torch.nn.SyncBatchNorm.convert_sync_batchnorm`).
        add_vit_features (`bool`, defaults to `True`):
            Whether the ViT's last features are added to the four maps.

    The other arguments are those of [`ViTPBackboneConfig`]. The stages are the maps at strides 4, 8, 16 and 32, all of
    which are returned by default.
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
        super().__post_init__(**kwargs)
        if self.interaction_layers is None:
            self.interaction_layers = default_interactions(self.num_hidden_layers)

    def validate_adapter(self):
        if not are_contiguous(self.interaction_layers, self.num_hidden_layers):
            raise ValueError(
                f"interaction_layers={self.interaction_layers} must be four contiguous [first, last] ranges that "
                f"cover layers 0 to {self.num_hidden_layers - 1}."
            )
        choices = {
            "spatial_prior_norm": ("layer_norm", "batch_norm"),
            "extractor_residual": ("tokens", "normed_tokens"),
        }
        for name, options in choices.items():
            choice = getattr(self, name)
            if choice not in options:
                raise ValueError(f"Expected `{name}` to be one of {options}, got {choice!r}.")
        if not 0 <= self.deformable_dropout < 1:
            raise ValueError(f"Expected `deformable_dropout` in [0, 1), got {self.deformable_dropout}.")

    def validate_deformable_heads(self):
        width = int(self.hidden_size * self.deformable_ratio)
        if self.deformable_heads < 1 or width % self.deformable_heads:
            divisors = [heads for heads in range(1, self.deformable_heads) if width % heads == 0]
            largest_divisor = max(divisors, default=1)
            raise ValueError(
                f"deformable_heads={self.deformable_heads} must divide the values' width of {width} (hidden_size * "
                f"deformable_ratio). Set `deformable_heads` of the backbone, for example to {largest_divisor}. The "
                "feature pyramid (neck: pyramid) has no such limit."
            )


def default_interactions(num_layers: int) -> list[list[int]]:
    """Return the first and the last layer of each of the four interactions of a ViT."""
    if num_layers == 24:
        ends = [8, 12, 16, 24]
    else:
        ends = [round(num_layers * quarters / 4) for quarters in (1, 2, 3, 4)]
    interactions = []
    start = 0
    for end in ends:
        interactions.append([start, end - 1])
        start = end
    return interactions


def are_contiguous(interactions: list[list[int]], num_layers: int) -> bool:
    """Return whether there are four ranges of layers that cover all layers in order. A range may be empty."""
    if [len(layers) for layers in interactions] != [2] * 4:
        return False
    start = 0
    for first, last in interactions:
        if first != start or last + 1 < start:
            return False
        start = last + 1
    return start == num_layers


@strict
class ViTPFeaturePyramidConfig(ViTPMultiScaleConfig):
    r"""Configuration of [`ViTPFeaturePyramid`] (the simple feature pyramid of ViTDet, arXiv 2203.16527).

    Args:
        pyramid_channels (`int`, defaults to 256):
            Width of the four maps.

    The other arguments are those of [`ViTPBackboneConfig`]. The stages are the maps at strides 4, 8, 16 and 32, all of
    which are returned by default.
    """

    model_type = "vitp_feature_pyramid"

    pyramid_channels: int = 256


MULTI_SCALE_CONFIGS = {config.model_type: config for config in (ViTPAdapterConfig, ViTPFeaturePyramidConfig)}


def multi_scale_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """Return a `backbone_config` as an object; a dictionary without `model_type` is that of an adapter.

    Raises:
        ValueError: if the backbone does not return maps at four strides.
    """
    if config is None:
        return None
    # transformers looks up the model type in its registry, which does not have the types of saved code.
    is_object = isinstance(config, PreTrainedConfig)
    if is_object:
        model_type = config.model_type
    else:
        model_type = config.get("model_type", ViTPAdapterConfig.model_type)
    if model_type not in MULTI_SCALE_CONFIGS:
        raise ValueError(f"Expected a backbone_config of type {' or '.join(MULTI_SCALE_CONFIGS)}, got {model_type!r}.")
    if is_object:
        return config
    return MULTI_SCALE_CONFIGS[model_type].from_dict(config)


@strict
class ViTPSegmentationConfig(ConfigNamesItsFiles, UperNetConfig):
    r"""Configuration of [`ViTPForSemanticSegmentation`].

    Args:
        backbone_config (`dict`, [`ViTPAdapterConfig`] or [`ViTPFeaturePyramidConfig`], *optional*):
            Configuration of the backbone (ViT and neck). A dictionary without `model_type` means an adapter.
        decode_head (`str`, defaults to `"upernet"`):
            Name of the head that turns the maps into logits, see [`register_head`].
        decode_head_kwargs (`dict`, *optional*):
            Settings of the head. The settings of UPerNet are fields of this configuration.
        classifier_dropout (`float`, defaults to 0):
            Dropout of whole channels before the classifier of UPerNet, in training.
        class_weights (`list[float]`, *optional*):
            Weights of the classes in the loss, in the order of `id2label`.
        loss_average (`str`, defaults to `"labeled"`):
            Pixels over which the loss is averaged: the `"labeled"` ones, or `"all"`, also those of
            `loss_ignore_index`, whose loss is 0.
        volume_plane (`str`, *optional*):
            Plane of the slices of volumes that the model was trained on: `"axial"`, `"coronal"` or `"sagittal"`.

    The other arguments are those of [`~transformers.UperNetConfig`].
    """

    model_type = "vitp_segmentation"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=ViTPAdapterConfig)}

    auxiliary_in_channels: int | None = None
    decode_head: str = "upernet"
    decode_head_kwargs: dict | None = None
    classifier_dropout: float | int = 0.0
    class_weights: list[float] | None = None
    loss_average: str = "labeled"
    volume_plane: str | None = None

    def __post_init__(self, **kwargs):
        self.backbone_config = multi_scale_config(self.backbone_config)
        super().__post_init__(**kwargs)

    def validate_loss_average(self):
        if self.loss_average not in ("labeled", "all"):
            raise ValueError(f"Expected `loss_average` to be 'labeled' or 'all', got {self.loss_average!r}.")

    def validate_class_weights(self):
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(
                f"Expected {self.num_labels} `class_weights`, one for each class, got {len(self.class_weights)}."
            )


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
