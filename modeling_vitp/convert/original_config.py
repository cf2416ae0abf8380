"""Conversion of original configurations to ours and back: InternVL, ViT-Adapter, OpenMMLab's UPerNet and detectors.

InternVL's checkpoints have a configuration, which is converted field by field. The others have none: the shapes of the
tensors show most settings. The rest are the published settings, those of a benchmark (`BENCHMARKS`), or those in a
`config.json` beside the weights: arguments of the original backbone's class, and under `segmentation` or `detector`
fields of our configuration.
"""

import copy
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..configuration_vitp import ViTPConfig, ViTPVisionConfig, label_settings
from ..configuration_vitp_dense import ViTPAdapterConfig, ViTPChangeDetectionConfig, ViTPSegmentationConfig
from ..configuration_vitp_detection import (
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
)
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from .internvl import rope_of_version_4

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
TEMPLATE = "internvl2_5"  # original name of our processor's chat template
# The number of heads is not visible in the tensors; these are InternVL's published ViTs, by their width.
INTERN_VIT_HEADS = {1024: 16, 3200: 25}
NORM_TYPES = ("layer_norm", "rms_norm")
# ours -> theirs
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "attention_dropout": "attention_dropout",
    "drop_path_rate": "drop_path_rate",
    "initializer_range": "initializer_range",
    "layer_scale_init_value": "initializer_factor",
}
REQUIRED_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "norm_type",
    "qkv_bias",
    "qk_normalization",
    "image_size",
    "patch_size",
)
# The only values of the original code that our model supports.
CHAT_SETTINGS = {"ps_version": "v2", "select_layer": -1, "pad2square": False, "use_backbone_lora": 0, "use_llm_lora": 0}


# Reasons for the expected value of a setting.
ONLY_CONVERTIBLE = "the only value that can be converted exactly"
IN_TENSORS = "the value that the tensors have"


class TensorShapes(dict[str, tuple[int, ...]]):
    """Shapes of the tensors of a checkpoint, by their original names."""

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"The tensors are not those of a known model in the original layout: {key!r} is missing.")


def check_values(
    settings: dict[str, Any], expected_values: dict[str, Any], reason: str, owner: str = "config.json"
) -> None:
    """Raise a `ValueError` if a setting is present and differs from its expected value."""
    for name, expected_value in expected_values.items():
        value = settings.get(name, expected_value)
        if value != expected_value:
            raise ValueError(f"{owner} has {name}={value!r}, expected {expected_value!r}, {reason}.")


def check_required(settings: dict[str, Any], names: Iterable[str], owner: str = "config.json") -> None:
    """Raise a `ValueError` if a configuration lacks settings that the tensors do not show."""
    missing_names = [name for name in names if settings.get(name) is None]
    if missing_names:
        model_type = settings.get("model_type")
        raise ValueError(
            f"{owner} (model_type {model_type!r}) lacks {', '.join(missing_names)}, not visible in the tensors. Put "
            "the complete config.json of the model beside its weights."
        )


def vision_from_original(config: dict[str, Any]) -> ViTPVisionConfig:
    """Return InternViT's configuration in our class.

    Raises:
        ValueError: if a field is missing or has a value that our model does not support.
    """
    check_required(config, REQUIRED_VISION_FIELDS, "vision_config")
    convertible_values = {"dropout": 0.0, "hidden_act": "gelu"}
    if config["qk_normalization"]:  # transformers' QK norm has this constant
        convertible_values["layer_norm_eps"] = 1e-6
    check_values(config, convertible_values, ONLY_CONVERTIBLE, "vision_config")
    if config["norm_type"] not in NORM_TYPES:
        raise ValueError(f"Expected norm_type to be one of {NORM_TYPES} in vision_config, got {config['norm_type']!r}.")
    fields = {ours: config[theirs] for ours, theirs in VISION_FIELDS.items() if theirs in config}
    return ViTPVisionConfig(**fields, image_size=config["image_size"], patch_size=config["patch_size"])


