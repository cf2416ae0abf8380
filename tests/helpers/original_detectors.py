"""Tiny detectors of the original code under our names, converted independently of the package."""

import json
import re

import torch
from original_adapter import RENAMED
from paths import FIXTURES
from safetensors.torch import load_file

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from modeling_vitp.rotated_boxes import corners

DETECTORS = {
    "cascade_rcnn": ViTPForObjectDetection,
    "oriented_rcnn": ViTPForOrientedObjectDetection,
    "mask_rcnn": ViTPForInstanceSegmentation,
}
HEADS = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.laterals.\1.0."),
    (r"^neck\.lateral_convs\.(\d)\.ln\.", r"neck.laterals.\1.1."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.outputs.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.ln\.", r"neck.outputs.\1.1."),
    (r"^rpn_head\.rpn_conv\.", "rpn.convolution."),
    (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
    (r"^roi_head\.bbox_head\.(\d)\.", r"box_heads.\1."),
    (r"^roi_head\.bbox_head\.", r"box_heads.0."),
    (r"\.shared_fcs\.0\.", ".fc1."),
    (r"\.shared_fcs\.1\.", ".fc2."),
    (r"\.fc_cls\.", ".classifier."),
    (r"\.fc_reg\.", ".regressor."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"mask_head.convolutions.\1."),
    (r"^roi_head\.mask_head\.upsample\.", "mask_head.upsample."),
    (r"^roi_head\.mask_head\.conv_logits\.", "mask_head.classifier."),
]


def folder_of(name: str):
    return FIXTURES / f"{name}_tiny_original"


def our_name(name: str) -> str:
    """Return our name of a tensor that is not a fused `qkv`."""
    prefix, rest = ("backbone.", name[9:]) if name.startswith("backbone.") else ("", name)
    for pattern, replacement in RENAMED if prefix else HEADS:
        rest = re.sub(pattern, replacement, rest)
    return prefix + rest


def original_weights(name: str) -> dict[str, torch.Tensor]:
    weights = {}
    for key, tensor in load_file(folder_of(name) / "detector.safetensors").items():
        fused = re.fullmatch(r"backbone\.layers\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if fused:
            for letter, part in zip("qkv", tensor.chunk(3)):
                weights[f"backbone.encoder.layer.{fused[1]}.attention.{letter}_proj.{fused[2]}"] = part
        else:
            weights[our_name(key)] = tensor
    return weights


def original_detector(name: str, **settings):
    """Build a detector with the settings and weights of the original, in evaluation mode."""
    original = json.loads((folder_of(name) / "settings.json").read_text())
    backbone, train, test = original["backbone"], original["train_cfg"], original["test_cfg"]
    heads, stages = original["roi_head"]["bbox_head"], train["rcnn"]
    heads, stages = (part if isinstance(part, list) else [part] for part in (heads, stages))
    adapter = ViTPAdapterConfig(
        hidden_size=backbone["embed_dim"],
        num_hidden_layers=backbone["depth"],
        num_attention_heads=backbone["num_heads"],
        intermediate_size=int(backbone["embed_dim"] * backbone["mlp_ratio"]),
        attention_bias=backbone["qkv_bias"],
        image_size=[backbone["img_size"]] * 2,
        patch_size=[16, 16],
        interaction_layers=backbone["interaction_indexes"],
        deformable_heads=backbone["deform_num_heads"],
        spatial_prior_channels=backbone["conv_inplane"],
    )
    every = {
        "neck_channels": original["neck"]["out_channels"],
        "neck_top_down": original["neck"]["type"] == "FPN",
        "head_hidden_size": heads[0]["fc_out_channels"],
        "num_labels": heads[0]["num_classes"],
        "class_agnostic_boxes": heads[0]["reg_class_agnostic"],
        "box_loss": {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1"}[heads[0]["loss_bbox"]["type"]],
        "stage_iou_thresholds": [stage["assigner"]["pos_iou_thr"] for stage in stages],
        "stage_loss_weights": original["roi_head"].get("stage_loss_weights", [1]),
        "stage_box_stds": [head["bbox_coder"]["target_stds"] for head in heads],
        "rpn_samples": train["rpn"]["sampler"]["num"],
        "rpn_use_outside_anchors": train["rpn"]["allowed_border"] < 0,
        "rpn_candidates_train": train["rpn_proposal"]["nms_pre"],
        "rpn_candidates_eval": test["rpn"]["nms_pre"],
        "rpn_nms_threshold": test["rpn"]["nms"]["iou_threshold"],
        "rpn_proposals_train": train["rpn_proposal"]["max_per_img"],
        "rpn_proposals_eval": test["rpn"]["max_per_img"],
        "roi_samples": stages[0]["sampler"]["num"],
        "roi_match_low_quality": stages[0]["assigner"]["match_low_quality"],
        "nms_threshold": test["rcnn"]["nms"].get("iou_threshold", test["rcnn"]["nms"].get("iou_thr")),
        "max_detections": test["rcnn"]["max_per_img"],
    }
    # Settings that equal the defaults, which are those of the published models, are omitted to test the defaults.
    config_class = DETECTORS[name].config_class
    defaults = config_class()
    changed = {key: value for key, value in every.items() if not same(getattr(defaults, key), value)}
    expected_to_change = {
        "neck_channels", "head_hidden_size", "num_labels", "rpn_samples", "roi_samples", "max_detections",
        "rpn_candidates_train", "rpn_candidates_eval", "rpn_proposals_train", "rpn_proposals_eval",
    }  # fmt: skip
    assert set(changed) <= expected_to_change, changed
    model = DETECTORS[name](config_class(backbone_config=adapter, **(changed | settings))).eval()
    loaded = model.load_state_dict(original_weights(name), strict=False)
    assert loaded.missing_keys == ["backbone.embeddings.cls_token"] and loaded.unexpected_keys == []
    return model


def same(one, other) -> bool:
    return json.dumps(one) == json.dumps(other) or one == other


SIZES = torch.tensor([[96.0, 96.0], [80.0, 90.0]])  # height and width of the two images without padding


def pixel_mask() -> torch.Tensor:
    mask = torch.zeros(2, 96, 96, dtype=torch.long)
    for image, (height, width) in enumerate(SIZES.int().tolist()):
        mask[image, :height, :width] = 1
    return mask


def original_labels(name: str) -> list[dict[str, torch.Tensor]]:
    """Return the objects of both images in the format of our models."""
    expected, labels = load_file(folder_of(name) / "expected.safetensors"), []
    for image, size in enumerate(SIZES):
        boxes, label = expected[f"gt.{image}.boxes"], {"class_labels": expected[f"gt.{image}.labels"]}
        if name == "oriented_rcnn":
            label["corners"] = corners(boxes) / size.flip(0)
        else:
            centres_and_sides = [(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]]
            label["boxes"] = torch.cat(centres_and_sides, 1) / size.flip(0).repeat(2)
        if name == "mask_rcnn":
            label["masks"] = expected[f"gt.{image}.masks"]
        labels.append(label)
    return labels
