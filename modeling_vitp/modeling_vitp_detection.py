"""Detectors on ViTP's feature maps: Cascade R-CNN, Oriented R-CNN and Mask R-CNN, as in the paper's fine-tuning.

Coordinates, anchors, overlaps, pooling and losses are float32 for any dtype of the weights or of autocast, because
bfloat16 coordinates near 1000 px are 4 px apart.
"""

import math
from dataclasses import dataclass

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

BOX_CELLS, MASK_CELLS = 7, 14  # side of the pooled features, in cells
RPN_BETA, HEAD_BETA = 1 / 9, 1.0  # beta of smooth L1
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
        self.top_down, width = config.neck_top_down, config.neck_channels

        def layer(channels: int, kernel_size: int) -> nn.Module:
            convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=self.top_down)
            return nn.Sequential(convolution, *([] if self.top_down else [ChannelLayerNorm(width, eps=1e-5)]))

        self.laterals = nn.ModuleList(layer(channels, 1) for channels in in_channels)
        self.outputs = nn.ModuleList(layer(width, 3) for _ in in_channels)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        maps = [lateral(features) for lateral, features in zip(self.laterals, maps)]
        if self.top_down:
            for level in reversed(range(len(maps) - 1)):
                maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:])
        maps = [output(features) for output, features in zip(self.outputs, maps)]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