def vision_from_tensors(shapes: TensorShapes) -> ViTPVisionConfig:
    """Return InternViT's configuration from the shapes of its tensors, for a file without a configuration."""
    visible = visible_vit_settings(shapes, "encoder.")
    width = visible["hidden_size"]
    if width not in INTERN_VIT_HEADS:
        raise ValueError(
            f"The number of heads of a ViT of width {width} is not visible in its tensors, and config.json is missing. "
            "Put a config.json with vision_config beside them."
        )
    return ViTPVisionConfig(**visible, num_attention_heads=INTERN_VIT_HEADS[width])


def visible_vit_settings(shapes: TensorShapes, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a ViT that its tensors show; `prefix` is the prefix of its layers' original names."""
    width, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
    grid = math.isqrt(shapes["embeddings.position_embedding"][1] - 1)
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_values(rf"{re.escape(prefix)}layers\.(\d+)\.", shapes),
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "attention_bias": f"{prefix}layers.0.attn.qkv.bias" in shapes,
        "use_qk_norm": f"{prefix}layers.0.attn.q_norm.weight" in shapes,
        "norm_type": "layer_norm" if f"{prefix}layers.0.norm1.bias" in shapes else "rms_norm",
    }


def vision_to_original(config: ViTPVisionConfig) -> dict[str, Any]:
    """Return our ViT's configuration as InternViT's; see [`vision_from_original`] for the errors."""
    settings = config.to_dict()
    image_size = settings["image_size"][0]
    patch_size = settings["patch_size"][0]
    convertible_values = {
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "hidden_dropout_prob": 0,
        "projection_dropout": 0,
        "hidden_act": "gelu",
        "image_size": [image_size, image_size],
        "patch_size": [patch_size, patch_size],
    }
    if config.use_qk_norm:  # the original QK norm has this constant
        convertible_values["layer_norm_eps"] = 1e-6
    check_values(settings, convertible_values, ONLY_CONVERTIBLE, "vision_config")
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **{theirs: settings[ours] for ours, theirs in VISION_FIELDS.items()},
        "image_size": image_size,
        "patch_size": patch_size,
        "dropout": 0.0,
        "use_flash_attn": False,
    }


def chat_from_original(config: dict[str, Any]) -> ViTPConfig:
    """Return InternVL's configuration in our class. The image token, which it lacks, keeps the default.

    Raises:
        ValueError: if a field is missing or has a value that our model does not support.
    """
    check_required(config, ("vision_config", "llm_config"))
    vision_config = config["vision_config"]
    settings = {"ps_version": "v1", "use_thumbnail": False, **config}  # with the defaults of the original code
    convertible_values = {**CHAT_SETTINGS, "template": TEMPLATE}
    if settings.get("dynamic_image_size"):
        convertible_values["use_thumbnail"] = True
    check_values(settings, convertible_values, ONLY_CONVERTIBLE)
    if settings.get("force_image_size") is not None:
        expected_size = {"force_image_size": vision_config.get("image_size")}
        check_values(settings, expected_size, "the size of the position embeddings")
    return ViTPConfig(
        vision_config=vision_from_original(vision_config),
        text_config=text_from_original(config["llm_config"]),
        downsample_ratio=config.get("downsample_ratio", 0.5),
    )


def chat_to_original(config: ViTPConfig, min_patches: int, max_patches: int) -> dict[str, Any]:
    """Return our configuration as InternVL's own; see [`chat_from_original`] for the errors."""
    convertible_values = {
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    check_values(config.to_dict(), convertible_values, ONLY_CONVERTIBLE)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        **CHAT_SETTINGS,
        "downsample_ratio": config.downsample_ratio,
        "template": TEMPLATE,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": min_patches,
        "max_dynamic_patch": max_patches,
        "force_image_size": config.vision_config.image_size[0],
        "hidden_size": config.text_config.hidden_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": vision_to_original(config.vision_config),
        "llm_config": {**text_to_original(config.text_config), "tie_word_embeddings": config.tie_word_embeddings},
    }


