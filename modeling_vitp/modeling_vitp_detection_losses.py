"""What a detector learns: which anchors and proposals it is trained on, and the losses on them."""

from dataclasses import dataclass

import torch
import torchvision
from torch.nn import functional as F

from .detection_boxes import match, of_class, sample, trained_anchors
from .modeling_vitp_detection_heads import BOX_CELLS

RPN_BETA, HEAD_BETA = 1 / 9, 1.0  # where smooth L1 bends


@dataclass
class View:
    """Images as the neck and the region proposals see them."""

    maps: list[torch.Tensor]  # the four that boxes are pooled from, `(batch_size, channels, height, width)`
    anchors: list[torch.Tensor]  # of all five, `(anchors of a map, 4)`
    logits: torch.Tensor  # (batch_size, anchors)
    deltas: torch.Tensor  # (batch_size, anchors, deltas)


@dataclass
class Objects:
    """What is in an image."""

    labels: torch.Tensor  # (objects,)
    boxes: torch.Tensor  # (objects, 4 or 5), in pixels
    masks: torch.Tensor | None = None  # (objects, height, width)


@dataclass
class Samples:
    """The boxes of an image that a head is trained on."""

    boxes: torch.Tensor  # (n, 4 or 5)
    matched: torch.Tensor  # (n,), the index of an object, or negative for background
    are_objects: torch.Tensor  # (n,), whether a box is an object's own


class DetectionLosses:
    """For [`ViTPForObjectDetection`], whose methods say what a box is."""

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
        """Of what a subclass predicts beside boxes, on the samples of the last stage."""
        return {}

    def sample(self, stage: int, boxes: torch.Tensor, target: Objects) -> Samples:
        """Draws proposals that a stage is trained on; the objects' own boxes are among them."""
        config, threshold = self.config, self.config.stage_iou_thresholds[stage]
        overlaps = self.overlaps(target.boxes, boxes)
        matched = match(overlaps, threshold, threshold, threshold if config.roi_match_low_quality else None)
        own = torch.arange(len(target.boxes), device=boxes.device)
        matched, boxes = torch.cat([own, matched]), torch.cat([target.boxes, boxes])
        chosen = torch.cat(sample(matched, config.roi_samples, config.roi_positive_share))
        return Samples(boxes[chosen], matched[chosen], chosen < len(own))


def flatten(boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The boxes of all images in one tensor, and the image of each."""
    counts = torch.tensor([len(mine) for mine in boxes], device=boxes[0].device)
    return torch.cat(tuple(boxes)), torch.repeat_interleave(counts)
