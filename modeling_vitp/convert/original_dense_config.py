"""ViT-Adapter and UPerNet as their original code is configured, and ours.

Such checkpoints come without a configuration: most of it can be seen from the shapes of the tensors, and for the rest
the published settings are taken, unless a `config.json` with arguments of the original class lies beside them.
"""

import logging
import math
import re
from typing import Any

from ..configuration_vitp_dense import ViTPAdapterConfig, ViTPChangeDetectionConfig, ViTPSegmentationConfig
from .original_config import INTERN_VIT_HEADS, refuse_differences, vision_to_original

logger = logging.getLogger(__name__)

# ours -> theirs, of what the tensors do not show
HIDDEN_FIELDS = {
    "num_attention_heads": "num_heads",
    "interaction_layers": "interaction_indexes",
    "deformable_points": "n_points",
    "injector_init_value": "init_values",
    "add_vit_features": "add_vit_feature",
    "drop_path_rate": "drop_path_rate",
    "deformable_dropout": "deformable_dropout",  # which their code fixes
}
# ours -> theirs, of what they do
VISIBLE_FIELDS = {
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
HIDDEN_OF_SEGMENTATION = ("id2label", "loss_ignore_index", "class_weights", "auxiliary_loss_weight")
DEPTH_OF_DEFAULT_INTERACTIONS = 24
# The deformable attention that their code ran on: its own, or mmcv's where that was not compiled.
DEFORMABLE_ATTENTION = {
    "native": {"extractor_residual": "tokens", "deformable_dropout": 0.0},
    "mmcv": {"extractor_residual": "normed_tokens", "deformable_dropout": 0.1},
}


def adapter_from_original(settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ViTPAdapterConfig:
    """
    Args:
        settings: arguments of the original class, or nothing.
        shapes: of the tensors, under the names of the original code without a prefix.

    Raises:
        ValueError: if the settings contradict the tensors, or do not say what the tensors do not show and the published
            models do not have in common.
    """
    try:
        width, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
        grid = math.isqrt(shapes["embeddings.position_embedding"][1] - 1)
        intermediate_size = shapes["layers.0.mlp.fc1.weight"][0]
        shown = {
            "hidden_size": width,
            "num_hidden_layers": count(r"layers\.(\d+)\.", shapes),
            "patch_size": patch_size,
            "image_size": grid * patch_size,
            "attention_bias": "layers.0.attn.qkv.bias" in shapes,
            "use_qk_norm": "layers.0.attn.q_norm.weight" in shapes,
            "norm_type": "layer_norm" if "layers.0.norm1.bias" in shapes else "rms_norm",
            "deformable_ratio": shapes["interactions.0.injector.attn.value_proj.weight"][0] / width,
            "feed_forward_ratio": shapes["interactions.0.extractor.ffn.fc1.weight"][0] / width,
            "spatial_prior_channels": shapes["spm.stem.0.weight"][0],
        }
        samples = shapes["interactions.0.extractor.attn.attention_weights.weight"][0]  # heads times points
    except KeyError as error:
        raise ValueError(f"The backbone is not ViT-Adapter on an InternViT: it has no {error}.") from error
    attention = recognize_deformable_attention(settings, shown["deformable_ratio"])
    for ours, theirs in VISIBLE_FIELDS.items():
        if theirs == "deform_ratio" and attention == "mmcv":
            continue  # which is not told
        if settings.get(theirs, shown[ours]) != shown[ours]:
            raise ValueError(f"config.json has {theirs}={settings[theirs]}, but the tensors have {shown[ours]}.")
    refuse_differences(settings, {"use_final_norm": (True, True)}, "config.json")
    if shown["num_hidden_layers"] != DEPTH_OF_DEFAULT_INTERACTIONS and "interaction_indexes" not in settings:
        raise ValueError("Between which layers the adapter interacts cannot be seen from the tensors: " + ASK)
    if width not in INTERN_VIT_HEADS and "num_heads" not in settings:
        raise ValueError(f"The number of heads of a ViT of width {width} cannot be seen from the tensors: " + ASK)
    hidden = {"num_attention_heads": INTERN_VIT_HEADS.get(width)}
    hidden |= DEFORMABLE_ATTENTION[attention]
    hidden |= {ours: settings[theirs] for ours, theirs in HIDDEN_FIELDS.items() if theirs in settings}
    return ViTPAdapterConfig(
        **shown,
        **hidden,
        intermediate_size=intermediate_size,
        deformable_heads=samples // settings.get("n_points", ViTPAdapterConfig.deformable_points),
        extra_extractors=count(r"interactions\.3\.extra_extractors\.(\d+)\.", shapes),
        spatial_prior_norm="batch_norm" if "spm.stem.1.running_mean" in shapes else "layer_norm",
    )


def recognize_deformable_attention(settings: dict[str, Any], ratio: float) -> str:
    """Which attention weights were trained with, `"native"` or `"mmcv"`.

    mmcv's is not told the width of the values that is asked for and has the full one. So narrow values are native, and
    full ones mmcv's where the settings ask for narrow ones. Where they ask for full ones or are not there, both
    can be, which is warned of, unless they have `deformable_attention`.

    Args:
        settings: see [`adapter_from_original`].
        ratio: of the values' width to that of the tokens, from the tensors.

    Raises:
        ValueError: if `deformable_attention` is none of the two, or contradicts the tensors.
    """
    given, asked = settings.get("deformable_attention"), settings.get("deform_ratio")
    if given not in (None, *DEFORMABLE_ATTENTION):
        raise ValueError(f"deformable_attention={given!r} is neither {' nor '.join(map(repr, DEFORMABLE_ATTENTION))}.")
    if ratio != 1:
        if given == "mmcv":
            raise ValueError(
                f"deformable_attention='mmcv', but the values of the tensors have {ratio:g} of the full width, which "
                "only the native attention has."
            )
        return "native"
    if given is None and asked in (None, 1):
        taken = "mmcv" if asked is None else "native"
        logger.warning(
            "The deformable attention has values of full width: whether it was ViT-Adapter's own ('native') or mmcv's "
            "('mmcv'), which compute different maps, cannot be seen from the tensors. It is taken for %r, since %s. "
            "Give deformable_attention, or put it in a config.json beside the weights, if you know.",
            taken,
            "no setting asks for that width" if asked is None else "deform_ratio is 1 in config.json",
        )
        return taken
    return given or "mmcv"


def with_deformable_attention(source: str, layout: str, fields: dict, given: str) -> dict:
    """The settings of a ViT-Adapter of the original naming, with what the caller says of its attention."""
    if not layout.startswith(("original_adapter", "original_segmentation", "original_detection", "original_cascade")):
        raise ValueError(f"{source} is no ViT-Adapter of the original naming: deformable_attention says nothing of it.")
    said = fields.get("deformable_attention", given)
    if said != given:
        raise ValueError(f"{source} has deformable_attention={said!r} in its config.json, and not {given!r}.")
    return {**fields, "deformable_attention": given}


ASK = "put a config.json beside them with num_heads and interaction_indexes, as the original class takes them."


def adapter_to_original(config: ViTPAdapterConfig) -> dict[str, Any]:
    """The arguments of the original class.

    What is refused: see [`~modeling_vitp.convert.original_config.vision_to_original`], and mmcv's residual with values
    that are not of the full width.
    """
    vision_to_original(config)
    settings = config.to_dict()
    attention = next(
        name for name, ours in DEFORMABLE_ATTENTION.items() if ours["extractor_residual"] == config.extractor_residual
    )
    if attention == "mmcv" and config.deformable_ratio != 1:
        raise ValueError(
            f"The adapter has extractor_residual={config.extractor_residual!r} and "
            f"deformable_ratio={config.deformable_ratio}, but the original code has that residual with 1 only."
        )
    named = {theirs: settings[ours] for ours, theirs in (HIDDEN_FIELDS | VISIBLE_FIELDS).items()}
    return named | {
        "deformable_attention": attention,
        "patch_size": settings["patch_size"][0],
        "img_size": settings["image_size"][0],
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "deform_num_heads": config.deformable_heads,
        "use_final_norm": True,
    }


def segmentation_from_original(
    settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> ViTPSegmentationConfig | ViTPChangeDetectionConfig:
    """OpenMMLab's UPerNet on ViT-Adapter; a head that reads two images' maps makes it a change detector.

    Args:
        settings: arguments of the original backbone's class, and `segmentation`; or nothing.
        shapes: of the tensors, under the names of the original code.

    Raises:
        ValueError: as [`adapter_from_original`], and if the head is not like ours.
    """
    prefix = "backbone."
    adapter = adapter_from_original(
        settings, {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    )
    try:
        num_labels, channels, _, _ = shapes["decode_head.conv_seg.weight"]
        in_channels = shapes["decode_head.lateral_convs.0.conv.weight"][1]
    except KeyError as error:
        raise ValueError(f"The decode head is not OpenMMLab's UPerNet: it has no {error}.") from error
    config_classes = {adapter.hidden_size: ViTPSegmentationConfig, 2 * adapter.hidden_size: ViTPChangeDetectionConfig}
    if num_labels == 1 or in_channels not in config_classes:
        raise ValueError(
            f"The decode head makes {num_labels} maps of {in_channels} channels, but at least two classes, of the maps "
            f"of one image ({adapter.hidden_size} channels) or of two, are expected."
        )
    auxiliary = {}
    if "auxiliary_head.conv_seg.weight" in shapes:
        auxiliary = {
            "auxiliary_channels": shapes["auxiliary_head.conv_seg.weight"][1],
            "auxiliary_num_convs": count(r"auxiliary_head\.convs\.(\d+)\.", shapes),
            "auxiliary_concat_input": "auxiliary_head.conv_cat.conv.weight" in shapes,
        }
    said = dict(settings.get("segmentation", {}))
    names = ordered_names(said.pop("id2label", dict(enumerate(range(num_labels)))))
    if len(names) != num_labels:
        raise ValueError(f"config.json names {len(names)} classes, but the head has {num_labels}.")
    labels = named(names) if "segmentation" in settings else {"num_labels": num_labels}
    return config_classes[in_channels](
        backbone_config=adapter,
        hidden_size=channels,
        use_auxiliary_head=bool(auxiliary),
        **labels,
        **auxiliary,
        **said,
    )


def segmentation_to_original(config: ViTPSegmentationConfig) -> dict[str, Any]:
    """The arguments of the original backbone's class, and `segmentation`: what the tensors do not show of the rest,
    under our own names.

    What is refused: see [`adapter_to_original`].
    """
    settings = {name: getattr(config, name) for name in HIDDEN_OF_SEGMENTATION}
    return adapter_to_original(config.backbone_config) | {"segmentation": settings}


def ordered_names(id2label: dict) -> list[str]:
    """The names of the classes by their indices, which JSON has as text."""
    return [name for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]


def named(names: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def count(pattern: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """How many different numbers the names have where the pattern says."""
    return len({match[1] for match in (re.match(pattern, key) for key in shapes) if match})
