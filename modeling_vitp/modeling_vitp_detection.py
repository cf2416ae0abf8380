"""Detectors on ViTP's feature maps: Cascade R-CNN, Oriented R-CNN and Mask R-CNN, as in the paper's fine-tuning.

Coordinates, anchors, overlaps, pooling and losses are float32 for any dtype of the weights or of autocast, because
bfloat16 coordinates near 1000 px are 4 px apart.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.image_transforms import center_to_corners_format
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vitp_detection import (
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
)
from .detection_boxes import (
    STRIDES,
    BoxCoder,
    MidpointCoder,
    RotatedBoxCoder,
    centers_and_sides,
    make_anchors,
    match,
    nms_by_label,
    of_class,
    sample,
    trained_anchors,
)
from .modeling_vitp_adapter import ChannelLayerNorm
from .modeling_vitp_backbone import pad_to_multiple
from .modeling_vitp_multi_scale import OnMultiScaleBackbone
from .rotated_boxes import corners, enclosing_boxes, roi_align_rotated, rotated_iou, rotated_nms, smallest_rectangles

# Sides of the pooled features, in cells.
BOX_CELLS = 7
MASK_CELLS = 14
# Beta of smooth L1.
RPN_BETA = 1 / 9
HEAD_BETA = 1.0
FINEST_SIDE = 56  # pixels: boxes of twice this side or more are pooled from the second map, and so on


@dataclass
class ViTPDetectionOutput(ModelOutput):
    r"""Output of the detectors.

    loss (`torch.Tensor`, *optional*, returned when `labels` are passed):
        Sum of `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*):
        Weighted losses of the proposals and of each stage.
    scores (`torch.Tensor` of shape `(batch_size, detections)`, *optional*):
        Probabilities in descending order, padded with 0.
    labels (`torch.LongTensor` of shape `(batch_size, detections)`, *optional*):
        Classes, padded with -1.
    pred_boxes (`torch.Tensor` of shape `(batch_size, detections, 4)`, *optional*):
        Center x, center y, width and height, relative to the image without its padding. For oriented objects, their
        enclosing boxes.
    pred_corners (`torch.Tensor` of shape `(batch_size, detections, 4, 2)`, *optional*, oriented objects):
        Corners x, y around each box, relative to the image.
    pred_masks (`torch.Tensor` of shape `(batch_size, detections, 28, 28)`, *optional*, instances):
        Mask probabilities within each box.
    hidden_states, attentions (*optional*):
        Hidden states and attentions of the ViT, if requested.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    scores: torch.Tensor | None = None
    labels: torch.LongTensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_corners: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class View:
    """Feature maps of images (or of their mirror images), with the outputs of the region proposal network."""

    maps: list[torch.Tensor]  # the four maps for pooling, `(batch_size, channels, height, width)`
    anchors: list[torch.Tensor]  # anchors of each of the five maps, `(anchors of a map, 4)`
    logits: torch.Tensor  # (batch_size, anchors)
    deltas: torch.Tensor  # (batch_size, anchors, deltas)


@dataclass
class Objects:
    """Ground-truth objects of an image."""

    labels: torch.Tensor  # (objects,)
    boxes: torch.Tensor  # (objects, 4 or 5), in pixels
    masks: torch.Tensor | None = None  # (objects, height, width)


@dataclass
class Samples:
    """Sampled boxes of an image for the loss of a head."""

    boxes: torch.Tensor  # (n, 4 or 5)
    matched: torch.Tensor  # (n,), index of an object, or negative for background
    are_objects: torch.Tensor  # (n,), whether the box is a ground-truth box


class DetectionNeck(nn.Module):
    """Neck that converts maps at strides 4 to 32 into five maps of equal width, the last at stride 64.

    With a top-down path it is FPN (arXiv 1612.03144). Without one, the convolutions have no bias and are followed by
    LayerNorm over the channels.
    """

    def __init__(self, config: ViTPObjectDetectionConfig, in_channels: list[int]):
        super().__init__()
        self.top_down = config.neck_top_down
        self.width = config.neck_channels
        self.laterals = nn.ModuleList()
        self.outputs = nn.ModuleList()
        for channels in in_channels:
            self.laterals.append(self.make_layer(channels, kernel_size=1))
        for _ in in_channels:
            self.outputs.append(self.make_layer(self.width, kernel_size=3))

    def make_layer(self, in_channels: int, kernel_size: int) -> nn.Sequential:
        convolution = nn.Conv2d(
            in_channels,
            self.width,
            kernel_size,
            padding=kernel_size // 2,
            bias=self.top_down,
        )
        if self.top_down:
            return nn.Sequential(convolution)
        return nn.Sequential(convolution, ChannelLayerNorm(self.width, eps=1e-5))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        hidden_maps = [lateral(features) for lateral, features in zip(self.laterals, maps)]
        if self.top_down:
            for level in reversed(range(len(hidden_maps) - 1)):
                finer = hidden_maps[level]
                coarser = hidden_maps[level + 1]
                hidden_maps[level] = finer + F.interpolate(coarser, size=finer.shape[-2:])
        output_maps = [output(features) for output, features in zip(self.outputs, hidden_maps)]
        coarsest = F.max_pool2d(output_maps[-1], 1, stride=2)
        output_maps.append(coarsest)
        return output_maps


class RegionProposals(nn.Module):
    """Region proposal network (arXiv 1506.01497): objectness and box deltas for each anchor of all maps."""

    def __init__(self, config: ViTPObjectDetectionConfig, num_deltas: int):
        super().__init__()
        width = config.neck_channels
        anchors = len(config.anchor_ratios)
        self.num_deltas = num_deltas
        self.convolution = starting(nn.Conv2d(width, width, 3, padding=1), 0.01)
        self.objectness = starting(nn.Conv2d(width, anchors, 1), 0.01)
        self.deltas = starting(nn.Conv2d(width, anchors * num_deltas, 1), 0.01)

    def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(batch_size, anchors)` and deltas `(batch_size, anchors, num_deltas)`, in float32."""
        logits = []
        deltas = []
        for features in maps:
            hidden = F.relu(self.convolution(features))
            logits.append(channels_last(self.objectness(hidden)))
            deltas.append(channels_last(self.deltas(hidden)))
        logits = torch.cat(logits, 1)
        deltas = torch.cat(deltas, 1).unflatten(1, (-1, self.num_deltas))
        return logits.float(), deltas.float()


def channels_last(features: torch.Tensor) -> torch.Tensor:
    """Return the values of a map cell by cell, `(batch_size, height * width * channels)`."""
    return features.permute(0, 2, 3, 1).flatten(1)


class BoxHead(nn.Module):
    """Head that predicts classes and boxes from the pooled features of boxes, `(boxes, channels, 7, 7)`."""

    def __init__(self, config: ViTPObjectDetectionConfig, num_deltas: int):
        super().__init__()
        width = config.head_hidden_size
        self.fc1 = nn.Linear(config.neck_channels * BOX_CELLS**2, width)
        self.fc2 = nn.Linear(width, width)
        self.classifier = starting(nn.Linear(width, config.num_labels + 1), 0.01)
        self.num_deltas = num_deltas
        boxes = 1 if config.class_agnostic_boxes else config.num_labels
        self.regressor = starting(nn.Linear(width, num_deltas * boxes), 0.001)

    def forward(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class logits and box deltas in float32.

        The logits are `(boxes, num_labels + 1)`, background last, the deltas `(boxes, 1 or num_labels, num_deltas)`.
        """
        hidden = F.relu(self.fc1(pooled.flatten(1)))
        hidden = F.relu(self.fc2(hidden))
        logits = self.classifier(hidden)
        deltas = self.regressor(hidden).unflatten(1, (-1, self.num_deltas))
        return logits.float(), deltas.float()