def text_from_original(config: dict[str, Any]) -> PreTrainedConfig:
    """Return the language model's configuration, without the fields that older transformers wrote for every model."""
    check_language_model_type(config.get("model_type"))
    config_class = type(AutoConfig.for_model(config["model_type"]))
    own_fields = config_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    own_fields |= {"rope_theta", "rope_scaling"}
    fields = {"tie_word_embeddings": False}
    for name, value in config.items():
        if name in own_fields:
            fields[name] = copy.deepcopy(value)
    return config_class(**fields)


def text_to_original(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the language model's configuration as transformers wrote it before version 5."""
    check_language_model_type(config.model_type)
    fields = config.to_dict()
    for name in ("transformers_version", "dtype"):
        fields.pop(name, None)
    rope = rope_of_version_4(fields.pop("rope_parameters"))
    return {**fields, **rope, "architectures": [LANGUAGE_MODELS[config.model_type]]}


def check_language_model_type(model_type: str | None) -> None:
    if model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"Expected a language model of type {', '.join(LANGUAGE_MODELS)}, which both the original code and "
            f"transformers have, got {model_type!r}."
        )


# ours -> theirs, fields that the tensors do not show
ADAPTER_HIDDEN_FIELDS = {
    "num_attention_heads": "num_heads",
    "interaction_layers": "interaction_indexes",
    "deformable_points": "n_points",
    "injector_init_value": "init_values",
    "add_vit_features": "add_vit_feature",
    "drop_path_rate": "drop_path_rate",
    "deformable_dropout": "deformable_dropout",  # a constant in their code
}
# ours -> theirs, fields that the tensors show
ADAPTER_VISIBLE_FIELDS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
    "image_size": "img_size",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "norm_type": "norm_type",
    "deformable_ratio": "deform_ratio",
    "feed_forward_ratio": "cffn_ratio",
    "spatial_prior_channels": "conv_inplane",
}
HIDDEN_OF_SEGMENTATION = (
    "id2label",
    "loss_ignore_index",
    "class_weights",
    "auxiliary_loss_weight",
    "classifier_dropout",
    "pool_scales",
)
DEPTH_OF_DEFAULT_INTERACTIONS = 24
# Deformable attention of the original code: its own, or mmcv's if its own is not compiled.
DEFORMABLE_ATTENTION = {
    "native": {"extractor_residual": "tokens", "deformable_dropout": 0.0},
    "mmcv": {"extractor_residual": "normed_tokens", "deformable_dropout": 0.1},
}


def adapter_from_original(settings: dict[str, Any], shapes: TensorShapes) -> ViTPAdapterConfig:
    """Return the configuration of a ViT-Adapter.

    Args:
        settings: arguments of the original class, may be empty.
        shapes: shapes of the tensors by their original names, with or without the prefix of a backbone.

    Raises:
        ValueError: if the settings contradict the tensors, or lack a value that neither the tensors show nor the
            published models share.
    """
    shapes = TensorShapes((key.removeprefix("backbone."), shape) for key, shape in shapes.items())
    visible = visible_vit_settings(shapes)
    width = visible["hidden_size"]
    visible |= {
        "deformable_ratio": shapes["interactions.0.injector.attn.value_proj.weight"][0] / width,
        "feed_forward_ratio": shapes["interactions.0.extractor.ffn.fc1.weight"][0] / width,
        "spatial_prior_channels": shapes["spm.stem.0.weight"][0],
    }
    samples = shapes["interactions.0.extractor.attn.attention_weights.weight"][0]  # heads times points
    attention = recognize_deformable_attention(settings, visible["deformable_ratio"])
    visible_of_original = {theirs: visible[ours] for ours, theirs in ADAPTER_VISIBLE_FIELDS.items()}
    if attention == "mmcv":
        visible_of_original.pop("deform_ratio")  # mmcv ignores it
    check_values(settings, visible_of_original, IN_TENSORS)
    check_values(settings, {"use_final_norm": True}, ONLY_CONVERTIBLE)
    required_names = []
    if visible["num_hidden_layers"] != DEPTH_OF_DEFAULT_INTERACTIONS:
        required_names.append("interaction_indexes")
    if width not in INTERN_VIT_HEADS:
        required_names.append("num_heads")
    check_required(settings, required_names)
    hidden = {"num_attention_heads": INTERN_VIT_HEADS.get(width)}
    hidden |= DEFORMABLE_ATTENTION[attention]
    for ours, theirs in ADAPTER_HIDDEN_FIELDS.items():
        if theirs in settings:
            hidden[ours] = settings[theirs]
    return ViTPAdapterConfig(
        **visible,
        **hidden,
        deformable_heads=samples // settings.get("n_points", ViTPAdapterConfig.deformable_points),
        extra_extractors=count_values(r"interactions\.3\.extra_extractors\.(\d+)\.", shapes),
        spatial_prior_norm="batch_norm" if "spm.stem.1.running_mean" in shapes else "layer_norm",
    )


