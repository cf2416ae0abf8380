"""Detectors on ViTP's maps: Cascade R-CNN, Oriented R-CNN and Mask R-CNN, as in the paper's fine-tuning.

Coordinates, anchors, overlaps, pooling and losses are float32 whatever the dtype of the weights or of autocast: in
bfloat16 places near 1000 px are 4 px apart.
"""

from dataclasses import dataclass

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
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
    centres_and_sides,
    make_anchors,
    nms_by_label,
    of_class,
)
from .modeling_vitp_backbone import pad_to_multiple
from .modeling_vitp_detection_heads import BOX_CELLS, MASK_CELLS, BoxHead, DetectionNeck, MaskHead, RegionProposals
from .modeling_vitp_detection_losses import DetectionLosses, Objects, Samples, View, flatten
from .modeling_vitp_multi_scale import OnMultiScaleBackbone
from .rotated_boxes import (
    corners,
    enclosing_boxes,
    roi_align_rotated,
    rotated_iou,
    rotated_nms,
    smallest_rectangles,
)

FINEST_SIDE = 56  # pixels: boxes from twice this on are pooled from the second map, and so on


@dataclass
class ViTPDetectionOutput(ModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` are given):
        The sum of `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*):
        The losses of the proposals and of each stage, with their weights.
    scores (`torch.Tensor` of shape `(batch_size, detections)`, *optional*):
        Probabilities, falling; 0 where an image has fewer detections than another.
    labels (`torch.LongTensor` of shape `(batch_size, detections)`, *optional*):
        Classes; -1 where an image has fewer detections than another.
    pred_boxes (`torch.Tensor` of shape `(batch_size, detections, 4)`, *optional*):
        Centre x, centre y, width and height, each as a share of the image without its padding. Of oriented objects the
        boxes around them.
    pred_corners (`torch.Tensor` of shape `(batch_size, detections, 4, 2)`, *optional*, oriented objects):
        Corners x, y around each box, as shares too.
    pred_masks (`torch.Tensor` of shape `(batch_size, detections, 28, 28)`, *optional*, instances):
        Probabilities within each box.
    hidden_states, attentions (*optional*):
        Of the ViT, if they are asked for.
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


