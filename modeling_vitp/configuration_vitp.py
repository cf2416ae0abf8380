"""Configurations of the ViTP vision model and of the vision-language model it is trained in."""

import copy
import dataclasses
import difflib
from collections.abc import Collection
from inspect import getmembers_static
from types import SimpleNamespace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, InternVLConfig, InternVLVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .bands import check_band_names
from .opening import ConfigNamesItsFiles
from .vision_towers import pair, tower_of
from .vrl import check_apply_prob, check_drop_ratio, check_warmup_steps

OWN_VISION_TYPES = ("vitp_vision", InternVLVisionConfig.model_type)


@strict
class ViTPVisionConfig(ConfigNamesItsFiles, InternVLVisionConfig):
    r"""Configuration of [`ViTPVisionModel`]: InternVL's ViT with stochastic depth.

    Args:
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth: probability of skipping the residual branches of the last layer, growing linearly from 0
            at the first. Active in training only. The authors' release trains with 0.1.
        band_names (`list[str]`, *optional*):
            Names of the channels, if they are other bands than red, green and blue. `num_channels` is set to their
            number.

    The other arguments are those of [`~transformers.InternVLVisionConfig`]. InternViT-300M, which the paper starts
    from, has `attention_bias=True`. `image_size` is the size of the position embeddings, which must be square in
    patches; for images of other shapes they are interpolated.
    """

    model_type = "vitp_vision"

    drop_path_rate: float | int = 0.0
    band_names: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs):
        if self.band_names is not None:
            self.band_names = check_band_names(self.band_names)
            self.num_channels = len(self.band_names)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a config.json, also that of an exported backbone, whose type `internvl_vision` is for transformers."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == InternVLVisionConfig.model_type:
            config["model_type"] = cls.model_type
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Create the configuration, with the keyword arguments merged in before it is completed and validated."""
        field_names = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        overrides = {name: kwargs.pop(name) for name in field_names & kwargs.keys()}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def validate_drop_path_rate(self):
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"Expected `drop_path_rate` in [0, 1), got {self.drop_path_rate}.")

    def validate_grid(self):
        height, width = patch_grid(self)
        if min(height, width) < 1 or (self.use_absolute_position_embeddings and height != width):
            raise ValueError(
                f"Expected a square image_size of at least one patch, got {list(self.image_size)}, which has {height} "
                f"x {width} patches of {list(self.patch_size)} pixels. The position embeddings are square and are "
                "interpolated for images of other shapes: set a square image_size here, and the shape in the image "
                "processor's size."
            )


@strict
class ViTPConfig(ConfigNamesItsFiles, InternVLConfig):
    r"""Configuration of [`ViTPForConditionalGeneration`]: ViT, pixel shuffle, two-layer projector, causal LM.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the ViT, a [`ViTPVisionConfig`] or one of another family in transformers, see
            [`register_tower`]. A dictionary without `model_type` is that of a [`ViTPVisionConfig`].
        vrl_drop_ratio (`float`, defaults to 0.0):
            Drop ratio r in [0, 1) of the training, recorded only: the processor drops tokens, the model does not.
        vrl_apply_prob (`float`, defaults to 1.0):
            Share of the training samples that VRL was applied to, recorded only.
        vrl_warmup_steps (`int`, defaults to 0):
            Optimizer steps at the beginning of training in which no token was dropped, recorded only.
        answer_mask_ratio (`float`, defaults to 0.0):
            Share of the answer tokens that was masked in the input in training, recorded only.
        image_seq_length (`int`):
            Visual tokens of one tile. Always computed from the image size, the patch size and the downsample ratio.
        tie_word_embeddings (`bool`, *optional*):
            Whether the LM head shares the token embeddings' weights. Defaults to the language model's setting.

    The other arguments are those of [`~transformers.InternVLConfig`].
    """

    model_type = "vitp"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=ViTPVisionConfig),
    }

    vrl_drop_ratio: float | int = 0.0
    vrl_apply_prob: float | int = 1.0
    vrl_warmup_steps: int = 0
    answer_mask_ratio: float | int = 0.0
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = own_vision_config(self.vision_config)
        self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        height, width = patch_grid(self.vision_config)
        rows = int(height * self.downsample_ratio)
        columns = int(width * self.downsample_ratio)
        self.image_seq_length = rows * columns

    def validate_pixel_shuffle(self):
        height, width = patch_grid(self.vision_config)
        rows = height * self.downsample_ratio
        columns = width * self.downsample_ratio
        if min(rows, columns) < 1 or rows % 1 or columns % 1:
            raise ValueError(
                f"image_size={self.vision_config.image_size} has {height} x {width} patches of "
                f"{self.vision_config.patch_size} pixels, which must be divisible into whole visual tokens by "
                f"downsample_ratio={self.downsample_ratio}. Set an image_size with an even number of patches (for a "
                "ratio of 0.5)."
            )

    def validate_vrl(self):
        check_drop_ratio(self.vrl_drop_ratio)
        check_apply_prob(self.vrl_apply_prob)
        check_warmup_steps(self.vrl_warmup_steps)


def own_vision_config(config: dict | PreTrainedConfig | None) -> dict | PreTrainedConfig | None:
    """Return a copy of the ViT's configuration, with transformers' InternVLVisionConfig as a [`ViTPVisionConfig`].

    Raises:
        ValueError: if the family of the ViT is unknown.
    """
    if isinstance(config, dict) and config.get("model_type", "vitp_vision") not in OWN_VISION_TYPES:
        tower_of(SimpleNamespace(**config))  # raises an error for an unknown family
        config = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    if not isinstance(config, PreTrainedConfig) or config.model_type == ViTPVisionConfig.model_type:
        return copy.deepcopy(config)
    if config.model_type == InternVLVisionConfig.model_type:
        fields = config.to_dict()
        fields["model_type"] = ViTPVisionConfig.model_type
        fields.pop("auto_map", None)
        return ViTPVisionConfig.from_dict(fields, attn_implementation=config._attn_implementation)
    return tower_of(config).prepare(config)


def patch_grid(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the number of patches in height and width, of an image of `size` or of the configuration's size."""
    height, width = size or pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    return height // patch_height, width // patch_width