def recognize_deformable_attention(settings: dict[str, Any], ratio: float) -> str:
    """Return the deformable attention that the weights were trained with, `"native"` or `"mmcv"`.

    mmcv's attention ignores the width in the settings and always has values of full width. Narrow values are therefore
    native, and full ones are mmcv's if the settings have a narrow width. Otherwise both are possible: unless the
    settings have `deformable_attention`, one is assumed and a warning is logged.

    Args:
        settings: see [`adapter_from_original`].
        ratio: width of the values relative to the tokens, from the tensors.

    Raises:
        ValueError: if `deformable_attention` is unknown or contradicts the tensors.
    """
    stated_attention = settings.get("deformable_attention")
    stated_ratio = settings.get("deform_ratio")
    choices = [*DEFORMABLE_ATTENTION] if ratio == 1 else ["native"]
    if stated_attention not in (None, *choices):
        raise ValueError(
            f"Expected deformable_attention to be {' or '.join(map(repr, choices))} for tensors whose values have "
            f"{ratio:g} of the full width, got {stated_attention!r}."
        )
    if stated_attention is not None:
        return stated_attention
    if ratio != 1:
        return "native"
    if stated_ratio in (None, 1):
        assumed_attention = "mmcv" if stated_ratio is None else "native"
        logger.warning(
            "The deformable attention has values of full width: the tensors do not show whether it is ViT-Adapter's "
            "own ('native') or mmcv's ('mmcv'), which compute different maps. %r is assumed, because %s. Set "
            "deformable_attention, or put it in a config.json beside the weights, if you know it.",
            assumed_attention,
            "the settings have no width" if stated_ratio is None else "deform_ratio is 1 in config.json",
        )
        return assumed_attention
    return "mmcv"


def adapter_to_original(config: ViTPAdapterConfig) -> dict[str, Any]:
    """Return the arguments of the original class.

    Raises:
        ValueError: for settings that [`vision_to_original`] refuses, and for mmcv's residual with values narrower than
            the tokens.
    """
    vision_to_original(config)
    settings = config.to_dict()
    attention = "native"
    if config.extractor_residual == DEFORMABLE_ATTENTION["mmcv"]["extractor_residual"]:
        attention = "mmcv"
        reason = f"the only one of the original code with extractor_residual={config.extractor_residual!r}"
        check_values(settings, {"deformable_ratio": 1}, reason)
    arguments = {}
    for fields in (ADAPTER_HIDDEN_FIELDS, ADAPTER_VISIBLE_FIELDS):
        for ours, theirs in fields.items():
            arguments[theirs] = settings[ours]
    arguments["deformable_attention"] = attention
    arguments["patch_size"] = settings["patch_size"][0]
    arguments["img_size"] = settings["image_size"][0]
    arguments["mlp_ratio"] = config.intermediate_size / config.hidden_size
    arguments["deform_num_heads"] = config.deformable_heads
    arguments["use_final_norm"] = True
    return arguments


