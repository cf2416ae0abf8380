"""Configurations of the detectors. The defaults of each are those of its published model."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vitp_dense import ViTPAdapterConfig, multi_scale_config
from .opening import ConfigNamesItsFiles

Number = float | int
Numbers = list[float | int] | tuple[float | int, ...]


@strict
class ViTPObjectDetectionConfig(ConfigNamesItsFiles, PreTrainedConfig):
    r"""Configuration of [`ViTPForObjectDetection`]: Cascade R-CNN (arXiv 1712.00726), by default as for DIOR.

    Args:
        backbone_config (`dict`, [`ViTPAdapterConfig`] or [`ViTPFeaturePyramidConfig`], *optional*):
            The ViT and what makes its features maps at four strides; an adapter if a dictionary names no `model_type`.
        neck_channels (`int`, defaults to 256):
            Width of the five maps that boxes are found in, and of the convolutions of the heads.
        neck_top_down (`bool`, defaults to `False`):
            Whether each map is given the next coarser one (FPN, arXiv 1612.03144), its convolutions with biases;
            otherwise their outputs are normalised.
        head_hidden_size (`int`, defaults to 1024):
            Width of the box heads' two layers.
        anchor_scale (`float`, defaults to 8), anchor_ratios (`list[float]`, defaults to `[0.5, 1, 2]`):
            Side of the anchors, in strides of their map (4, 8, 16, 32 and 64 pixels), and their heights by widths.
        stage_iou_thresholds (`list[float]`, defaults to `[0.5, 0.6, 0.7]`):
            The overlap from which on a box is an object's, in each stage of the cascade. With one stage the model is
            Faster R-CNN.
        stage_loss_weights (`list[float]`, defaults to `[1, 0.5, 0.25]`):
            Weights of the stages' losses.
        stage_box_stds (`list[list[float]]`):
            What the deltas of each stage's boxes are divided by.
        class_agnostic_boxes (`bool`, defaults to `True`):
            Whether a box head predicts one box for all classes, and not one for each.
        box_loss (`str`, defaults to `"smooth_l1"`):
            `"smooth_l1"`, with its bend at 1/9 for proposals and at 1 in the heads, or `"l1"`.
        rpn_positive_iou (`float`, defaults to 0.7), rpn_negative_iou (`float`, defaults to 0.3):
            From which overlap on an anchor is an object's, and below which it is background. An object whose best
            anchor overlaps it by at least the second takes this one.
        rpn_samples (`int`, defaults to 256), rpn_positive_share (`float`, defaults to 0.5):
            Anchors of an image that are trained on, and at most which share of them is objects'.
        rpn_use_outside_anchors (`bool`, defaults to `False`):
            Whether anchors that leave the image are trained on.
        rpn_candidates_train (`int`, defaults to 2000), rpn_candidates_eval (`int`, defaults to 1000):
            The best anchors of each map that become boxes, in training and evaluation.
        rpn_nms_threshold (`float`, defaults to 0.7):
            The overlap up to which both of two proposals of a map are kept.
        rpn_proposals_train (`int`, defaults to 2000), rpn_proposals_eval (`int`, defaults to 1000):
            Proposals of an image, in training and evaluation.
        roi_samples (`int`, defaults to 512), roi_positive_share (`float`, defaults to 0.25):
            Proposals of an image that a head is trained on, and at most which share of them is objects'.
        roi_match_low_quality (`bool`, defaults to `False`):
            Whether an object takes its best proposals too where several objects are as near to one.
        score_threshold (`float`, defaults to 0.05):
            Detections have a higher score.
        nms_threshold (`float`, defaults to 0.5):
            The overlap up to which both of two detections of a class are kept.
        max_detections (`int`, defaults to 100):
            Detections of an image at most.
        flip_test (`bool`, defaults to `False`):
            Whether evaluation looks at each image a second time, mirrored, and takes the mean. Twice the time.
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
        stages = {
            name: len(getattr(self, name)) for name in ("stage_iou_thresholds", "stage_loss_weights", "stage_box_stds")
        }
        if len(set(stages.values())) != 1 or not self.stage_iou_thresholds:
            raise ValueError(f"as many of each are needed, and at least one, but there are {stages}.")
        for stds in self.stage_box_stds:
            is_list = isinstance(stds, (list, tuple)) and len(stds) == self.num_box_values
            if not is_list or not all(isinstance(std, Number) and 0 < std < math.inf for std in stds):
                raise ValueError(f"stage_box_stds has {stds}, but {self.num_box_values} positive numbers are needed.")

    def validate_sizes(self):
        names = [
            name for name in vars(self) if name.endswith(("_samples", "_train", "_eval", "_channels", "_detections"))
        ]
        for name in (*names, "head_hidden_size", "anchor_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0.")
        if not self.anchor_ratios or not all(0 < ratio < math.inf for ratio in self.anchor_ratios):
            raise ValueError(f"anchor_ratios={self.anchor_ratios}, but numbers above 0 are needed.")
        if not all(0 <= weight < math.inf for weight in self.stage_loss_weights):
            raise ValueError(f"stage_loss_weights={self.stage_loss_weights}, but numbers from 0 on are needed.")

    def validate_box_loss(self):
        if self.box_loss not in ("smooth_l1", "l1"):
            raise ValueError(f"box_loss={self.box_loss!r} is neither 'smooth_l1' nor 'l1'.")

    def validate_shares(self):
        names = [name for name in vars(self) if name.endswith(("_iou", "_share", "_threshold"))]
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1].")
        if not all(0 <= threshold <= 1 for threshold in self.stage_iou_thresholds):
            raise ValueError(f"stage_iou_thresholds={self.stage_iou_thresholds}, of which one is outside [0, 1].")
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou={self.rpn_negative_iou} is above rpn_positive_iou={self.rpn_positive_iou}."
            )


@strict
class ViTPOrientedObjectDetectionConfig(ViTPObjectDetectionConfig):
    r"""Configuration of [`ViTPForOrientedObjectDetection`]: Oriented R-CNN (arXiv 2108.05699), as for DIOR-R.

    The arguments are those of [`ViTPObjectDetectionConfig`]; `flip_test` is not to be had.
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
            raise ValueError("flip_test takes the mean of boxes, which oriented boxes do not have.")


@strict
class ViTPInstanceSegmentationConfig(ViTPObjectDetectionConfig):
    r"""Configuration of [`ViTPForInstanceSegmentation`]: Mask R-CNN (arXiv 1703.06870), as for SSDD.

    SSDD's published score is one with `flip_test=True`. The arguments are those of [`ViTPObjectDetectionConfig`].
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
