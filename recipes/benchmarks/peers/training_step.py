"""A step of fine-tuning for segmentation: ours, and transformers' UPerNet on the same backbone and on DINOv2."""

import copy

import torch
from transformers import Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation

from modeling_vitp.modeling_vitp_dense import ViTPForSemanticSegmentation
from modeling_vitp.recipes.benchmarks.detection_speed import SHAPES, device_here
from modeling_vitp.recipes.benchmarks.peers.features import build_vit
from modeling_vitp.recipes.benchmarks.peers.turns import Comparison

NUM_LABELS, BATCH = 7, 2  # batch norm of pooled maps needs two images
OURS, SAME = "ViTP, UPerNet on ViT-Adapter", "transformers' UPerNet on the same ViT-Adapter"
PYRAMID, DINOV2 = "ViTP, UPerNet on the feature pyramid", "transformers' UPerNet on DINOv2"


def on_dinov2(shape: str, image_size: int, **head) -> UperNetForSemanticSegmentation:
    """DINOv2 has one map, at the stride of its patches of 14 pixels, for each of four layers."""
    settings = dict(SHAPES[shape])
    settings["mlp_ratio"] = settings.pop("intermediate_size") // settings["hidden_size"]
    depth = settings["num_hidden_layers"]
    stages = [f"stage{depth * part // 4}" for part in (1, 2, 3, 4)]
    backbone = Dinov2Config(**settings, image_size=image_size, patch_size=14, out_features=stages)
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=NUM_LABELS, **head))


def on_same(model: ViTPForSemanticSegmentation, **head) -> UperNetForSemanticSegmentation:
    """transformers' model with the backbone, the heads and the weights of ours."""
    peer = UperNetForSemanticSegmentation(UperNetConfig(num_labels=NUM_LABELS, **head))
    peer.backbone = copy.deepcopy(model.backbone)
    peer.decode_head, peer.auxiliary_head = copy.deepcopy(model.decode_head), copy.deepcopy(model.auxiliary_head)
    return peer


def training_step(
    shape: str, dtype: torch.dtype, image_size: int = 224, adapter: dict | None = None, **head
) -> Comparison:
    """Forward, backward and AdamW on two images; in bfloat16 by autocast, as in training.

    Args:
        shape: of the ViT, one of [`~modeling_vitp.recipes.benchmarks.detection_speed.SHAPES`].
        image_size: side in pixels, a multiple of 224.
        adapter, head: settings of the ViT-Adapter and of UPerNet.
    """
    device, vit = device_here(), build_vit(shape, image_size, torch.float32)
    ours = ViTPForSemanticSegmentation.from_backbone(
        vit, image_size=image_size, backbone_kwargs=adapter, num_labels=NUM_LABELS, **head
    )
    models = {
        OURS: ours,
        SAME: on_same(ours, **head),
        PYRAMID: ViTPForSemanticSegmentation.from_backbone(
            vit, "pyramid", image_size=image_size, num_labels=NUM_LABELS, **head
        ),
        DINOV2: on_dinov2(shape, image_size, **head),
    }
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, image_size, image_size, generator=draws).to(device)
    labels = torch.randint(NUM_LABELS, (BATCH, image_size, image_size), generator=draws).to(device)

    def step_of(model: torch.nn.Module):
        model = model.to(device).train()
        optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-5, fused=True)

        def step() -> torch.Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(pixel_values=pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def check(results: dict[str, torch.Tensor]) -> None:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # ours are summed in float32
        assert abs(results[SAME] - results[OURS]) < tolerance * results[OURS], "the losses of the same model differ"

    calls = {name: step_of(model) for name, model in models.items()}
    return Comparison(f"a step on {BATCH} images of {image_size}²", calls, check)