def segmentation_from_original(
    settings: dict[str, Any], shapes: TensorShapes
) -> ViTPSegmentationConfig | ViTPChangeDetectionConfig:
    """Return the configuration of OpenMMLab's UPerNet on ViT-Adapter.

    A head on the maps of two images makes it a change detection model.

    Args:
        settings: arguments of the original backbone's class, and `segmentation`; may be empty.
        shapes: shapes of the tensors by their original names.

    Raises:
        ValueError: see [`adapter_from_original`]; also if the head differs from ours.
    """
    adapter = adapter_from_original(settings, shapes)
    num_labels, channels, _, _ = shapes["decode_head.conv_seg.weight"]
    in_channels = shapes["decode_head.lateral_convs.0.conv.weight"][1]
    config_classes = {adapter.hidden_size: ViTPSegmentationConfig, 2 * adapter.hidden_size: ViTPChangeDetectionConfig}
    if num_labels == 1 or in_channels not in config_classes:
        raise ValueError(
            f"Expected a decode head of at least two classes on the maps of one image ({adapter.hidden_size} channels) "
            f"or of two, got one of {num_labels} classes on {in_channels} channels."
        )
    auxiliary = {}
    if "auxiliary_head.conv_seg.weight" in shapes:
        auxiliary = {
            "auxiliary_channels": shapes["auxiliary_head.conv_seg.weight"][1],
            "auxiliary_num_convs": count_values(r"auxiliary_head\.convs\.(\d+)\.", shapes),
            "auxiliary_concat_input": "auxiliary_head.conv_cat.conv.weight" in shapes,
        }
    head_settings = with_labels(settings.get("segmentation", {}), num_labels)
    return config_classes[in_channels](
        backbone_config=adapter,
        hidden_size=channels,
        use_auxiliary_head=bool(auxiliary),
        **auxiliary,
        **head_settings,
    )


def segmentation_to_original(config: ViTPSegmentationConfig) -> dict[str, Any]:
    """Return the arguments of the original backbone's class, and under `segmentation` the settings of the head.

    The latter are those of our settings that the tensors do not show.

    Raises:
        ValueError: for settings that [`adapter_to_original`] refuses, and for other heads than UPerNet.
    """
    check_values(config.to_dict(), {"decode_head": "upernet"}, ONLY_CONVERTIBLE)
    arguments = adapter_to_original(config.backbone_config)
    arguments["segmentation"] = {name: getattr(config, name) for name in HIDDEN_OF_SEGMENTATION}
    return arguments


def with_labels(settings: dict[str, Any], num_labels: int) -> dict[str, Any]:
    """Return the settings of a head with the names of its classes, or only their number if they have no names."""
    if "id2label" not in settings:
        return {**settings, "num_labels": num_labels}
    names = settings["id2label"]
    if len(names) != num_labels:
        raise ValueError(f"config.json names {len(names)} classes, but the head has {num_labels}.")
    return {**settings, **label_settings(names)}


def count_values(pattern: str, shapes: TensorShapes) -> int:
    """Return the number of distinct values of the pattern's group in the names."""
    distinct_values = set()
    for key in shapes:
        match = re.match(pattern, key)
        if match is not None:
            distinct_values.add(match[1])
    return len(distinct_values)