class RegionProposals(nn.Module):
    """Region proposal network (arXiv 1506.01497): objectness and box deltas for each anchor of all maps."""

    def __init__(self, config: ViTPObjectDetectionConfig, num_deltas: int):
        super().__init__()
        width, anchors = config.neck_channels, len(config.anchor_ratios)
        self.num_deltas = num_deltas
        self.convolution = starting(nn.Conv2d(width, width, 3, padding=1), 0.01)
        self.objectness = starting(nn.Conv2d(width, anchors, 1), 0.01)
        self.deltas = starting(nn.Conv2d(width, anchors * num_deltas, 1), 0.01)

    def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(batch_size, anchors)` and deltas `(batch_size, anchors, num_deltas)`, in float32."""
        hidden = [F.relu(self.convolution(features)) for features in maps]
        logits = [self.objectness(features).permute(0, 2, 3, 1).flatten(1) for features in hidden]
        deltas = [self.deltas(features).permute(0, 2, 3, 1).flatten(1) for features in hidden]
        return torch.cat(logits, 1).float(), torch.cat(deltas, 1).unflatten(1, (-1, self.num_deltas)).float()


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
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))
        logits, deltas = self.classifier(hidden), self.regressor(hidden)
        return logits.float(), deltas.unflatten(1, (-1, self.num_deltas)).float()


class MaskHead(nn.Module):
    """Head that predicts a mask for each class from the pooled features of boxes, `(boxes, channels, 14, 14)`."""

    def __init__(self, config: ViTPObjectDetectionConfig):
        super().__init__()
        width = config.neck_channels

        def by_he(layer: nn.Module) -> nn.Module:
            return starting(layer, math.sqrt(2 / (layer.weight.numel() / layer.weight.shape[1])))

        self.convolutions = nn.ModuleList(by_he(nn.Conv2d(width, width, 3, padding=1)) for _ in range(4))
        self.upsample = by_he(nn.ConvTranspose2d(width, width, 2, 2))
        self.classifier = by_he(nn.Conv2d(width, config.num_labels, 1))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return logits `(boxes, num_labels, 28, 28)`, in float32."""
        for convolution in self.convolutions:
            pooled = F.relu(convolution(pooled))
        return self.classifier(F.relu(self.upsample(pooled))).float()


def starting(layer: nn.Module, std: float) -> nn.Module:
    """Set the standard deviation of a layer's initial weights, which otherwise are Xavier-initialized."""
    layer.initial_std = std
    return layer


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
        found = {}
        if labels is not None:
            if len(labels) != len(sizes):
                raise ValueError(f"Expected labels of {len(sizes)} images, got those of {len(labels)}.")
            objects = [self.read_objects(label, size) for label, size in zip(labels, sizes)]
            losses = self.rpn_losses(view, objects, sizes) | self.head_losses(view, objects, sizes)
            found |= {"loss": sum(losses.values()), "loss_dict": losses}
        if labels is None or not self.training:
            views = [view]
            if self.config.flip_test:
                mirrored = self.run_backbone(pad_to_multiple(mirror_images(pixel_values, sizes), 32, 32))
                views.append(self.view(mirrored.feature_maps))
            found |= self.detect(views, sizes)
        return ViTPDetectionOutput(**found, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def view(self, feature_maps: tuple[torch.Tensor, ...]) -> View:
        maps = self.neck(feature_maps)
        shapes = [tuple(features.shape[-2:]) for features in maps]
        anchors = make_anchors(shapes, self.config.anchor_scale, self.config.anchor_ratios, maps[0].device)
        return View([features.float() for features in maps[:4]], anchors, *self.rpn(maps))

    # Box operations, which ViTPForOrientedObjectDetection overrides.

    def read_boxes(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        """Return the boxes of an image's objects, `(n, 4)` in pixels."""
        return center_to_corners_format(self.part_of(label, "boxes", (4,)) * size.flip(-1).repeat(2))

    def write_boxes(self, boxes: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        """Convert boxes in pixels to the fields of the output."""
        return {"pred_boxes": torch.cat(centers_and_sides(boxes), -1) / size.flip(-1).repeat(2)}

    def sides(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes[..., 2:] - boxes[..., :2]

    def upright(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes

    def overlaps(self, boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.box_iou(boxes1, boxes2)

    def suppress(self, boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nms_by_label(boxes, scores, self.config.nms_threshold, labels)

    def align(self, features: torch.Tensor, boxes: torch.Tensor, images: torch.Tensor, cells: int, scale: float):
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], -1)
        return torchvision.ops.roi_align(features, rois, cells, scale, sampling_ratio=0, aligned=True)

    # Objects and samples

    def part_of(self, label: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in label or tuple(label[name].shape[1:]) != shape:
            found = f"shape {tuple(label[name].shape)}" if name in label else f"only {', '.join(map(str, label))}"
            raise ValueError(f"Expected {name!r} of shape {('n', *shape)} in the labels of an image, got {found}.")
        return label[name].to(self.device).float()

    def read_objects(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> Objects:
        labels = self.part_of(label, "class_labels", ()).long()
        boxes = self.read_boxes(label, size)
        if len(labels) != len(boxes):
            raise ValueError(f"Expected {len(boxes)} class_labels, one for each object, got {len(labels)}.")
        if not ((labels >= 0) & (labels < self.config.num_labels)).all():
            raise ValueError(f"Expected class_labels from 0 to {self.config.num_labels - 1}, got {labels.tolist()}.")
        if not (self.sides(boxes) > 0).all():
            raise ValueError(f"Expected boxes with an extent above 0, got {boxes.tolist()} in pixels.")
        return Objects(labels, boxes)

    def propose(self, view: View, sizes: torch.Tensor, candidates: int, number: int) -> list[torch.Tensor]:
        """Return the proposals `(proposals, 4 or 5)` of each image and their scores, without gradient."""
        counts = [len(anchors) for anchors in view.anchors]
        proposals = []
        for logits, deltas, size in zip(view.logits.detach(), view.deltas.detach(), sizes):
            boxes, scores, numbers = [], [], []
            for level, (anchors, logit, delta) in enumerate(
                zip(view.anchors, logits.split(counts), deltas.split(counts))
            ):
                best, indices = logit.sigmoid().topk(min(candidates, len(logit)))
                boxes.append(self.rpn_coder.decode(anchors[indices], delta[indices], size))
                scores.append(best)
                numbers.append(torch.full_like(indices, level))
            boxes, scores, numbers = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
            extended = (self.sides(boxes) > 0).all(-1).nonzero()[:, 0]
            boxes, scores, numbers = boxes[extended], scores[extended], numbers[extended]
            kept = nms_by_label(self.upright(boxes), scores, self.config.rpn_nms_threshold, numbers)[:number]
            proposals.append((boxes[kept], scores[kept]))
        return proposals

    def pool(self, maps: list[torch.Tensor], boxes: torch.Tensor, images: torch.Tensor, cells: int) -> torch.Tensor:
        """Pool features in boxes, `(boxes, channels, cells, cells)`, from the map that fits each box's size."""
        levels = (self.sides(boxes).prod(-1).sqrt() / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled, order = [], []
        for level, (features, stride) in enumerate(zip(maps, STRIDES)):
            chosen = (levels == level).nonzero()[:, 0]
            pooled.append(self.align(features, boxes[chosen], images[chosen], cells, 1 / stride))
            order.append(chosen)
        return torch.cat(pooled)[torch.cat(order).argsort()].to(self.dtype)

    # Losses, with the choice of the anchors and proposals that they are computed on

    def rpn_losses(self, view: View, objects: list[Objects], sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        config, anchors = self.config, torch.cat(view.anchors)
        class_loss, box_loss, count = 0.0, 0.0, 0
        for logits, deltas, target, size in zip(view.logits, view.deltas, objects, sizes):
            trained = trained_anchors(anchors, size, config.rpn_use_outside_anchors)
            overlaps = torchvision.ops.box_iou(self.upright(target.boxes), anchors[trained])
            matched = match(overlaps, config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_negative_iou)
            positives, negatives = sample(matched, config.rpn_samples, config.rpn_positive_share)
            chosen = trained[torch.cat([positives, negatives])]
            wanted = (matched[torch.cat([positives, negatives])] >= 0).float()
            class_loss += F.binary_cross_entropy_with_logits(logits[chosen], wanted, reduction="sum")
            goals = self.rpn_coder.encode(anchors[trained[positives]], target.boxes[matched[positives]])
            box_loss += self.box_loss(deltas[trained[positives]], goals, RPN_BETA)
            count += max(len(positives), 1) + max(len(negatives), 1)
        return {"loss_rpn_class": class_loss / count, "loss_rpn_box": box_loss / count}

    def box_loss(self, deltas: torch.Tensor, goals: torch.Tensor, beta: float) -> torch.Tensor:
        if self.config.box_loss == "l1":
            return F.l1_loss(deltas, goals, reduction="sum")
        return F.smooth_l1_loss(deltas, goals, reduction="sum", beta=beta)

    def head_losses(self, view: View, objects: list[Objects], sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        config, losses = self.config, {}
        proposals = self.propose(view, sizes, config.rpn_candidates_train, config.rpn_proposals_train)
        proposals = [boxes for boxes, _ in proposals]
        for stage, weight in enumerate(config.stage_loss_weights):
            samples = [self.sample(stage, boxes, target) for boxes, target in zip(proposals, objects)]
            boxes, images = flatten([one.boxes for one in samples])
            logits, deltas = self.box_heads[stage](self.pool(view.maps, boxes, images, BOX_CELLS))
            labels, goals = [], []
            for one, target in zip(samples, objects):
                label = torch.full_like(one.matched, config.num_labels)
                positive = one.matched >= 0
                label[positive] = target.labels[one.matched[positive]]
                labels.append(label)
                goals.append(self.box_coders[stage].encode(one.boxes[positive], target.boxes[one.matched[positive]]))
            labels, goals = torch.cat(labels), torch.cat(goals)
            positive = labels < config.num_labels
            total = weight / max(len(labels), 1)
            losses[f"loss_class_{stage}"] = total * F.cross_entropy(logits, labels, reduction="sum")
            chosen = of_class(deltas, labels)[positive]
            losses[f"loss_box_{stage}"] = total * self.box_loss(chosen, goals, HEAD_BETA)
            if stage + 1 < len(self.box_heads):
                guesses = torch.where(positive, labels, logits[:, :-1].argmax(-1))
                moved = self.box_coders[stage].decode(boxes, of_class(deltas, guesses).detach(), sizes[images])
                own = torch.cat([one.are_objects for one in samples])
                proposals = [moved[(images == image) & ~own] for image in range(len(samples))]
        return losses | self.further_losses(view, samples, objects)

    def further_losses(self, view: View, samples: list[Samples], objects: list[Objects]) -> dict[str, torch.Tensor]:
        """Return the losses of a subclass's further heads, on the samples of the last stage."""
        return {}

    def sample(self, stage: int, boxes: torch.Tensor, target: Objects) -> Samples:
        """Sample proposals for the loss of a stage; the ground-truth boxes are among them."""
        config, threshold = self.config, self.config.stage_iou_thresholds[stage]
        overlaps = self.overlaps(target.boxes, boxes)
        matched = match(overlaps, threshold, threshold, threshold if config.roi_match_low_quality else None)
        own = torch.arange(len(target.boxes), device=boxes.device)
        matched, boxes = torch.cat([own, matched]), torch.cat([target.boxes, boxes])
        chosen = torch.cat(sample(matched, config.roi_samples, config.roi_positive_share))
        return Samples(boxes[chosen], matched[chosen], chosen < len(own))

    # Detections

    @torch.no_grad()
    def detect(self, views: list[View], sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the detections of images from one view, or from the mean of a view and a mirrored one."""
        boxes, images = flatten(self.propose_by_all(views, sizes))
        widths = sizes[images, 1]
        moved, probabilities = self.score(views[0], boxes, images, sizes)
        for view in views[1:]:
            other, theirs = self.score(view, mirror_boxes(boxes, widths), images, sizes)
            moved = (moved + mirror_boxes(other, widths[:, None])) / 2
            probabilities = (probabilities + theirs) / 2

        chosen = [self.choose(moved[images == image], probabilities[images == image]) for image in range(len(sizes))]
        boxes, scores, labels = zip(*chosen)
        found = {"scores": pad_sequence(scores, True), "labels": pad_sequence(labels, True, -1)}
        written = [self.write_boxes(mine, size) for mine, size in zip(boxes, sizes)]
        found |= {name: pad_sequence([one[name] for one in written], True) for name in written[0]}
        further = self.further_detections(views, *flatten(boxes), torch.cat(labels), sizes)
        counts = [len(mine) for mine in boxes]
        return found | {name: pad_sequence(values.split(counts), True) for name, values in further.items()}

    def further_detections(
        self, views: list[View], boxes: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the predictions of a subclass's further heads for all detections of the batch."""
        return {}

    def propose_by_all(self, views: list[View], sizes: torch.Tensor) -> list[torch.Tensor]:
        """Return the proposals of each image; with two views the best of both."""
        config = self.config
        number = config.rpn_proposals_eval
        proposals = [self.propose(view, sizes, config.rpn_candidates_eval, number) for view in views]
        if len(views) == 1:
            return [boxes for boxes, _ in proposals[0]]
        joined = []
        for (boxes, scores), (mirrored, their_scores), width in zip(*proposals, sizes[:, 1]):
            boxes = torch.cat([boxes, mirror_boxes(mirrored, width)])
            scores = torch.cat([scores, their_scores])
            joined.append(boxes[torchvision.ops.nms(boxes, scores, config.rpn_nms_threshold)[:number]])
        return joined

    def score(
        self, view: View, boxes: torch.Tensor, images: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the boxes that the last stage predicts, and the class probabilities of all stages.

        The boxes are `(proposals, 1 or num_labels, 4 or 5)`. The probabilities `(proposals, num_labels + 1)` are those
        of the mean of the stages' logits.
        """
        total = 0.0
        for stage, (head, coder) in enumerate(zip(self.box_heads, self.box_coders)):
            logits, deltas = head(self.pool(view.maps, boxes, images, BOX_CELLS))
            total = total + logits
            if stage + 1 < len(self.box_heads):
                boxes = coder.decode(boxes, of_class(deltas, logits[:, :-1].argmax(-1)), sizes[images])
        moved = coder.decode(boxes[:, None], deltas, sizes[images][:, None])
        return moved, (total / len(self.box_heads)).softmax(-1)

    def choose(self, moved: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return boxes, scores and labels of the detections of an image."""
        rows, labels = (probabilities[:, :-1] > self.config.score_threshold).nonzero().unbind(-1)
        boxes, scores = of_class(moved[rows], labels), probabilities[rows, labels]
        kept = self.suppress(boxes, scores, labels)[: self.config.max_detections]
        return boxes[kept], scores[kept], labels[kept]


class ViTPForOrientedObjectDetection(ViTPForObjectDetection):
    """Oriented object detection model: Oriented R-CNN (arXiv 2108.05699), with boxes passed and returned as corners."""

    config: ViTPOrientedObjectDetectionConfig
    config_class = ViTPOrientedObjectDetectionConfig
    box_coder_class = RotatedBoxCoder
    rpn_coder = MidpointCoder()

    def read_boxes(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        return smallest_rectangles(self.part_of(label, "corners", (4, 2)) * size.flip(-1))

    def write_boxes(self, boxes: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        points = corners(boxes)
        return super().write_boxes(enclosing_boxes(points), size) | {"pred_corners": points / size.flip(-1)}

    def sides(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes[..., 2:4]

    def upright(self, boxes: torch.Tensor) -> torch.Tensor:
        return enclosing_boxes(corners(boxes))

    def overlaps(self, boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
        return rotated_iou(boxes1, boxes2)

    def suppress(self, boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return rotated_nms(boxes, scores, self.config.nms_threshold, labels)

    def align(self, features: torch.Tensor, boxes: torch.Tensor, images: torch.Tensor, cells: int, scale: float):
        return roi_align_rotated(features, boxes, images, cells, scale)


class ViTPForInstanceSegmentation(ViTPForObjectDetection):
    """Instance segmentation model: Mask R-CNN (arXiv 1703.06870), with a mask in each box."""

    config: ViTPInstanceSegmentationConfig
    config_class = ViTPInstanceSegmentationConfig

    def build_further_heads(self, config: ViTPInstanceSegmentationConfig) -> None:
        self.mask_head = MaskHead(config)

    def read_objects(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> Objects:
        objects = super().read_objects(label, size)
        masks = label.get("masks")
        if masks is None or masks.ndim != 3 or len(masks) != len(objects.boxes):
            found = "none" if masks is None else f"shape {tuple(masks.shape)}"
            raise ValueError(f"Expected `masks` for {len(objects.boxes)} objects of an image, got {found}.")
        objects.masks = masks.to(self.device).float()
        return objects

    def further_losses(self, view: View, samples: list[Samples], objects: list[Objects]) -> dict[str, torch.Tensor]:
        """Return the mask loss; the targets are the objects' masks, pooled to 28 x 28 and thresholded at a half."""
        boxes, images = flatten([one.boxes[one.matched >= 0] for one in samples])
        logits = self.mask_head(self.pool(view.maps, boxes, images, MASK_CELLS))
        labels, goals = [], []
        for one, target in zip(samples, objects):
            matched = one.matched[one.matched >= 0]
            labels.append(target.labels[matched])
            rois = torch.cat([matched[:, None].to(boxes.dtype), one.boxes[one.matched >= 0]], -1)
            pooled = torchvision.ops.roi_align(target.masks[:, None], rois, logits.shape[-1], aligned=True)
            goals.append((pooled[:, 0] >= 0.5).float())
        chosen, goals = of_class(logits, torch.cat(labels)), torch.cat(goals)
        total = F.binary_cross_entropy_with_logits(chosen, goals, reduction="sum")
        return {"loss_mask": total / max(goals.numel(), 1)}

    def further_detections(
        self, views: list[View], boxes: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        masks = self.masks_in(views[0], boxes, images, labels)
        for view in views[1:]:
            mirrored = self.masks_in(view, mirror_boxes(boxes, sizes[images, 1]), images, labels)
            masks = (masks + mirrored.flip(-1)) / 2
        return {"pred_masks": masks}

    def masks_in(self, view: View, boxes: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return mask probabilities `(boxes, 28, 28)`."""
        logits = self.mask_head(self.pool(view.maps, boxes, images, MASK_CELLS))
        return of_class(logits, labels).sigmoid()


def flatten(boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes of all images in one tensor, and the image index of each."""
    counts = torch.tensor([len(mine) for mine in boxes], device=boxes[0].device)
    return torch.cat(tuple(boxes)), torch.repeat_interleave(counts)


def image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Return height and width of each image without its padding, float32 `(batch_size, 2)`."""
    if pixel_mask is None:
        return pixel_values.new_tensor(pixel_values.shape[-2:], dtype=torch.float32).expand(len(pixel_values), 2)
    return torch.stack([pixel_mask[:, :, 0].sum(-1), pixel_mask[:, 0].sum(-1)], -1).float()


def mirror_images(pixel_values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mirror each image from left to right within itself, so that the padding stays on the right."""
    mirrored = pixel_values.clone()
    for image, width in enumerate(sizes[:, 1].int().tolist()):
        mirrored[image, :, :, :width] = pixel_values[image, :, :, :width].flip(-1)
    return mirrored


def mirror_boxes(boxes: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Mirror upright boxes `(…, 4)` from left to right, in images of widths `(…)`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([widths - x2, y1, widths - x1, y2], -1)


__all__ = ["ViTPForInstanceSegmentation", "ViTPForObjectDetection", "ViTPForOrientedObjectDetection"]
