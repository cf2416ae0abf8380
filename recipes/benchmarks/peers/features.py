"""Features of a ViT: ours, timm's, and the layer of the original code, as plainly as it can be written."""

import functools
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional as F

from modeling_vitp.configuration_vitp import ViTPVisionConfig
from modeling_vitp.convert.keys import VISION_TOWER, place
from modeling_vitp.modeling_vitp import ViTPVisionModel
from modeling_vitp.recipes.benchmarks.detection_speed import SHAPES, device_here
from modeling_vitp.recipes.benchmarks.peers.turns import Comparison

PATCH = 14
OF_TIMM = (  # original name -> timm's
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    (".ls1", ".ls1.gamma"),
    (".ls2", ".ls2.gamma"),
)


def build_vit(shape: str, image_size: int, dtype: torch.dtype) -> ViTPVisionModel:
    """A ViT as InternViT, with random weights and layer scale, on the accelerator if there is one."""
    torch.manual_seed(0)
    config = ViTPVisionConfig(**SHAPES[shape], image_size=[image_size] * 2, patch_size=[PATCH] * 2, attention_bias=True)
    return ViTPVisionModel(config).to(device_here(), dtype).eval()


def original_weights(vit: ViTPVisionModel) -> dict[str, torch.Tensor]:
    """The weights under the names of InternViT's own code, with queries, keys and values in one."""
    found = {}
    for name, tensor in vit.state_dict().items():
        key, part, _ = place(VISION_TOWER + name, "original_vision")
        found.setdefault(key, {})[part] = tensor
    return {key: torch.cat([parts[part] for part in sorted(parts)]) for key, parts in found.items()}


def timm_vit(vit: ViTPVisionModel) -> nn.Module:
    """timm's ViT of the same shape, with the same weights."""
    from timm.models.vision_transformer import VisionTransformer

    config = vit.config
    peer = VisionTransformer(
        img_size=config.image_size[0],
        patch_size=PATCH,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        init_values=config.layer_scale_init_value,
        num_classes=0,
        global_pool="",
        final_norm=False,
    )
    weights = {}
    for key, tensor in original_weights(vit).items():
        for theirs, name in OF_TIMM:
            key = key.replace(theirs, name)
        weights[key] = tensor
    peer.load_state_dict(weights)
    return peer.to(vit.device, vit.dtype).eval()


def plain_features(pixels: torch.Tensor, weights: dict[str, torch.Tensor], num_heads: int, depth: int, eps: float):
    """The ViT's last hidden states, in the arithmetic of InternViT's own code without FlashAttention.

    Args:
        pixels: `(batch, channels, height, width)`, of the size of the table of positions.
        weights: [`original_weights`].

    Returns:
        `(batch, 1 + patches, hidden_size)`.
    """

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def normed(states: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(states, states.shape[-1:], *of(name), eps)

    patches = F.conv2d(pixels, *of("embeddings.patch_embedding"), stride=PATCH).flatten(2).transpose(1, 2)
    first = weights["embeddings.class_embedding"].expand(len(pixels), -1, -1)
    states = torch.cat([first, patches], 1) + weights["embeddings.position_embedding"]
    for index in range(depth):
        layer = f"encoder.layers.{index}"
        fused = F.linear(normed(states, f"{layer}.norm1"), *of(f"{layer}.attn.qkv"))
        queries, keys, values = fused.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        states = states + F.linear(attended, *of(f"{layer}.attn.proj")) * weights[f"{layer}.ls1"]
        hidden = F.gelu(F.linear(normed(states, f"{layer}.norm2"), *of(f"{layer}.mlp.fc1")))
        states = states + F.linear(hidden, *of(f"{layer}.mlp.fc2")) * weights[f"{layer}.ls2"]
    return states


def features(shape: str, dtype: torch.dtype, image_size: int = 448) -> Comparison:
    """Features of one image.

    Args:
        shape: one of [`~modeling_vitp.recipes.benchmarks.detection_speed.SHAPES`].
        image_size: side in pixels, a multiple of 14.
    """
    vit = build_vit(shape, image_size, dtype)
    config, weights = vit.config, original_weights(vit)
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(vit.device, dtype)
    plain = functools.partial(
        plain_features, pixels, weights, config.num_attention_heads, config.num_hidden_layers, config.layer_norm_eps
    )
    calls = {"ViTP, ViTPVisionModel": lambda: vit(pixels).last_hidden_state}
    absent = {}
    if find_spec("timm"):
        peer = timm_vit(vit)
        calls["timm, VisionTransformer"] = lambda: peer.forward_features(pixels)
    else:
        absent["timm, VisionTransformer"] = "timm"
    calls["the original's layers, plainly"] = plain

    def check(results: dict[str, torch.Tensor]) -> None:
        ours, *others = results.values()
        for other in others:
            apart = (other - ours).float().abs().max() / ours.float().abs().max()
            assert apart < (1e-5 if dtype == torch.float32 else 5e-2), (
                f"features are apart by {apart:.1e} of the largest"
            )

    calls = {name: torch.inference_mode()(call) for name, call in calls.items()}
    return Comparison(f"features of an image of {image_size}²", calls, check, absent)