class MaskHead(nn.Module):
    """Head that predicts a mask for each class from the pooled features of boxes, `(boxes, channels, 14, 14)`."""

    def __init__(self, config: ViTPObjectDetectionConfig):
        super().__init__()
        width = config.neck_channels
        self.convolutions = nn.ModuleList()
        for _ in range(4):
            self.convolutions.append(starting_by_he(nn.Conv2d(width, width, 3, padding=1)))
        self.upsample = starting_by_he(nn.ConvTranspose2d(width, width, 2, 2))
        self.classifier = starting_by_he(nn.Conv2d(width, config.num_labels, 1))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return logits `(boxes, num_labels, 28, 28)`, in float32."""
        for convolution in self.convolutions:
            pooled = F.relu(convolution(pooled))
        upsampled = F.relu(self.upsample(pooled))
        return self.classifier(upsampled).float()


def starting(layer: nn.Module, std: float) -> nn.Module:
    """Set the standard deviation of a layer's initial weights, which otherwise are Xavier-initialized."""
    layer.initial_std = std
    return layer


def starting_by_he(layer: nn.Module) -> nn.Module:
    """Set the standard deviation of a convolution's initial weights as He et al. (arXiv 1502.01852) do."""
    weights_of_channel = layer.weight.numel() / layer.weight.shape[1]
    return starting(layer, math.sqrt(2 / weights_of_channel))


