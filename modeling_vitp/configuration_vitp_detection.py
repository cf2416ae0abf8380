"""Configurations of the detectors. The defaults are the settings of the published models, but for the adapter."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp_dense import ViTPAdapterConfig, multi_scale_config
from .opening import ConfigNamesItsFiles

Number = float | int
Numbers = list[float | int] | tuple[float | int, ...]

# Ends of the names of settings between 0 and 1, and of those above 0.
SHARES = ("_iou", "_share", "_threshold", "_thresholds")
SIZES = (
    "_samples",
    "_train",
    "_eval",
    "_channels",
    "_detections",
    "_hidden_size",
    "anchor_scale",
    "anchor_ratios",
)


@strict
class ViTPObjectDetectionConfig(ConfigNamesItsFiles, PreTrainedConfig):
    r"""Configuration of [`ViTPForObjectDetection`]: Cascade R-CNN (arXiv 1712.00726), defaults as for DIOR.

    Args:
        backbone_config (`dict`, [`ViTPAdapterConfig`] or [`ViTPFeaturePyramidConfig`], *optional*):
            Configuration of the backbone (ViT and neck). A dictionary without `model_type` means an adapter.
        neck_channels (`int`, defaults to 256):
            Width of the five feature maps and of the heads' convolutions.
        neck_top_down (`bool`, defaults to `False`):
            Whether the next coarser map is added to each map (FPN, arXiv 1612.03144), with biases in the convolutions;
            otherwise the convolutions are followed by a norm.
        head_hidden_size (`int`, defaults to 1024):
            Width of the box heads' two layers.
        anchor_scale (`float`, defaults to 8), anchor_ratios (`list[float]`, defaults to `[0.5, 1, 2]`):
            Side of the anchors in strides of their map (4, 8, 16, 32 and 64 pixels), and their height-to-width ratios.
        stage_iou_thresholds (`list[float]`, defaults to `[0.5, 0.6, 0.7]`):
            IoU from which a box is positive, in each stage of the cascade. With one stage the model is Faster R-CNN.
        stage_loss_weights (`list[float]`, defaults to `[1, 0.5, 0.25]`):
            Loss weight of each stage.
        stage_box_stds (`list[list[float]]`):
            Standard deviations by which the box deltas of each stage are normalized.
        class_agnostic_boxes (`bool`, defaults to `True`):
            Whether a box head predicts one box for all classes rather than one for each class.
        box_loss (`str`, defaults to `"smooth_l1"`):
            `"smooth_l1"`, with a beta of 1/9 for proposals and of 1 in the heads, or `"l1"`.
        rpn_positive_iou (`float`, defaults to 0.7), rpn_negative_iou (`float`, defaults to 0.3):
            IoU from which an anchor is positive, and below which it is negative. The best anchor of an object is also
            positive if its IoU is at least `rpn_negative_iou`.
        rpn_samples (`int`, defaults to 256), rpn_positive_share (`float`, defaults to 0.5):
            Sampled anchors of an image for the loss, and the maximum share of positive ones.
        rpn_use_outside_anchors (`bool`, defaults to `False`):
            Whether anchors that cross the image border are used in training.
        rpn_candidates_train (`int`, defaults to 2000), rpn_candidates_eval (`int`, defaults to 1000):
            Number of the best anchors of each map before non-maximum suppression, in training and evaluation.
        rpn_nms_threshold (`float`, defaults to 0.7):
            IoU threshold of non-maximum suppression among the proposals of a map.
        rpn_proposals_train (`int`, defaults to 2000), rpn_proposals_eval (`int`, defaults to 1000):
            Maximum number of proposals of an image, in training and evaluation.
        roi_samples (`int`, defaults to 512), roi_positive_share (`float`, defaults to 0.25):
            Sampled proposals of an image for the loss of a head, and the maximum share of positive ones.
        roi_match_low_quality (`bool`, defaults to `False`):
            Whether an object's best proposals are positive for it even if they overlap another object more.
        score_threshold (`float`, defaults to 0.05):
            Score that a detection must exceed.
        nms_threshold (`float`, defaults to 0.5):
            IoU threshold of non-maximum suppression among the detections of a class.
        max_detections (`int`, defaults to 100):
            Maximum number of detections of an image.
        flip_test (`bool`, defaults to `False`):
            Whether evaluation averages the predictions for each image and its mirror image, which doubles its time.
    """

    model_type = "vitp_object_detection"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=ViTPAdapterConfig)}
    num_box_values = 4

    backbone_config: dict | PreTrainedConfig | None = None
    neck_channels: int = 256
    neck_top_down: bool = False
    head_hidden_size: int = 1024
    anchor_scale: Number = 8
    anchor_ratios: Numbers = (0.5, 1, 2)
    stage_iou_thresholds: Numbers = (0.5, 0.6, 0.7)
    stage_loss_weights: Numbers = (1, 0.5, 0.25)
    stage_box_stds: list | tuple = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    class_agnostic_boxes: bool = True
    box_loss: str = "smooth_l1"
    rpn_positive_iou: Number = 0.7
    rpn_negative_iou: Number = 0.3
    rpn_samples: int = 256
    rpn_positive_share: Number = 0.5
    rpn_use_outside_anchors: bool = False
    rpn_candidates_train: int = 2000
    rpn_candidates_eval: int = 1000
    rpn_nms_threshold: Number = 0.7
    rpn_proposals_train: int = 2000
    rpn_proposals_eval: int = 1000
    roi_samples: int = 512
    roi_positive_share: Number = 0.25
    roi_match_low_quality: bool = False
    score_threshold: Number = 0.05
    nms_threshold: Number = 0.5
    max_detections: int = 100
    flip_test: bool = False

    def __post_init__(self, **kwargs):
        self.backbone_config = multi_scale_config(self.backbone_config)
        super().__post_init__(**kwargs)

    def validate_stages(self):
        lengths = {
            "stage_iou_thresholds": len(self.stage_iou_thresholds),
            "stage_loss_weights": len(self.stage_loss_weights),
            "stage_box_stds": len(self.stage_box_stds),
        }
        if len(set(lengths.values())) != 1 or not self.stage_iou_thresholds:
            raise ValueError(f"Expected equal lengths of at least 1, got {lengths}.")
        for stds in self.stage_box_stds:
            if not self.are_stds(stds):
                raise ValueError(f"Expected `stage_box_stds` of {self.num_box_values} positive numbers, got {stds}.")

    def are_stds(self, stds: object) -> bool:
        """Return whether these can be the standard deviations of a stage."""
        if not isinstance(stds, (list, tuple)) or len(stds) != self.num_box_values:
            return False
        return all(isinstance(std, Number) and 0 < std < math.inf for std in stds)

    def validate_ranges(self):
        for name, setting in vars(self).items():
            numbers = setting if isinstance(setting, (list, tuple)) else [setting]
            if name.endswith(SHARES):
                expected = "in [0, 1]"
                is_valid = all(0 <= number <= 1 for number in numbers)
            elif name.endswith(SIZES):
                expected = "above 0"
                is_valid = len(numbers) > 0 and all(0 < number < math.inf for number in numbers)
            elif name == "stage_loss_weights":
                expected = "of at least 0"
                is_valid = all(0 <= number < math.inf for number in numbers)
            else:
                continue
            if not is_valid:
                raise ValueError(f"Expected `{name}` {expected}, got {setting}.")
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou={self.rpn_negative_iou} must not exceed rpn_positive_iou={self.rpn_positive_iou}."
            )

    def validate_box_loss(self):
        if self.box_loss not in ("smooth_l1", "l1"):
            raise ValueError(f"Expected `box_loss` to be 'smooth_l1' or 'l1', got {self.box_loss!r}.")


@strict
class ViTPOrientedObjectDetectionConfig(ViTPObjectDetectionConfig):
    r"""Configuration of [`ViTPForOrientedObjectDetection`]: Oriented R-CNN (arXiv 2108.05699), defaults as for DIOR-R.

    The arguments are those of [`ViTPObjectDetectionConfig`]; `flip_test` is not supported.
    """

    model_type = "vitp_oriented_object_detection"
    num_box_values = 5

    stage_iou_thresholds: Numbers = (0.5,)
    stage_loss_weights: Numbers = (1,)
    stage_box_stds: list | tuple = ((0.1, 0.1, 0.2, 0.2, 0.1),)
    rpn_candidates_eval: int = 2000
    rpn_nms_threshold: Number = 0.8
    rpn_proposals_eval: int = 2000
    nms_threshold: Number = 0.1
    max_detections: int = 2000

    def validate_flip_test(self):
        if self.flip_test:
            raise ValueError("`flip_test` is not supported for oriented boxes, which cannot be averaged.")


@strict
class ViTPInstanceSegmentationConfig(ViTPObjectDetectionConfig):
    r"""Configuration of [`ViTPForInstanceSegmentation`]: Mask R-CNN (arXiv 1703.06870), by default as for SSDD.

    The published SSDD score was measured with `flip_test=True`. The other arguments are those of
    [`ViTPObjectDetectionConfig`].
    """

    model_type = "vitp_instance_segmentation"

    neck_top_down: bool = True
    stage_iou_thresholds: Numbers = (0.5,)
    stage_loss_weights: Numbers = (1,)
    stage_box_stds: list | tuple = ((0.1, 0.1, 0.2, 0.2),)
    class_agnostic_boxes: bool = False
    box_loss: str = "l1"
    rpn_use_outside_anchors: bool = True
    rpn_proposals_train: int = 1000
    roi_match_low_quality: bool = True


__all__ = [
    "ViTPInstanceSegmentationConfig",
    "ViTPObjectDetectionConfig",
    "ViTPOrientedObjectDetectionConfig",
]
