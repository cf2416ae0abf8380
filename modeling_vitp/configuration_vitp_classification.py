"""Configuration of the image classifier."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp import ViTPVisionConfig, own_vision_config
from .opening import ConfigNamesItsFiles
from .vision_towers import tower_of

POOLINGS = ("mean", "cls")


@strict
class ViTPImageClassificationConfig(ConfigNamesItsFiles, PreTrainedConfig):
    r"""Configuration of [`ViTPForImageClassification`].

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the ViT, a [`ViTPVisionConfig`] or one of another family, see [`register_tower`].
        pooling (`str`, defaults to `"mean"`):
            Input of the classifier: the `"mean"` of the patch tokens, or the `"cls"` token.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the classifier's initial weights.

    The other arguments are those of [`~transformers.PreTrainedConfig`]: `id2label`, and `problem_type`, which is
    `"multi_label_classification"` if an image may have any number of classes.
    """

    model_type = "vitp_image_classification"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=ViTPVisionConfig)}

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: str = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # transformers looks up the model type of a `backbone_config` in its registry, which does not have ours.
        self.backbone_config = own_vision_config(self.backbone_config)
        if not isinstance(self.backbone_config, PreTrainedConfig):
            self.backbone_config = ViTPVisionConfig.from_dict(self.backbone_config or {})
        super().__post_init__(**kwargs)

    def validate_pooling(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"Expected `pooling` to be 'mean' or 'cls', got {self.pooling!r}.")
        num_prefix_tokens = tower_of(self.backbone_config).num_prefix_tokens(self.backbone_config)
        if self.pooling == "cls" and num_prefix_tokens == 0:
            raise ValueError(f"pooling='cls': {self.backbone_config.model_type!r} has no CLS token. Use 'mean'.")


__all__ = ["ViTPImageClassificationConfig"]