class ViTPForObjectDetection(OnMultiScaleBackbone, PreTrainedModel):
    """Object detection model: Cascade R-CNN (arXiv 1712.00726) on the maps of a ViT with adapter or feature pyramid.

    With one stage in its configuration it is Faster R-CNN.
    """

    config: ViTPObjectDetectionConfig
    config_class = ViTPObjectDetectionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    box_coder_class = BoxCoder
    rpn_coder = BoxCoder()

    def __init__(self, config: ViTPObjectDetectionConfig):
        super().__init__(config)
        self.backbone = self.backbone_of(config)
        self.neck = DetectionNeck(config, self.backbone.channels)
        self.rpn = RegionProposals(config, self.rpn_coder.num_deltas)
        self.box_coders = [self.box_coder_class(stds) for stds in config.stage_box_stds]
        self.box_heads = nn.ModuleList(BoxHead(config, coder.num_deltas) for coder in self.box_coders)
        self.build_further_heads(config)
        self.post_init()

    def build_further_heads(self, config: ViTPObjectDetectionConfig) -> None:
        """Create the heads of a subclass that predicts more than boxes."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize layers by Xavier, or with their `initial_std`.

        This is done for each layer because transformers skips modules without parameters of their own.
        """
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            return super()._init_weights(module)
        if hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)
        else:
            init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> tuple | ViTPDetectionOutput:
        r"""Compute the losses with `labels`, and the detections without them or in evaluation mode.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, in the top left corner.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 in an image, 0 in its padding. The ViT processes the padding, but boxes end at the image's border.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                Objects of each image, as in DETR: `class_labels` `(n,)` and `boxes` `(n, 4)`, center x, center y, width
                and height, relative to the image without its padding. [`ViTPForOrientedObjectDetection`] takes relative
                `corners` `(n, 4, 2)` instead of boxes, and [`ViTPForInstanceSegmentation`] also takes
                `masks` `(n, height, width)`. An image may have no objects.

        Returns:
            With labels `loss` and `loss_dict`; without labels, or in evaluation mode, the detections.

        Raises:
            ValueError: if a field of the labels is missing, an object has no extent, or a class is out of range.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        outputs = self.run_backbone(pad_to_multiple(pixel_values, 32, 32), **kwargs)
        view = self.view(outputs.feature_maps)
        losses = {}
        if labels is not None:
            losses = self.compute_losses(view, labels, sizes)
        detections = {}
        if labels is None or not self.training:
            detections = self.detect(self.all_views(view, pixel_values, sizes), sizes)
        return ViTPDetectionOutput(
            **losses,
            **detections,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_losses(
        self,
        view: View,
        labels: list[dict[str, torch.Tensor]],
        sizes: torch.Tensor,
    ) -> dict[str, Any]:
        """Return the fields `loss` and `loss_dict` of the output."""
        if len(labels) != len(sizes):
            raise ValueError(f"Expected labels of {len(sizes)} images, got those of {len(labels)}.")
        objects = [self.read_objects(label, size) for label, size in zip(labels, sizes)]
        losses = self.rpn_losses(view, objects, sizes)
        losses.update(self.head_losses(view, objects, sizes))
        return {"loss": sum(losses.values()), "loss_dict": losses}

    def all_views(
        self,
        view: View,
        pixel_values: torch.Tensor,
        sizes: torch.Tensor,
    ) -> list[View]:
        """Return the views that detections are averaged over: the given one and, with `flip_test`, the mirrored one."""
        if not self.config.flip_test:
            return [view]
        mirrored_images = mirror_images(pixel_values, sizes)
        outputs = self.run_backbone(pad_to_multiple(mirrored_images, 32, 32))
        return [view, self.view(outputs.feature_maps)]

    def view(self, feature_maps: tuple[torch.Tensor, ...]) -> View:
        maps = self.neck(feature_maps)
        shapes = [tuple(features.shape[-2:]) for features in maps]
        anchors = make_anchors(
            shapes,
            self.config.anchor_scale,
            self.config.anchor_ratios,
            maps[0].device,
        )
        logits, deltas = self.rpn(maps)
        pooled_maps = [features.float() for features in maps[:4]]
        return View(pooled_maps, anchors, logits, deltas)

    # Box operations, which ViTPForOrientedObjectDetection overrides.

    def read_boxes(
        self,
        label: dict[str, torch.Tensor],
        size: torch.Tensor,
    ) -> torch.Tensor:
        """Return the boxes of an image's objects, `(n, 4)` in pixels."""
        relative_boxes = self.read_field(label, "boxes", (4,))
        width_and_height = size.flip(-1)
        return center_to_corners_format(relative_boxes * width_and_height.repeat(2))

    def write_boxes(
        self,
        boxes: torch.Tensor,
        size: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Convert boxes in pixels to the fields of the output."""
        width_and_height = size.flip(-1)
        boxes = torch.cat(centers_and_sides(boxes), -1)
        return {"pred_boxes": boxes / width_and_height.repeat(2)}

    def sides(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes[..., 2:] - boxes[..., :2]

    def upright(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes

    def overlaps(self, boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.box_iou(boxes1, boxes2)

    def suppress(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        return nms_by_label(boxes, scores, self.config.nms_threshold, labels)

    def align(
        self,
        features: torch.Tensor,
        boxes: torch.Tensor,
        images: torch.Tensor,
        cells: int,
        scale: float,
    ) -> torch.Tensor:
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], -1)
        return torchvision.ops.roi_align(
            features,
            rois,
            cells,
            scale,
            sampling_ratio=0,
            aligned=True,
        )

    # Objects and samples

    def read_field(
        self,
        label: dict[str, torch.Tensor],
        name: str,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        if name not in label or tuple(label[name].shape[1:]) != shape:
            shapes = {field: tuple(tensor.shape) for field, tensor in label.items()}
            raise ValueError(f"Expected {name!r} of shape {('n', *shape)} in the labels of an image, got {shapes}.")
        return label[name].to(self.device).float()

    def read_objects(
        self,
        label: dict[str, torch.Tensor],
        size: torch.Tensor,
    ) -> Objects:
        labels = self.read_field(label, "class_labels", ()).long()
        boxes = self.read_boxes(label, size)
        if len(labels) != len(boxes):
            raise ValueError(f"Expected {len(boxes)} class_labels, one for each object, got {len(labels)}.")
        if not ((labels >= 0) & (labels < self.config.num_labels)).all():
            raise ValueError(f"Expected class_labels from 0 to {self.config.num_labels - 1}, got {labels.tolist()}.")
        if not (self.sides(boxes) > 0).all():
            raise ValueError(f"Expected boxes with an extent above 0, got {boxes.tolist()} in pixels.")
        return Objects(labels, boxes)

    def propose(
        self,
        view: View,
        sizes: torch.Tensor,
        candidates: int,
        number: int,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the proposals `(proposals, 4 or 5)` of each image and their scores, without gradient."""
        proposals = []
        for logits, deltas, size in zip(view.logits.detach(), view.deltas.detach(), sizes):
            boxes, scores, levels = self.best_anchors(
                view.anchors,
                logits,
                deltas,
                size,
                candidates,
            )
            has_extent = (self.sides(boxes) > 0).all(-1)
            indices = has_extent.nonzero()[:, 0]
            boxes = boxes[indices]
            scores = scores[indices]
            best = nms_by_label(
                self.upright(boxes),
                scores,
                self.config.rpn_nms_threshold,
                levels[indices],
            )
            best = best[:number]
            proposals.append((boxes[best], scores[best]))
        return proposals

    def best_anchors(
        self,
        anchors_of_level: list[torch.Tensor],
        logits: torch.Tensor,
        deltas: torch.Tensor,
        size: torch.Tensor,
        number: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the boxes of the best anchors of each map of an image, their scores and the indices of their maps."""
        counts = [len(anchors) for anchors in anchors_of_level]
        boxes = []
        scores = []
        levels = []
        outputs_of_level = zip(anchors_of_level, logits.split(counts), deltas.split(counts))
        for level, (anchors, level_logits, level_deltas) in enumerate(outputs_of_level):
            best_scores, indices = level_logits.sigmoid().topk(min(number, len(level_logits)))
            boxes.append(self.rpn_coder.decode(anchors[indices], level_deltas[indices], size))
            scores.append(best_scores)
            levels.append(torch.full_like(indices, level))
        return torch.cat(boxes), torch.cat(scores), torch.cat(levels)

    def pool(
        self,
        maps: list[torch.Tensor],
        boxes: torch.Tensor,
        images: torch.Tensor,
        cells: int,
    ) -> torch.Tensor:
        """Pool features in boxes, `(boxes, channels, cells, cells)`, from the map that fits each box's size."""
        mean_sides = self.sides(boxes).prod(-1).sqrt()
        levels = (mean_sides / FINEST_SIDE + 1e-6).log2().floor()
        levels = levels.clamp(0, len(maps) - 1)
        pooled = []
        order = []
        for level, (features, stride) in enumerate(zip(maps, STRIDES)):
            indices = (levels == level).nonzero()[:, 0]
            pooled_from_map = self.align(
                features,
                boxes[indices],
                images[indices],
                cells,
                scale=1 / stride,
            )
            pooled.append(pooled_from_map)
            order.append(indices)
        in_order_of_boxes = torch.cat(order).argsort()
        return torch.cat(pooled)[in_order_of_boxes].to(self.dtype)

    # Losses, with the choice of the anchors and proposals that they are computed on

    def rpn_losses(
        self,
        view: View,
        objects: list[Objects],
        sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        config = self.config
        all_anchors = torch.cat(view.anchors)
        class_loss = 0.0
        box_loss = 0.0
        count = 0
        for logits, deltas, target, size in zip(view.logits, view.deltas, objects, sizes):
            trained = trained_anchors(all_anchors, size, config.rpn_use_outside_anchors)
            anchors = all_anchors[trained]
            overlaps = torchvision.ops.box_iou(self.upright(target.boxes), anchors)
            matched = match(
                overlaps,
                config.rpn_positive_iou,
                config.rpn_negative_iou,
                config.rpn_negative_iou,
            )
            positives, negatives = sample(matched, config.rpn_samples, config.rpn_positive_share)

            sampled = torch.cat([positives, negatives])
            is_object = (matched[sampled] >= 0).float()
            sampled_logits = logits[trained[sampled]]
            class_loss += F.binary_cross_entropy_with_logits(sampled_logits, is_object, reduction="sum")
            goals = self.rpn_coder.encode(anchors[positives], target.boxes[matched[positives]])
            box_loss += self.box_loss(deltas[trained[positives]], goals, RPN_BETA)
            count += max(len(positives), 1) + max(len(negatives), 1)
        return {"loss_rpn_class": class_loss / count, "loss_rpn_box": box_loss / count}

    def box_loss(
        self,
        deltas: torch.Tensor,
        goals: torch.Tensor,
        beta: float,
    ) -> torch.Tensor:
        if self.config.box_loss == "l1":
            return F.l1_loss(deltas, goals, reduction="sum")
        return F.smooth_l1_loss(deltas, goals, reduction="sum", beta=beta)

    def head_losses(
        self,
        view: View,
        objects: list[Objects],
        sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        config = self.config
        losses = {}
        proposals = self.propose(
            view,
            sizes,
            config.rpn_candidates_train,
            config.rpn_proposals_train,
        )
        boxes_of_image = [boxes for boxes, _ in proposals]
        for stage, weight in enumerate(config.stage_loss_weights):
            samples = [self.sample(stage, boxes, target) for boxes, target in zip(boxes_of_image, objects)]
            boxes, images = flatten([sampled.boxes for sampled in samples])
            logits, deltas = self.box_heads[stage](self.pool(view.maps, boxes, images, BOX_CELLS))
            labels, goals = self.head_targets(stage, samples, objects)
            is_positive = labels < config.num_labels

            total_weight = weight / max(len(labels), 1)
            class_loss = F.cross_entropy(logits, labels, reduction="sum")
            losses[f"loss_class_{stage}"] = total_weight * class_loss
            positive_deltas = of_class(deltas, labels)[is_positive]
            box_loss = self.box_loss(positive_deltas, goals, HEAD_BETA)
            losses[f"loss_box_{stage}"] = total_weight * box_loss

            if stage + 1 < len(self.box_heads):
                guessed_labels = torch.where(is_positive, labels, logits[:, :-1].argmax(-1))
                guessed_deltas = of_class(deltas, guessed_labels).detach()
                moved = self.box_coders[stage].decode(boxes, guessed_deltas, sizes[images])
                is_proposal = ~torch.cat([sampled.are_objects for sampled in samples])
                boxes_of_image = [moved[(images == image) & is_proposal] for image in range(len(samples))]
        losses.update(self.further_losses(view, samples, objects))
        return losses

    def head_targets(
        self, stage: int, samples: list[Samples], objects: list[Objects]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels of all samples, and the box deltas of those with an object."""
        labels = []
        goals = []
        for sampled, target in zip(samples, objects):
            is_positive = sampled.matched >= 0
            matched_objects = sampled.matched[is_positive]
            sample_labels = torch.full_like(sampled.matched, self.config.num_labels)
            sample_labels[is_positive] = target.labels[matched_objects]
            labels.append(sample_labels)
            goals.append(self.box_coders[stage].encode(sampled.boxes[is_positive], target.boxes[matched_objects]))
        return torch.cat(labels), torch.cat(goals)

    def further_losses(
        self,
        view: View,
        samples: list[Samples],
        objects: list[Objects],
    ) -> dict[str, torch.Tensor]:
        """Return the losses of a subclass's further heads, on the samples of the last stage."""
        return {}

    def sample(
        self,
        stage: int,
        boxes: torch.Tensor,
        target: Objects,
    ) -> Samples:
        """Sample proposals for the loss of a stage; the ground-truth boxes are among them."""
        threshold = self.config.stage_iou_thresholds[stage]
        low_quality = threshold if self.config.roi_match_low_quality else None
        matched = match(
            self.overlaps(target.boxes, boxes),
            threshold,
            threshold,
            low_quality,
        )
        num_objects = len(target.boxes)
        object_indices = torch.arange(num_objects, device=boxes.device)
        matched = torch.cat([object_indices, matched])
        boxes = torch.cat([target.boxes, boxes])
        positives, negatives = sample(matched, self.config.roi_samples, self.config.roi_positive_share)
        sampled = torch.cat([positives, negatives])
        return Samples(boxes[sampled], matched[sampled], are_objects=sampled < num_objects)

    # Detections

    @torch.no_grad()
    def detect(self, views: list[View], sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the detections of images from one view, or from the mean of a view and a mirrored one."""
        proposals, images = flatten(self.propose_by_all(views, sizes))
        moved, probabilities = self.mean_score(views, proposals, images, sizes)
        boxes = []
        scores = []
        labels = []
        fields_of_image = []
        for image, size in enumerate(sizes):
            is_in_image = images == image
            image_boxes, image_scores, image_labels = self.choose(moved[is_in_image], probabilities[is_in_image])
            boxes.append(image_boxes)
            scores.append(image_scores)
            labels.append(image_labels)
            fields_of_image.append(self.write_boxes(image_boxes, size))

        detections = {"scores": pad_sequence(scores, True), "labels": pad_sequence(labels, True, -1)}
        for name in fields_of_image[0]:
            detections[name] = pad_sequence([fields[name] for fields in fields_of_image], True)
        all_boxes, images = flatten(boxes)
        further = self.further_detections(
            views,
            all_boxes,
            images,
            torch.cat(labels),
            sizes,
        )
        counts = [len(image_boxes) for image_boxes in boxes]
        for name, predictions in further.items():
            detections[name] = pad_sequence(predictions.split(counts), True)
        return detections

    def further_detections(
        self,
        views: list[View],
        boxes: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the predictions of a subclass's further heads for all detections of the batch."""
        return {}

    def propose_by_all(
        self,
        views: list[View],
        sizes: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Return the proposals of each image; with two views the best of both."""
        config = self.config
        number = config.rpn_proposals_eval
        proposals = [self.propose(view, sizes, config.rpn_candidates_eval, number) for view in views]
        if len(views) == 1:
            return [boxes for boxes, _ in proposals[0]]
        best_boxes = []
        for (boxes, scores), (mirrored_boxes, mirrored_scores), width in zip(*proposals, sizes[:, 1]):
            boxes = torch.cat([boxes, mirror_boxes(mirrored_boxes, width)])
            scores = torch.cat([scores, mirrored_scores])
            best = torchvision.ops.nms(boxes, scores, config.rpn_nms_threshold)[:number]
            best_boxes.append(boxes[best])
        return best_boxes

    def mean_score(
        self,
        views: list[View],
        boxes: torch.Tensor,
        images: torch.Tensor,
        sizes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the boxes and class probabilities of [`score`], from one view or as the mean of two."""
        widths = sizes[images, 1]
        moved, probabilities = self.score(views[0], boxes, images, sizes)
        for view in views[1:]:
            mirrored_boxes, mirrored_probabilities = self.score(view, mirror_boxes(boxes, widths), images, sizes)
            moved = (moved + mirror_boxes(mirrored_boxes, widths[:, None])) / 2
            probabilities = (probabilities + mirrored_probabilities) / 2
        return moved, probabilities

    def score(
        self,
        view: View,
        boxes: torch.Tensor,
        images: torch.Tensor,
        sizes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the boxes that the last stage predicts, and the class probabilities of all stages.

        The boxes are `(proposals, 1 or num_labels, 4 or 5)`. The probabilities `(proposals, num_labels + 1)` are those
        of the mean of the stages' logits.
        """
        logits_sum = 0.0
        for stage, (head, coder) in enumerate(zip(self.box_heads, self.box_coders)):
            logits, deltas = head(self.pool(view.maps, boxes, images, BOX_CELLS))
            logits_sum = logits_sum + logits
            if stage + 1 < len(self.box_heads):
                guessed_labels = logits[:, :-1].argmax(-1)
                boxes = coder.decode(boxes, of_class(deltas, guessed_labels), sizes[images])
        moved = coder.decode(boxes[:, None], deltas, sizes[images][:, None])
        mean_logits = logits_sum / len(self.box_heads)
        return moved, mean_logits.softmax(-1)

    def choose(
        self, moved: torch.Tensor, probabilities: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return boxes, scores and labels of the detections of an image."""
        is_scored = probabilities[:, :-1] > self.config.score_threshold
        rows, labels = is_scored.nonzero().unbind(-1)
        boxes = of_class(moved[rows], labels)
        scores = probabilities[rows, labels]
        best = self.suppress(boxes, scores, labels)[: self.config.max_detections]
        return boxes[best], scores[best], labels[best]


class ViTPForOrientedObjectDetection(ViTPForObjectDetection):
    """Oriented object detection model: Oriented R-CNN (arXiv 2108.05699), with boxes passed and returned as corners."""

    config: ViTPOrientedObjectDetectionConfig
    config_class = ViTPOrientedObjectDetectionConfig
    box_coder_class = RotatedBoxCoder
    rpn_coder = MidpointCoder()

    def read_boxes(
        self,
        label: dict[str, torch.Tensor],
        size: torch.Tensor,
    ) -> torch.Tensor:
        relative_corners = self.read_field(label, "corners", (4, 2))
        return smallest_rectangles(relative_corners * size.flip(-1))

    def write_boxes(
        self,
        boxes: torch.Tensor,
        size: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        points = corners(boxes)
        fields = super().write_boxes(enclosing_boxes(points), size)
        fields["pred_corners"] = points / size.flip(-1)
        return fields

    def sides(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes[..., 2:4]

    def upright(self, boxes: torch.Tensor) -> torch.Tensor:
        return enclosing_boxes(corners(boxes))

    def overlaps(self, boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
        return rotated_iou(boxes1, boxes2)

    def suppress(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        return rotated_nms(boxes, scores, self.config.nms_threshold, labels)

    def align(
        self,
        features: torch.Tensor,
        boxes: torch.Tensor,
        images: torch.Tensor,
        cells: int,
        scale: float,
    ) -> torch.Tensor:
        return roi_align_rotated(features, boxes, images, cells, scale)


class ViTPForInstanceSegmentation(ViTPForObjectDetection):
    """Instance segmentation model: Mask R-CNN (arXiv 1703.06870), with a mask in each box."""

    config: ViTPInstanceSegmentationConfig
    config_class = ViTPInstanceSegmentationConfig

    def build_further_heads(self, config: ViTPInstanceSegmentationConfig) -> None:
        self.mask_head = MaskHead(config)

    def read_objects(
        self,
        label: dict[str, torch.Tensor],
        size: torch.Tensor,
    ) -> Objects:
        objects = super().read_objects(label, size)
        masks = label.get("masks")
        if masks is None or masks.ndim != 3 or len(masks) != len(objects.boxes):
            shape = None if masks is None else tuple(masks.shape)
            raise ValueError(f"Expected `masks` for {len(objects.boxes)} objects of an image, got the shape {shape}.")
        objects.masks = masks.to(self.device).float()
        return objects

    def further_losses(
        self,
        view: View,
        samples: list[Samples],
        objects: list[Objects],
    ) -> dict[str, torch.Tensor]:
        """Return the mask loss; the targets are the objects' masks, pooled to 28 x 28 and thresholded at a half."""
        boxes_of_image = []
        objects_of_image = []
        for sampled in samples:
            is_positive = sampled.matched >= 0
            boxes_of_image.append(sampled.boxes[is_positive])
            objects_of_image.append(sampled.matched[is_positive])
        boxes, images = flatten(boxes_of_image)
        logits = self.mask_head(self.pool(view.maps, boxes, images, MASK_CELLS))

        labels = []
        goals = []
        for image_boxes, image_objects, target in zip(boxes_of_image, objects_of_image, objects):
            labels.append(target.labels[image_objects])
            # Each mask of an object is an image of its own.
            rois = torch.cat([image_objects[:, None].to(boxes.dtype), image_boxes], -1)
            masks = torchvision.ops.roi_align(
                target.masks[:, None],
                rois,
                logits.shape[-1],
                aligned=True,
            )
            goals.append((masks[:, 0] >= 0.5).float())
        labels = torch.cat(labels)
        goals = torch.cat(goals)
        loss = F.binary_cross_entropy_with_logits(of_class(logits, labels), goals, reduction="sum")
        return {"loss_mask": loss / max(goals.numel(), 1)}

    def further_detections(
        self,
        views: list[View],
        boxes: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        masks = self.masks_in(views[0], boxes, images, labels)
        widths = sizes[images, 1]
        for view in views[1:]:
            mirrored_masks = self.masks_in(view, mirror_boxes(boxes, widths), images, labels)
            masks = (masks + mirrored_masks.flip(-1)) / 2
        return {"pred_masks": masks}

    def masks_in(
        self,
        view: View,
        boxes: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Return mask probabilities `(boxes, 28, 28)`."""
        logits = self.mask_head(self.pool(view.maps, boxes, images, MASK_CELLS))
        return of_class(logits, labels).sigmoid()


def flatten(boxes_of_image: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes of all images in one tensor, and the image index of each."""
    boxes = torch.cat(boxes_of_image)
    counts = [len(image_boxes) for image_boxes in boxes_of_image]
    images = torch.repeat_interleave(torch.tensor(counts, device=boxes.device))
    return boxes, images


def image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Return height and width of each image without its padding, float32 `(batch_size, 2)`."""
    if pixel_mask is None:
        size = pixel_values.new_tensor(pixel_values.shape[-2:], dtype=torch.float32)
        return size.expand(len(pixel_values), 2)
    heights = pixel_mask[:, :, 0].sum(-1)
    widths = pixel_mask[:, 0].sum(-1)
    return torch.stack([heights, widths], -1).float()


def mirror_images(pixel_values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mirror each image from left to right within itself, so that the padding stays on the right."""
    mirrored = pixel_values.clone()
    widths = sizes[:, 1].int().tolist()
    for image, width in enumerate(widths):
        mirrored[image, :, :, :width] = pixel_values[image, :, :, :width].flip(-1)
    return mirrored


def mirror_boxes(boxes: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Mirror upright boxes `(…, 4)` from left to right, in images of widths `(…)`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([widths - x2, y1, widths - x1, y2], -1)


__all__ = ["ViTPForInstanceSegmentation", "ViTPForObjectDetection", "ViTPForOrientedObjectDetection"]
