"""Configuration of the classifier of images."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp import ViTPVisionConfig, own_vision_config
from .opening import ConfigNamesItsFiles

POOLINGS = ("mean", "cls")


@strict
class ViTPImageClassificationConfig(ConfigNamesItsFiles, PreTrainedConfig):
    r"""Configuration of [`ViTPForImageClassification`].

    Args:
        backbone_config (`dict` or [`ViTPVisionConfig`], *optional*):
            The ViT.
        pooling (`str`, defaults to `"mean"`):
            What stands for an image: the `"mean"` of its patch tokens, or its `"cls"` token.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the weights that a fresh classifier starts with.

    The other arguments are those of [`~transformers.PreTrainedConfig`]: `id2label`, and `problem_type`, which is
    `"multi_label_classification"` where an image may have any number of classes.
    """

    model_type = "vitp_image_classification"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=ViTPVisionConfig)}

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: str = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # transformers takes what is called so for the backbone of a neck, and looks for a model type that it knows.
        if not isinstance(self.backbone_config, PreTrainedConfig):
            self.backbone_config = ViTPVisionConfig.from_dict(self.backbone_config or {})
        self.backbone_config = own_vision_config(self.backbone_config)
        super().__post_init__(**kwargs)

    def validate_pooling(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is neither 'mean' nor 'cls'.")


__all__ = ["ViTPImageClassificationConfig"]