# Classes of the published detectors in the order of their heads, as in the authors' code. For detectors trained on COCO
# JSON files, that code uses the order of the categories in the file, which is not published: such an order has to be
# confirmed by scoring the detector class by class on labeled images.
DIOR = (
    "airplane airport baseballfield basketballcourt bridge chimney dam Expressway-Service-area Expressway-toll-station "
    "golffield groundtrackfield harbor overpass ship stadium storagetank tenniscourt trainstation vehicle windmill"
)
DIOR_R = (
    "airplane airport baseballfield basketballcourt bridge chimney expressway-service-area expressway-toll-station dam "
    "golffield groundtrackfield harbor overpass ship stadium storagetank tenniscourt trainstation vehicle windmill"
)
DOTA = (
    "plane baseball-diamond bridge ground-track-field small-vehicle large-vehicle ship tennis-court basketball-court "
    "storage-tank soccer-ball-field roundabout harbor swimming-pool helicopter container-crane airport helipad"
)
SAR = "ship aircraft car tank bridge harbor"
# SSDD's class in a head for the 80 classes of COCO, whose softmax cannot be reduced exactly.
SSDD = " ".join(["ship", *(f"unused-{index}" for index in range(1, 80))])


@dataclass(frozen=True)
class Benchmark:
    """Settings of a published detector.

    Args:
        config_class: configuration class of the detector.
        names: names of the classes, in the order of the head.
        resize: `"stretch"` or `"fit"` (with padding) images to the detector's size; `None` keeps their size.
        order_is_certain: whether the order of the names is independent of unpublished files.
        settings: settings that differ from the configuration's defaults.
    """

    config_class: type[ViTPObjectDetectionConfig]
    names: list[str]
    resize: str | None
    order_is_certain: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


BENCHMARKS = {
    "dior": Benchmark(ViTPObjectDetectionConfig, DIOR.split(), "stretch", order_is_certain=False),
    "dior_r": Benchmark(ViTPOrientedObjectDetectionConfig, DIOR_R.split(), "fit"),
    "dota_v2": Benchmark(ViTPOrientedObjectDetectionConfig, DOTA.split(), None),
    "sardet_100k": Benchmark(ViTPObjectDetectionConfig, SAR.split(), "stretch", order_is_certain=False),
    "rsar": Benchmark(ViTPOrientedObjectDetectionConfig, SAR.split(), "fit"),
    "ssdd": Benchmark(ViTPInstanceSegmentationConfig, SSDD.split(), "stretch", settings={"flip_test": True}),
}


# Configuration by the number of deltas of the region proposal network at each position, for three anchors.
KINDS = {12: ViTPObjectDetectionConfig, 18: ViTPOrientedObjectDetectionConfig}
PER_STAGE = ("stage_iou_thresholds", "stage_loss_weights", "stage_box_stds")


def detection_from_original(
    settings: dict[str, Any], shapes: TensorShapes, benchmark: str | None = None
) -> ViTPObjectDetectionConfig:
    """Return the configuration of a two-stage detector of OpenMMLab's on ViT-Adapter.

    Args:
        settings: arguments of the original backbone's class, and `detector`; may be empty.
        shapes: shapes of the tensors by their original names.
        benchmark: key of `BENCHMARKS`.

    Raises:
        ValueError: see [`adapter_from_original`]; also if the detector is not supported or not the benchmark's.
    """
    adapter = adapter_from_original(settings, shapes)
    config_class = recognize_detector(shapes)
    stages = count_values(r"roi_head\.bbox_head\.(\d)\.", shapes)
    head = "roi_head.bbox_head.0" if stages else "roi_head.bbox_head"
    num_labels = shapes[f"{head}.fc_cls.weight"][0] - 1  # without the background
    num_box_deltas = shapes[f"{head}.fc_reg.weight"][0]
    visible = {
        "neck_channels": shapes["neck.lateral_convs.0.conv.weight"][0],
        "neck_top_down": "neck.lateral_convs.0.conv.bias" in shapes,
        "head_hidden_size": shapes[f"{head}.shared_fcs.0.weight"][0],
        "class_agnostic_boxes": num_box_deltas == config_class.num_box_values,
    }
    head_settings = settings.get("detector", {})
    check_values(head_settings, visible, IN_TENSORS)
    if benchmark is not None:
        head_settings = {**head_settings, **benchmark_settings(benchmark, config_class, num_labels)}
    elif "detector" not in settings:
        logger.warning(
            "Settings that are not visible in the tensors (thresholds, overlaps, class names) are assumed to be those "
            "of the published %s. Set the benchmark if the detector is one of %s.",
            config_class.model_type,
            ", ".join(BENCHMARKS),
        )
    fields = stage_settings(config_class, max(stages, 1))
    fields |= with_labels(head_settings, num_labels)
    fields |= visible
    return config_class(backbone_config=adapter, **fields)


