"""Names of the tensors in each layout of checkpoints.

The names of this package (`vitp`, and `segmentation` and `detection` for dense models) are the reference: every other
layout is a function of them, so that the complete set of a file's keys follows from its configuration.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")

TARGETS = ("vitp", "backbone", "internvl", "original", "adapter", "segmentation", "detection")
BENCHMARK_NAMES = ("dior", "dior_r", "dota_v2", "sardet_100k", "rsar", "ssdd")  # keys of `original_config.BENCHMARKS`

VISION_TOWER = "model.vision_tower."
BACKBONE = "backbone."

# transformers saves `internvl` under the names in existing Hub repos, which differ from those in memory.
INTERNVL = [
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.", ""),
]
# InternVL's own code, with a fused `qkv`, `layers` and a projector with numbered layers.
ORIGINAL_VISION = [
    (r"^model\.vision_tower\.", "vision_model."),
    (r"^(vision_model\.)embeddings\.cls_token$", r"\1embeddings.class_embedding"),
    (r"^(vision_model\.)embeddings\.position_embeddings$", r"\1embeddings.position_embedding"),
    (r"^(vision_model\.)embeddings\.patch_embeddings\.projection\.", r"\1embeddings.patch_embedding."),
    (r"^(vision_model\.)encoder\.layer\.", r"\1encoder.layers."),
    (r"^(vision_model\..*\.)attention\.[qkv]_proj\.", r"\1attn.qkv."),
    (r"^(vision_model\..*\.)attention\.projection_layer\.", r"\1attn.proj."),
    (r"^(vision_model\..*\.)attention\.([qk])_norm\.", r"\1attn.\2_norm."),
    (r"^(vision_model\..*\.)layernorm_before\.", r"\1norm1."),
    (r"^(vision_model\..*\.)layernorm_after\.", r"\1norm2."),
    (r"^(vision_model\..*\.)lambda_([12])$", r"\1ls\2"),
]
# timm's `VisionTransformer`, with a fused `qkv` too.
TIMM = [
    *ORIGINAL_VISION,
    (r"^vision_model\.(embeddings\.|encoder\.)?", ""),
    (r"^class_embedding$", "cls_token"),
    (r"^position_embedding$", "pos_embed"),
    (r"^patch_embedding\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"(\.ls[12])$", r"\1.gamma"),
]
ORIGINAL = [
    *ORIGINAL_VISION,
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
]
# ViT-Adapter's own code, and OpenMMLab's UPerNet on top of it; the ViT in it has InternVL's names.
ORIGINAL_SEGMENTATION = [
    (r"^backbone\.(embeddings|encoder)\.", r"vision_model.\1."),
    *ORIGINAL_VISION,
    (r"^vision_model\.encoder\.", "backbone."),
    (r"^vision_model\.", "backbone."),
    (r"^backbone\.spatial_prior\.stages\.(\d)\.", lambda match: f"backbone.spm.conv{int(match[1]) + 2}."),
    (r"^backbone\.spatial_prior\.projections\.(\d)\.", lambda match: f"backbone.spm.fc{int(match[1]) + 1}."),
    (r"^backbone\.spatial_prior\.", "backbone.spm."),
    (r"^(backbone\.interactions\..*)\.extractors\.0\.", r"\1.extractor."),
    (r"^(backbone\.interactions\..*)\.extractors\.(\d+)\.", lambda m: f"{m[1]}.extra_extractors.{int(m[2]) - 1}."),
    (r"^(backbone\.interactions\..*)\.attention\.", r"\1.attn."),
    (r"^(backbone\.interactions\..*)\.feature_norm\.", r"\1.feat_norm."),
    (r"^(backbone\.interactions\..*)\.feed_forward_norm\.", r"\1.ffn_norm."),
    (r"^(backbone\.interactions\..*)\.feed_forward\.depthwise\.", r"\1.ffn.dwconv.dwconv."),
    (r"^(backbone\.interactions\..*)\.feed_forward\.", r"\1.ffn."),
    (r"^(backbone\.interactions\..*)\.gate$", r"\1.gamma"),
    (r"^backbone\.level_embeddings$", "backbone.level_embed"),
    (r"^backbone\.upsample\.", "backbone.up."),
    (r"^backbone\.norms\.(\d)\.", lambda match: f"backbone.norm{int(match[1]) + 1}."),
    (r"^(decode_head|auxiliary_head)\.classifier\.", r"\1.conv_seg."),
    (r"^(decode_head|auxiliary_head)\.(.*)\.batch_norm\.", r"\1.\2.bn."),
]
# OpenMMLab's two-stage detectors; the stages of a cascade are numbered.
ORIGINAL_CASCADE = [
    *ORIGINAL_SEGMENTATION,
    (r"^neck\.laterals\.(\d)\.", r"neck.lateral_convs.\1."),
    (r"^neck\.outputs\.(\d)\.", r"neck.fpn_convs.\1."),
    (r"^(neck\..*)\.0\.(weight|bias)$", r"\1.conv.\2"),
    (r"^(neck\..*)\.1\.(weight|bias)$", r"\1.ln.\2"),
    (r"^rpn\.convolution\.", "rpn_head.rpn_conv."),
    (r"^rpn\.objectness\.", "rpn_head.rpn_cls."),
    (r"^rpn\.deltas\.", "rpn_head.rpn_reg."),
    (r"^(box_heads\.\d)\.fc([12])\.", lambda match: f"{match[1]}.shared_fcs.{int(match[2]) - 1}."),
    (r"^(box_heads\.\d)\.classifier\.", r"\1.fc_cls."),
    (r"^(box_heads\.\d)\.regressor\.", r"\1.fc_reg."),
    (r"^box_heads\.", "roi_head.bbox_head."),
    (r"^mask_head\.convolutions\.(\d)\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^mask_head\.classifier\.", "roi_head.mask_head.conv_logits."),
    (r"^mask_head\.", "roi_head.mask_head."),
]
LAYOUTS = {
    "vitp": [],
    "internvl": INTERNVL,
    "backbone": [(r"^model\.vision_tower\.", "")],
    "original": ORIGINAL,
    "original_vision": [*ORIGINAL_VISION, (r"^vision_model\.", "")],
    "original_vision_prefixed": ORIGINAL_VISION,
    "timm": TIMM,
    "segmentation": [],
    "detection": [],
    "adapter": [(r"^backbone\.", "")],
    "original_segmentation": ORIGINAL_SEGMENTATION,
    "original_cascade": ORIGINAL_CASCADE,
    "original_detection": [*ORIGINAL_CASCADE, (r"^roi_head\.bbox_head\.0\.", "roi_head.bbox_head.")],
    "original_adapter": [*ORIGINAL_SEGMENTATION, (r"^backbone\.", "")],
    "original_adapter_prefixed": ORIGINAL_SEGMENTATION,
}
# Tensors that a layout lacks. ViT-Adapter runs without the CLS token, which its own code does not save.
ABSENT = {
    "backbone": r"(?!model\.vision_tower\.)",
    "adapter": r"(?!backbone\.)",
    "original_segmentation": r"backbone\.embeddings\.cls_token$",
    "original_cascade": r"backbone\.embeddings\.cls_token$",
    "original_detection": r"backbone\.embeddings\.cls_token$",
    "original_adapter": r"(?!backbone\.)|backbone\.embeddings\.cls_token$",
    "original_adapter_prefixed": r"backbone\.embeddings\.cls_token$",
}
# The layout is the first one whose pattern matches a key.
SIGNS = {
    "detection": r"box_heads\.0\.regressor\.",
    "original_cascade": r"roi_head\.bbox_head\.0\.fc_reg\.",
    "original_detection": r"roi_head\.bbox_head\.fc_reg\.",
    "segmentation": r"backbone\.spatial_prior\.",
    "adapter": r"spatial_prior\.",
    "original_segmentation": r"decode_head\.psp_modules\.\d\.1\.bn\.",
    "original_adapter": r"spm\.",
    "original_adapter_prefixed": r"backbone\.spm\.",
    "vitp": r"model\.(vision_tower|multi_modal_projector|language_model)\.",
    "internvl": r"(vision_tower|multi_modal_projector)\.",
    "original": r"mlp1\.",
    "backbone": r"embeddings\.cls_token|encoder\.layer\.\d+\.lambda_1",
    "original_vision": r"embeddings\.class_embedding|encoder\.layers\.\d+\.ls1",
    "original_vision_prefixed": r"vision_model\.(embeddings\.class_embedding|encoder\.layers\.\d+\.ls1)",
}


class Location(NamedTuple):
    """Location of a tensor in a layout: all of `key`, or one of `num_blocks` equal blocks of its rows."""

    key: str
    block_index: int = 0
    num_blocks: int = 1


def locate_tensor(name: str, layout: str) -> Location | None:
    """Return the location in `layout` of the tensor `name` of this package, or `None` if the layout lacks it."""
    if layout in ABSENT and re.match(ABSENT[layout], name):
        return None
    key = name
    for pattern, replacement in LAYOUTS[layout]:
        key = re.sub(pattern, replacement, key)
    projection = re.search(r"\.attention\.([qkv])_proj\.", name)
    has_fused_projections = layout.startswith(("original", "timm"))
    is_of_vit = name.startswith((VISION_TOWER, BACKBONE))
    if projection is not None and is_of_vit and has_fused_projections:
        return Location(key, block_index="qkv".index(projection[1]), num_blocks=3)
    return Location(key)


def arrange_tensors(tensors: Mapping[str, T], layout: str) -> dict[str, list[T]]:
    """Return the tensors under the names of a layout, each as the blocks of its rows in their order."""
    arranged: dict[str, dict[int, T]] = {}
    for name, tensor in tensors.items():
        location = locate_tensor(name, layout)
        if location is not None:
            arranged.setdefault(location.key, {})[location.block_index] = tensor
    ordered_blocks = {}
    for key, blocks in arranged.items():
        ordered_blocks[key] = [blocks[index] for index in sorted(blocks)]
    return ordered_blocks


def recognize_layout(keys: set[str]) -> str | None:
    """Return the layout of a checkpoint with these keys, or `None` if it is unknown."""
    for layout, pattern in SIGNS.items():
        if any(re.match(pattern, key) for key in keys):
            return layout
    return None
