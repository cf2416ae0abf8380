"""ViT backbone with transformers' backbone API: one feature map for each requested layer."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BackboneOutput
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bands import spread_bands
from .configuration_vitp import ViTPVisionConfig, own_vision_config, patch_grid
from .configuration_vitp_dense import MULTI_SCALE_CONFIGS, ViTPBackboneConfig, ViTPMultiScaleConfig
from .modeling_vitp import (
    HUB_OPTIONS,
    LANGUAGE_MODELS,
    VISION_MODELS,
    ViTPVisionEncoder,
    ViTPVisionModel,
    ViTPVisionPreTrainedModel,
    build_vit,
)
from .opening import naming, read_config_fields, way_to_vit
from .vision_parts import read_part, stated_license, vision_part
from .vision_towers import TOWERS, VisionTower, other_families, pair, resample_positions, tower_of

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)
WITH_INTERNVIT = {*LANGUAGE_MODELS, *MULTI_SCALE_CONFIGS, "intern_vit_6b"}  # the last in InternVL's own code


class ViTPBackbone(BackboneMixin, ViTPVisionModel):
    """Backbone of the ViT alone, with feature maps at its patch stride, from any of its layers.

    `from_pretrained` loads an exported backbone or a [`ViTPVisionModel`], as a folder or a Hub id:
    `ViTPBackbone.from_pretrained(folder, out_features=["stage6", "stage12"])`.
    """

    config: ViTPBackboneConfig
    config_class = ViTPBackboneConfig
    opens = VISION_MODELS

    def __init__(self, config: ViTPBackboneConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BackboneOutput:
        r"""Compute the feature maps of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size. They are padded at the right and at the bottom to whole patches, with
                zeros, which is the mean of the training images.

        Returns:
            `feature_maps`, one for each of `out_features`, of shape
            `(batch_size, hidden_size, ceil(height / patch_size), ceil(width / patch_size))`.
        """
        patch_height, patch_width = self.config.patch_size
        pixel_values = pad_to_multiple(pixel_values, patch_height, patch_width)
        height, width = pixel_values.shape[-2:]
        grid = (height // patch_height, width // patch_width)
        kwargs["return_dict"] = True
        outputs = ViTPVisionModel.forward(self, pixel_values, **kwargs)
        states = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        feature_maps = []
        for stage, state in zip(self.stage_names, states):
            if stage in self.out_features:
                patches = state[:, 1:]
                feature_maps.append(patches.transpose(1, 2).unflatten(2, grid))
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ViTPExportedBackbone(ViTPBackbone):
    """Class that `AutoBackbone` finds for an exported backbone, which it loads as [`ViTPBackbone`]."""

    config_class = ViTPVisionConfig  # class of the folder's config, checked by the Auto classes

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config: ViTPVisionConfig,
        **kwargs,
    ):
        stages = {name: kwargs.pop(name) for name in ("out_features", "out_indices") if name in kwargs}
        fields = config.to_dict()
        fields["model_type"] = ViTPBackboneConfig.model_type
        fields.pop("auto_map", None)
        attention = config._attn_implementation  # not part of the fields
        config = ViTPBackboneConfig.from_dict(fields, attn_implementation=attention, **stages)
        return ViTPBackbone.from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            **kwargs,
        )


class ViTPMultiScaleBackbone(BackboneMixin, ViTPVisionPreTrainedModel):
    """Base class of [`ViTPAdapter`] and [`ViTPFeaturePyramid`]: a ViT with feature maps at strides 4, 8, 16 and 32."""

    config: ViTPMultiScaleConfig
    opens = VISION_MODELS  # not another neck's folder

    def __init__(self, config: ViTPMultiScaleConfig):
        if config.vit_config is not None and config._attn_implementation is not None:
            config.vit_config._attn_implementation = config._attn_implementation
        super().__init__(config)

    def build_vit(self, config: ViTPMultiScaleConfig) -> None:
        """Create the ViT: ViTP's as modules of this model itself, one of another family as `vit`."""
        if config.vit_config is not None:
            # transformers sets the dtype of a model's parts, but not that of the parts of these.
            config.vit_config.dtype = torch.get_default_dtype()
            self.vit = build_vit(config.vit_config)
            return
        self.embeddings = InternVLVisionEmbeddings(config)
        self.encoder = ViTPVisionEncoder(config)

    def freeze_skipped_maps(self) -> None:
        """Freeze the layers of maps that are not returned, because data-parallel training waits for their gradient."""
        for index, stage in enumerate(self.stage_names):
            if stage not in self.out_features:
                for layers in self.layers_of_map(index):
                    layers.requires_grad_(False)

    def layers_of_map(self, index: int) -> list[nn.Module]:
        """Return the layers that only the map of this index depends on."""
        raise NotImplementedError

    @property
    def tower(self) -> tuple[VisionTower, nn.Module]:
        """Family and model of the ViT."""
        if self.config.vit_config is None:
            return tower_of(self.config), self
        return tower_of(self.config.vit_config), self.vit

    def get_input_embeddings(self) -> nn.Module:
        if self.config.vit_config is None:
            return self.embeddings.patch_embeddings
        return self.vit.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BackboneOutput:
        r"""Compute the feature maps of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size. Internally they are padded with zeros at the right and at the bottom to a
                multiple of 32.

        Returns:
            `feature_maps`, by default four of shape
            `(batch_size, channels, ceil(height / stride), ceil(width / stride))` at strides 4, 8, 16 and 32. With
            `output_hidden_states=True` also the ViT's `hidden_states`: the input of its first layer and the output of
            each layer, `num_hidden_layers + 1` of shape `(batch_size, patches, hidden_size)`, or with the CLS token
            first, `1 + patches`, if the backbone has one ([`ViTPFeaturePyramid`]). The patches are those of the padded
            image.
        """
        kwargs["return_dict"] = True
        outputs = self._record(pixel_values, **kwargs)
        if outputs.hidden_states:
            tower, _ = self.tower
            batch_size = len(pixel_values)
            outputs.hidden_states = tuple(tower.recorded_states(state, batch_size) for state in outputs.hidden_states)
        return outputs

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _record(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Return the feature maps, and the outputs of layers that transformers records."""
        height, width = pixel_values.shape[-2:]
        indices = [index for index, stage in enumerate(self.stage_names) if stage in self.out_features]
        padded_maps = self.maps(pad_to_multiple(pixel_values.to(self.dtype), 32, 32), indices)
        feature_maps = []
        for index, features in zip(indices, padded_maps):
            rows = math.ceil(height / STRIDES[index])
            columns = math.ceil(width / STRIDES[index])
            feature_maps.append(features[:, :, :rows, :columns])
        return BackboneOutput(feature_maps=tuple(feature_maps))

    def maps(
        self,
        pixel_values: torch.Tensor,
        indices: list[int],
    ) -> list[torch.Tensor]:
        """Return the maps of these `indices` among the four. The last layers of the other maps are skipped.

        Height and width of the images are multiples of 32.
        """
        raise NotImplementedError

    @classmethod
    def from_backbone(cls, backbone: str | Path | PreTrainedModel, **kwargs):
        r"""Load the ViT of a pretrained backbone in float32, and initialize a new neck on it.

        Patches of another size than 16 pixels are interpolated by [`resize_backbone`], which keeps the grid: a ViT for
        patches of 14 and images of 448 pixels becomes one for 16 and 512.

        Args:
            backbone (`str`, `Path` or [`~transformers.PreTrainedModel`]):
                Folder or Hub id of an exported backbone, or of a ViT of any family, see [`register_tower`]; or the
                model itself. A folder of this class is loaded with its neck.
            kwargs:
                Settings of the configuration, such as `drop_path_rate`, and arguments of `from_pretrained`, such as
                `revision`. If `band_names` differ from the backbone's, its weights for red, green and blue are spread
                over them by [`spread_bands`].

        Raises:
            ValueError: if the folder has another model type or other bands, or `dtype` is set (use
                [`~torch.nn.Module.to`]).
        """
        check_no_dtype(kwargs)
        field_names = {field.name for field in dataclasses.fields(cls.config_class)}
        field_names |= {"out_features", "out_indices"}
        settings = {name: kwargs.pop(name) for name in field_names & kwargs.keys()}
        band_names = settings.pop("band_names", None)
        if not isinstance(backbone, PreTrainedModel):
            if read_config_fields(backbone, **kwargs).get("model_type") == cls.config_class.model_type:
                model = cls.from_pretrained(backbone, **{"dtype": torch.float32, **settings, **kwargs})
                return model if band_names is None else spread_bands(model, band_names)
        vit = open_vit(backbone, **kwargs)
        image_height, _ = pair(vit.config.image_size)
        patch_height, _ = pair(vit.config.patch_size)
        grid_side = image_height // patch_height
        vit = resize_backbone(vit, patch_size=16, image_size=16 * grid_side)
        if isinstance(vit, InternVLVisionModel):
            return cls.on_internvit(vit, band_names, settings)
        return cls.on_other_family(vit, band_names, settings)

    @classmethod
    def on_internvit(
        cls,
        vit: InternVLVisionModel,
        band_names: list[str] | None,
        settings: dict[str, Any],
    ):
        """Create the model with the weights of an InternViT, as modules of this model itself."""
        if band_names is not None:
            spread_bands(vit, band_names)
        fields = vit.config.to_dict()
        for name in ("stage_names", "out_features", "out_indices"):  # the stages of a ViTPBackbone
            fields.pop(name, None)
        fields["model_type"] = cls.config_class.model_type
        fields.update(settings)
        attention = vit.config._attn_implementation  # not part of the fields
        model = cls(cls.config_class.from_dict(fields, attn_implementation=attention))
        model.load_state_dict(vit.state_dict(), strict=False)
        return model

    @classmethod
    def on_other_family(
        cls,
        vit: PreTrainedModel,
        band_names: list[str] | None,
        settings: dict[str, Any],
    ):
        """Create the model with the weights of a ViT that is not an InternViT, as its `vit`."""
        settings = {"drop_path_rate": tower_of(vit.config).drop_path_rate(vit.config), **settings}
        vit_config = other_family_config(vit, band_names, {})
        attention = vit_config._attn_implementation
        model = cls(cls.config_class(vit_config=vit_config, attn_implementation=attention, **settings))
        model.vit.load_state_dict(vit.state_dict())
        return model


def check_no_dtype(kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a dtype is set for a model with new layers, which is created in float32."""
    for option in ("dtype", "torch_dtype"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"from_backbone does not accept {option}={kwargs[option]}: new layers are trained in float32. Convert "
                "the model afterwards with model.to(dtype)."
            )


def other_family_config(
    vit: PreTrainedModel, band_names: list[str] | None, settings: dict[str, Any]
) -> PreTrainedConfig:
    """Return a float32 copy of the configuration of a ViT that is not an InternViT, with other settings.

    A `drop_path_rate` is ignored if the family has no stochastic depth.

    Raises:
        ValueError: if `band_names` are given, which only InternViT takes.
    """
    tower = tower_of(vit.config)
    config = tower.prepare(vit.config)
    config.dtype = torch.float32
    if band_names is not None:
        raise ValueError(f"band_names: only InternViT takes other bands than RGB, not {config.model_type!r}.")
    settings = dict(settings)
    rate = settings.pop("drop_path_rate", None)
    if rate is not None and tower.has_stochastic_depth(config):
        tower.set_drop_path_rate(config, rate)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def open_vit(
    backbone: str | Path | PreTrainedModel,
    drop_path_rate: float | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load a ViT in float32: an exported backbone, a [`ViTPVisionModel`] or a model of another family.

    Of a larger model of transformers, such as a vision-language model or a whole CLIP, only the files with weights of
    its ViT are read, and a line with the license on its card is logged.

    Args:
        backbone: folder or Hub id; or a model, which is returned.
        drop_path_rate: rate of stochastic depth, by default that of the configuration.
        kwargs: arguments of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: if the model is of no known family or has a neck, weights are missing, or the family has no
            stochastic depth.
    """
    if isinstance(backbone, PreTrainedModel):
        if isinstance(backbone, ViTPMultiScaleBackbone):
            raise ValueError(
                f"Expected a ViT, got a {type(backbone).__name__}. Save it with save_pretrained('FOLDER'), and pass "
                "FOLDER."
            )
        tower_of(backbone.config)
        return backbone
    kwargs = {"dtype": torch.float32, **kwargs}
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    config = open_vit_config(backbone, **hub_options)
    tower = tower_of(config)
    if drop_path_rate is not None:
        tower.set_drop_path_rate(config, drop_path_rate)
    if isinstance(config, ViTPVisionConfig):
        model_class = ViTPVisionModel
    else:
        model_class = AutoModel._model_mapping[type(config)]
    with naming(backbone, model_class):
        name = backbone
        if vision_part(read_config_fields(backbone, **hub_options)) is not None:
            name = None
            kwargs["state_dict"] = read_part(backbone, config, **hub_options)
            logger.warning(
                "%s: only its ViT, %s with %d layers, is read. License on its card: %s.",
                backbone,
                config.model_type,
                config.num_hidden_layers,
                stated_license(backbone, **hub_options),
            )
        vit, report = model_class.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            **kwargs,
        )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(tower.unused))
    if missing or report["mismatched_keys"]:
        raise ValueError(f"The weights of {backbone} do not fit its configuration: {missing or report}.")
    tower.freeze_unused(vit)
    return vit


def open_vit_config(backbone: str | Path, **kwargs) -> PreTrainedConfig:
    """Read the configuration of a ViT; of a larger model of transformers that of its ViT.

    Args:
        backbone: folder or Hub id.
        kwargs: arguments of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: if the model is of no known family.
    """
    fields = read_config_fields(backbone, **kwargs)
    model_type = fields.get("model_type")
    if model_type in VISION_MODELS:
        return ViTPVisionConfig.from_pretrained(backbone, **kwargs)
    part = vision_part(fields)
    if part is not None and part.model_type in TOWERS:
        return own_vision_config(part)
    if model_type not in TOWERS or model_type in MULTI_SCALE_CONFIGS:
        kind = repr(model_type) if part is None else f"{model_type!r} with a {part.model_type!r}"
        has_vit = model_type in WITH_INTERNVIT or "backbone_config" in fields
        advice = way_to_vit(backbone, fields) if has_vit else "Describe another family with register_tower."
        raise ValueError(
            f"{backbone} is a {kind}. Expected an exported backbone, or a ViT, also within a larger model, of one of "
            f"these families: {', '.join(other_families())}. {advice}"
        )
    config = CONFIG_MAPPING[model_type].from_dict(fields)
    return TOWERS[model_type].prepare(config)


def pad_to_multiple(pixel_values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pad images with zeros at the bottom and at the right, to multiples of `height` and `width`."""
    missing_height = -pixel_values.shape[-2] % height
    missing_width = -pixel_values.shape[-1] % width
    return F.pad(pixel_values, (0, missing_width, 0, missing_height))


def resize_backbone(
    model: PreTrainedModel, patch_size: int | None = None, image_size: int | None = None
) -> PreTrainedModel:
    """Return a copy of a ViT with its patch and position embeddings interpolated (bicubic, in float32).

    For dense tasks, patches of 14 and images of 448 pixels usually become 16 and 512, which keeps the grid of 32. The
    stored grid is square; the model interpolates it at run time for images of another aspect ratio.

    Args:
        model: ViT of any family, see [`register_tower`], or a backbone with a neck. The copy has its class and dtype.
        patch_size: side of a patch in pixels. Defaults to the model's.
        image_size: side of an image in pixels, a multiple of the patch size. Defaults to the model's.

    Raises:
        ValueError: if a size is not positive, the image size is not a multiple of the patch size, or the stored grid is
            not square.
    """
    config = copy_config(model.config)
    vit_config = getattr(config, "vit_config", None)
    if vit_config is None:
        prefix = ""
        vit_config = config
    else:
        prefix = "vit."
    patch_side = square(vit_config.patch_size if patch_size is None else patch_size, "patch_size")
    image_side = square(vit_config.image_size if image_size is None else image_size, "image_size")
    if image_side % patch_side:
        raise ValueError(f"image_size={image_side} must be a multiple of patch_size={patch_side}.")

    tower = tower_of(vit_config)
    state = model.state_dict()
    resize_weights(state, prefix, vit_config, patch_side, image_side)
    resized_config = tower.resize(vit_config, (image_side, image_side), (patch_side, patch_side))
    with no_init_weights():
        if prefix:
            resized_config = copy_config(config, vit_config=resized_config)
        resized = type(model)(resized_config)
    resized.to(model.device, model.dtype).load_state_dict(state)
    if not prefix and not isinstance(resized, InternVLVisionModel):
        tower.freeze_unused(resized)
    return resized.train(model.training)


def copy_config(config: PreTrainedConfig, **changes) -> PreTrainedConfig:
    """Return a copy of a configuration with other fields, and with its attention, which is not one of the fields."""
    fields = {**config.to_dict(), **changes}
    return type(config).from_dict(fields, attn_implementation=config._attn_implementation)


def resize_weights(
    state: dict[str, torch.Tensor],
    prefix: str,
    config: PreTrainedConfig,
    patch_side: int,
    image_side: int,
) -> None:
    """Replace the patch and position embeddings of a ViT by interpolated ones.

    Args:
        state: weights of the model, which are replaced.
        prefix: prefix of the ViT's weights among them.
        config: configuration of the ViT before resizing.

    Raises:
        ValueError: if the stored grid is not square.
    """
    tower = tower_of(config)
    kernel_name = prefix + tower.patch_kernel
    state[kernel_name] = tower.resample_kernel(state[kernel_name], config, patch_side)
    if tower.positions is None or prefix + tower.positions not in state:
        return
    height, width = patch_grid(config)
    if height != width:
        raise ValueError(
            f"Expected a ViT with a square grid of position embeddings, got {height} x {width} patches "
            f"(image_size={config.image_size}). Choose a ViT for square images."
        )
    positions_name = prefix + tower.positions
    state[positions_name] = resample_positions(state[positions_name], image_side // patch_side)


def square(size: int | list[int] | tuple[int, ...], name: str) -> int:
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or min(sides) < 1:
        raise ValueError(f"{name} must be one positive size, because stored grids and patches are square, got {size}.")
    return sides.pop()


__all__ = ["ViTPBackbone", "ViTPMultiScaleBackbone"]
