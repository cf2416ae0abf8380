"""Timed calls for detection: operators and training steps, with those of torchvision and transformers."""

import math
from collections.abc import Callable

import torch
import torchvision
from transformers import DeformableDetrForObjectDetection, PreTrainedModel

from lab.benchmarks import measuring
from modeling_vitp.modeling_vitp_detection import ViTPForObjectDetection, ViTPForOrientedObjectDetection
from modeling_vitp.rotated_boxes import corners, roi_align_rotated, rotated_iou, rotated_nms
from modeling_vitp.tasks.detection.one_stage import on_backbone
from modeling_vitp.training.config import has_fast_bf16

SCENE, NUM_BOXES, NUM_POOLED, NUM_OBJECTS, NUM_LABELS = 1024, 2000, 512, 20, 20
DETECTORS: dict[str, Callable[..., PreTrainedModel]] = {
    "ViTP, Cascade R-CNN": ViTPForObjectDetection.from_backbone,
    "ViTP, Oriented R-CNN": ViTPForOrientedObjectDetection.from_backbone,
    "transformers, Deformable DETR": lambda *args, **options: on_backbone(
        DeformableDetrForObjectDetection, *args, **options
    ),
}


def operators(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the timed calls by name, on 2000 boxes in a scene of 1024 x 1024, in float32.

    The upright boxes have the centers and sides of the rotated ones. Features are 256 maps at stride 4.
    """
    draws = torch.Generator().manual_seed(0)
    centers, sides = torch.rand(NUM_BOXES, 2, generator=draws) * SCENE, torch.rand(NUM_BOXES, 2, generator=draws)
    sides, angles = 10 + 50 * sides, math.pi * (torch.rand(NUM_BOXES, 1, generator=draws) - 0.5)
    scores = torch.rand(NUM_BOXES, generator=draws).to(device)
    rotated = torch.cat([centers, sides, angles], 1).to(device)
    upright = torch.cat([centers - sides / 2, centers + sides / 2], 1).to(device)
    features = torch.randn(1, 256, SCENE // 4, SCENE // 4, generator=draws).to(device)
    trained = features.clone().requires_grad_()
    images = torch.zeros(NUM_POOLED, dtype=torch.long, device=device)
    rois = torch.cat([images[:, None], upright[:NUM_POOLED]], 1)

    def pool_rotated(maps: torch.Tensor) -> torch.Tensor:
        return roi_align_rotated(maps, rotated[:NUM_POOLED], images, 7, 1 / 4)

    def pool_upright(maps: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.roi_align(maps, rois, 7, 1 / 4, sampling_ratio=2, aligned=True)

    def backward(pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(pool(trained).sum(), trained)[0]

    return {
        "overlap of 2000 x 2000, rotated": lambda: rotated_iou(rotated, rotated),
        "overlap of 2000 x 2000, torchvision's upright": lambda: torchvision.ops.box_iou(upright, upright),
        "NMS of 2000, rotated": lambda: rotated_nms(rotated, scores, 0.1),
        "NMS of 2000, torchvision's upright": lambda: torchvision.ops.nms(upright, scores, 0.1),
        "RoIAlign of 512, rotated": lambda: pool_rotated(features),
        "RoIAlign of 512, torchvision's upright": lambda: pool_upright(features),
        "RoIAlign of 512 and its gradient, rotated": lambda: backward(pool_rotated),
        "RoIAlign of 512 and its gradient, torchvision's upright": lambda: backward(pool_upright),
    }


def training_step(detector: str, shape: str, image_size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a step of AdamW on one image of noise with 20 objects, for a random detector on a ViT with adapter.

    Args:
        detector: a key of [`DETECTORS`].
        shape: a key of [`~lab.benchmarks.measuring.SHAPES`].
        image_size: side of the image in pixels, a multiple of 32.
    """
    names = {index: f"class {index}" for index in range(NUM_LABELS)}
    model = DETECTORS[detector](measuring.build_vit(shape, image_size, 16), id2label=names)
    pixels = torch.randn(1, 3, image_size, image_size).to(device)
    boxes = torch.cat([0.2 + 0.6 * torch.rand(NUM_OBJECTS, 2), 0.05 + 0.1 * torch.rand(NUM_OBJECTS, 2)], 1)
    labels = {"class_labels": torch.arange(NUM_OBJECTS) % NUM_LABELS, "boxes": boxes}
    labels["corners"] = corners(torch.cat([boxes, torch.zeros(NUM_OBJECTS, 1)], 1))
    labels = [{name: values.to(device) for name, values in labels.items()}]
    inputs = {"pixel_values": pixels, "labels": labels}
    return measuring.training_step(model, inputs, device, has_fast_bf16(), fused=None)


def time_calls(call: Callable[[], torch.Tensor], runs: int) -> list[float]:
    """Return the seconds of each of `runs` calls, after one warm-up call."""
    times = []
    for _ in range(1 + runs):
        start = measuring.now()
        call()
        times.append(measuring.now() - start)
    return times[1:]