def check_keys(
    name: str,
    settings: Any,
    known: Collection[str],
    owner: str,
) -> None:
    """Raise a `ValueError` if `settings` is not a mapping or one of its keys is unknown.

    Args:
        name: name of the settings for messages, such as `from_scratch.vision_config`.
        owner: class that defines the known keys, for messages.
    """
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"Expected {name} to be a mapping, got {str(settings)[:80]!r}.")
    for key in settings:
        if key in known:
            continue
        nearest = difflib.get_close_matches(str(key), known, 1, 0.6)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Expected a key of {owner}."
        if len(known) <= 20:
            hint += f" Known: {', '.join(sorted(known))}."
        raise ValueError(f"{name}: unknown key {key!r}. {hint}")


def known_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """Return the keys that a configuration accepts: fields, aliases, properties, and keys saved beside them."""
    names = {field.name for field in dataclasses.fields(config_class)}
    if "rope_parameters" in names:
        names |= {"rope_theta", "partial_rotary_factor"}
    names.update(config_class.attribute_map)
    for name, member in getmembers_static(config_class):
        if getattr(member, "fset", None):  # a property that can be set
            names.add(name)
    public_names = {name for name in names if not name.startswith("_")}
    return public_names | {"model_type", "auto_map", "_name_or_path"}


def settings_of_head(
    config_class: type[PreTrainedConfig],
    settings: dict[str, Any],
    id2label: Any = None,
) -> dict[str, Any]:
    """Return the settings of a model with classes, including `id2label` and `label2id`.

    Args:
        settings: fields of the configuration; classes may also be named by `label2id`.
        id2label: names of the classes by index, or in a list.

    Raises:
        ValueError: if the configuration has no such field, or `num_labels` is not the number of names.
    """
    check_keys(
        "from_backbone",
        settings,
        known_keys(config_class),
        config_class.__name__,
    )
    if id2label is None and settings.get("label2id") is not None:
        id2label = {index: label for label, index in settings["label2id"].items()}
    if id2label is None:
        return settings
    labels = label_settings(id2label)
    num_labels = settings.get("num_labels", len(id2label))
    if num_labels not in (None, len(id2label)):
        raise ValueError(
            f"Expected `num_labels` to be the number of names, {len(id2label)}, got {num_labels}. Remove it."
        )
    return {**settings, **labels}


def label_settings(id2label: dict | list[str] | tuple[str, ...]) -> dict[str, dict]:
    """Return `id2label` and `label2id` of classes that are named by index or in a list. The names must be complete."""
    if isinstance(id2label, (list, tuple)):
        id2label = dict(enumerate(id2label))
    names = {int(index): label for index, label in id2label.items()}  # JSON has string keys
    indices = sorted(names)
    if not names or indices != list(range(len(names))):
        raise ValueError(f"Expected `id2label` to name the classes 0 to N - 1, got {id2label!r}.")
    sorted_names = {index: names[index] for index in indices}
    label2id = {label: index for index, label in sorted_names.items()}
    return {"id2label": sorted_names, "label2id": label2id}


__all__ = ["ViTPConfig", "ViTPVisionConfig"]