class ViTPForObjectDetection(OnMultiScaleBackbone, DetectionLosses, PreTrainedModel):
    """Cascade R-CNN (arXiv 1712.00726) on the maps of [`ViTPAdapter`] or [`ViTPFeaturePyramid`].

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
        """For what a subclass predicts beside boxes."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Layers start by Xavier, but for those that have an `initial_std` of their own. Asked of each layer, since
        transformers passes over modules without parameters of their own."""
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
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, in the top left corner.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 in an image, 0 in its padding, which the ViT sees but no box leaves the image for.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                The objects of each image, as in DETR: `class_labels` `(n,)` and `boxes` `(n, 4)`, centre x, centre y,
                width and height as shares of the image without its padding. [`ViTPForOrientedObjectDetection`] has
                `corners` `(n, 4, 2)`, x and y as shares, in place of boxes, and [`ViTPForInstanceSegmentation`] also
                `masks` `(n, height, width)`. An image may have no objects.

        Returns:
            With labels `loss` and `loss_dict`; without labels, or in evaluation mode, the detections.

        Raises:
            ValueError: if labels lack one of these, or an object has no extent or a class that there is not.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        outputs = self.run_backbone(pad_to_multiple(pixel_values, 32, 32), **kwargs)
        view = self.view(outputs.feature_maps)
        found = {}
        if labels is not None:
            if len(labels) != len(sizes):
                raise ValueError(f"there are labels of {len(labels)} images for {len(sizes)} images.")
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

    # Boxes: what [`ViTPForOrientedObjectDetection`] has of its own.

    def read_boxes(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        """An image's objects, `(n, 4)` in pixels."""
        boxes = self.part_of(label, "boxes", (4,)) * size.flip(-1).repeat(2)
        return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)

    def write_boxes(self, boxes: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        """Boxes in pixels as the output has them."""
        return {"pred_boxes": torch.cat(centres_and_sides(boxes), -1) / size.flip(-1).repeat(2)}

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
            found = f"of shape {tuple(label[name].shape)}" if name in label else f"only {', '.join(map(str, label))}"
            raise ValueError(f"labels of an image need {name!r} of shape {('n', *shape)}, but there is {found}.")
        return label[name].to(self.device).float()

    def read_objects(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> Objects:
        labels = self.part_of(label, "class_labels", ()).long()
        boxes = self.read_boxes(label, size)
        if len(labels) != len(boxes):
            raise ValueError(f"an image has {len(labels)} class_labels for {len(boxes)} objects.")
        if not ((labels >= 0) & (labels < self.config.num_labels)).all():
            raise ValueError(f"class_labels {labels.tolist()} are not all from 0 to {self.config.num_labels - 1}.")
        if not (self.sides(boxes) > 0).all():
            raise ValueError(f"an object has no extent, in pixels: {boxes.tolist()}.")
        return Objects(labels, boxes)

    def propose(self, view: View, sizes: torch.Tensor, candidates: int, number: int) -> list[torch.Tensor]:
        """Boxes `(proposals, 4 or 5)` of each image and their scores, without gradient."""
        counts = [len(anchors) for anchors in view.anchors]
        proposals = []
        for logits, deltas, size in zip(view.logits.detach(), view.deltas.detach(), sizes):
            boxes, scores, numbers = [], [], []
            for level, (anchors, logit, delta) in enumerate(
                zip(view.anchors, logits.split(counts), deltas.split(counts))
            ):
                best, places = logit.sigmoid().topk(min(candidates, len(logit)))
                boxes.append(self.rpn_coder.decode(anchors[places], delta[places], size))
                scores.append(best)
                numbers.append(torch.full_like(places, level))
            boxes, scores, numbers = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
            extended = (self.sides(boxes) > 0).all(-1).nonzero()[:, 0]
            boxes, scores, numbers = boxes[extended], scores[extended], numbers[extended]
            kept = nms_by_label(self.upright(boxes), scores, self.config.rpn_nms_threshold, numbers)[:number]
            proposals.append((boxes[kept], scores[kept]))
        return proposals

    def pool(self, maps: list[torch.Tensor], boxes: torch.Tensor, images: torch.Tensor, cells: int) -> torch.Tensor:
        """Features in boxes, `(boxes, channels, cells, cells)`, of the map that fits a box's size."""
        levels = (self.sides(boxes).prod(-1).sqrt() / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled, order = [], []
        for level, (features, stride) in enumerate(zip(maps, STRIDES)):
            chosen = (levels == level).nonzero()[:, 0]
            pooled.append(self.align(features, boxes[chosen], images[chosen], cells, 1 / stride))
            order.append(chosen)
        return torch.cat(pooled)[torch.cat(order).argsort()].to(self.dtype)

    # Detections

    @torch.no_grad()
    def detect(self, views: list[View], sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The detections of images by one view of them, or by the mean of that and a mirrored one."""
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
        """What a subclass predicts beside boxes, for all detections of the batch."""
        return {}

    def propose_by_all(self, views: list[View], sizes: torch.Tensor) -> list[torch.Tensor]:
        """Proposals of each image; of two views the best of both."""
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
        """Where the last stage moves proposals, `(proposals, 1 or num_labels, 4 or 5)`, and the probabilities of the
        mean of all stages' logits, `(proposals, num_labels + 1)`."""
        total = 0.0
        for stage, (head, coder) in enumerate(zip(self.box_heads, self.box_coders)):
            logits, deltas = head(self.pool(view.maps, boxes, images, BOX_CELLS))
            total = total + logits
            if stage + 1 < len(self.box_heads):
                boxes = coder.decode(boxes, of_class(deltas, logits[:, :-1].argmax(-1)), sizes[images])
        moved = coder.decode(boxes[:, None], deltas, sizes[images][:, None])
        return moved, (total / len(self.box_heads)).softmax(-1)

    def choose(self, moved: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Boxes, scores and labels of the detections of an image."""
        rows, labels = (probabilities[:, :-1] > self.config.score_threshold).nonzero().unbind(-1)
        boxes, scores = of_class(moved[rows], labels), probabilities[rows, labels]
        kept = self.suppress(boxes, scores, labels)[: self.config.max_detections]
        return boxes[kept], scores[kept], labels[kept]


class ViTPForOrientedObjectDetection(ViTPForObjectDetection):
    """Oriented R-CNN (arXiv 2108.05699): rotated boxes, which come and go as corners."""

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
    """Mask R-CNN (arXiv 1703.06870): a mask in each box."""

    config: ViTPInstanceSegmentationConfig
    config_class = ViTPInstanceSegmentationConfig

    def build_further_heads(self, config: ViTPInstanceSegmentationConfig) -> None:
        self.mask_head = MaskHead(config)

    def read_objects(self, label: dict[str, torch.Tensor], size: torch.Tensor) -> Objects:
        objects = super().read_objects(label, size)
        masks = label.get("masks")
        if masks is None or masks.ndim != 3 or len(masks) != len(objects.boxes):
            found = "none" if masks is None else f"shape {tuple(masks.shape)}"
            raise ValueError(f"an image has {len(objects.boxes)} objects, but of their masks there is {found}.")
        objects.masks = masks.to(self.device).float()
        return objects

    def further_losses(self, view: View, samples: list[Samples], objects: list[Objects]) -> dict[str, torch.Tensor]:
        """The masks within the boxes of objects, pooled to the size of the predicted ones and cut at a half."""
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
        """Probabilities `(boxes, 28, 28)`."""
        logits = self.mask_head(self.pool(view.maps, boxes, images, MASK_CELLS))
        return of_class(logits, labels).sigmoid()


def image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Height and width of each image without its padding, float32 `(batch_size, 2)`."""
    if pixel_mask is None:
        return pixel_values.new_tensor(pixel_values.shape[-2:], dtype=torch.float32).expand(len(pixel_values), 2)
    return torch.stack([pixel_mask[:, :, 0].sum(-1), pixel_mask[:, 0].sum(-1)], -1).float()


def mirror_images(pixel_values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Left to right, each within itself: the padding stays on the right."""
    mirrored = pixel_values.clone()
    for image, width in enumerate(sizes[:, 1].int().tolist()):
        mirrored[image, :, :, :width] = pixel_values[image, :, :, :width].flip(-1)
    return mirrored


def mirror_boxes(boxes: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Upright boxes `(…, 4)`, left to right, in images of widths `(…)`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([widths - x2, y1, widths - x1, y2], -1)


__all__ = ["ViTPForInstanceSegmentation", "ViTPForObjectDetection", "ViTPForOrientedObjectDetection"]