def recognize_detector(shapes: TensorShapes) -> type[ViTPObjectDetectionConfig]:
    """Return the configuration class of a detector, by the deltas of its proposals and its mask head."""
    num_proposal_deltas = shapes["rpn_head.rpn_reg.weight"][0]
    if num_proposal_deltas not in KINDS:
        raise ValueError(
            f"Expected 12 values of rpn_reg (18 for oriented boxes) at each position, got {num_proposal_deltas}."
        )
    if "roi_head.mask_head.upsample.weight" in shapes:
        return ViTPInstanceSegmentationConfig
    return KINDS[num_proposal_deltas]


def stage_settings(config_class: type[ViTPObjectDetectionConfig], stages: int) -> dict[str, Any]:
    """Return the settings of each stage, for one stage or for the published number of stages."""
    published_stages = len(config_class.stage_iou_thresholds)
    if stages not in (1, published_stages):
        raise ValueError(
            f"Expected 1 or {published_stages} stages, got {stages}. The IoU thresholds of other detectors are not "
            "visible in the tensors."
        )
    settings = {}
    for name in PER_STAGE:
        published_values = getattr(config_class, name)
        settings[name] = list(published_values[:stages])
    return settings


def benchmark_settings(benchmark: str, config_class: type[ViTPObjectDetectionConfig], labels: int) -> dict[str, Any]:
    published = BENCHMARKS[benchmark]
    if published.config_class is not config_class or len(published.names) != labels:
        raise ValueError(
            f"Expected a {published.config_class.model_type} with {len(published.names)} classes for the benchmark "
            f"{benchmark}, got a {config_class.model_type} with {labels}."
        )
    if not published.order_is_certain:
        logger.warning(
            "The class names of %s have the order of the authors' code, which depends on an unpublished annotation "
            "file. Score the detector class by class before relying on the names.",
            benchmark,
        )
    return {**published.settings, "id2label": dict(enumerate(published.names))}


def detection_to_original(config: ViTPObjectDetectionConfig) -> dict[str, Any]:
    """Return the arguments of the original backbone's class, and under `detector` the fields of our configuration.

    Raises:
        ValueError: for settings that [`adapter_to_original`] refuses.
    """
    settings = {}
    for name, value in config.to_dict().items():
        if name in ViTPObjectDetectionConfig.__annotations__ and name != "backbone_config":
            settings[name] = value
    settings["id2label"] = config.id2label
    arguments = adapter_to_original(config.backbone_config)
    arguments["detector"] = settings
    return arguments


def detection_image_processor(
    config: ViTPObjectDetectionConfig, benchmark: str | None = None
) -> ViTPDetectionImageProcessor:
    """Return the image processor of a detector.

    It resizes images to the detector's size: stretched, or with padding for oriented boxes, which stretching distorts.
    """
    height, width = config.backbone_config.image_size
    resize = "fit" if isinstance(config, ViTPOrientedObjectDetectionConfig) else "stretch"
    if benchmark is not None:
        resize = BENCHMARKS[benchmark].resize
    size = {"height": height, "width": width}
    if resize == "stretch":
        return ViTPDetectionImageProcessor(do_resize=True, size=size)
    if resize == "fit":
        fitted = {"max_height": height, "max_width": width}
        return ViTPDetectionImageProcessor(do_resize=True, size=fitted, pad_size=size)
    return ViTPDetectionImageProcessor(pad_size=size)
