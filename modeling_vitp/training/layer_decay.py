"""Layer-wise decay of the learning rate: the nearer a layer is to the input, the less it moves."""

import re

from torch import nn

POSITIONS, LEVELS = "position_embeddings", "level_embeddings"


def layer_decay_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    num_layers: int,
    level_embeddings_at_input: bool = False,
    position_weight_decay: bool = False,
) -> list[dict]:
    """Groups of parameters for an optimizer, as BEiT's fine-tuning has them (arXiv 2106.08254).

    Of a ViT with L layers, layer i (from 0) learns at `learning_rate * layer_decay ** (L - i)`, its patch and position
    embeddings at `learning_rate * layer_decay ** (L + 1)`, and everything else (adapter, heads) at `learning_rate`.
    Weights of one dimension (norms, biases, gates, LayerScale), position embeddings and the CLS token have no weight
    decay.

    Args:
        model: one with the ViT's `embeddings` and `encoder.layer` somewhere in it. What does not train is left out.
        num_layers: L.
        level_embeddings_at_input: whether the adapter's level embeddings learn at the rate of the patch embeddings, and
        position_weight_decay: whether position embeddings have weight decay, both as in ViTP's release.

    Returns:
        One dictionary for each group that is not empty: `params`, `lr`, `weight_decay`, and for logs `name`.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = vit_depth(name, num_layers)
        if level_embeddings_at_input and name.endswith(LEVELS):
            depth = 0
        decays = parameter.ndim > 1 and not name.endswith("cls_token")
        decays = decays and (position_weight_decay or not name.endswith(POSITIONS))
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (num_layers + 1 - depth),
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"depth {depth}{'' if decays else ', no weight decay'}",
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def vit_depth(name: str, num_layers: int) -> int:
    """0 for the embeddings of the ViT, 1 + i for its layer i, L + 1 for what is not part of it."""
    layer = re.search(r"(?:^|\.)encoder\.layer\.(\d+)\.", name)
    if layer:
        return 1 + int(layer[1])
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else num_layers + 1
