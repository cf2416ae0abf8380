"""Which parts of a model train, in full, through LoRA or not at all, and at which learning rate."""

import re

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from ..modeling_vitp import ViTPForConditionalGeneration

POSITIONS, LEVELS = "position_embeddings", "level_embeddings"
VISION, PROJECTOR = "vision_tower", "multi_modal_projector"


def part_of(name: str) -> str:
    """Return the part of the model that a weight belongs to: `vision`, `projector` or `language_model`."""
    return "vision" if VISION in name else "projector" if PROJECTOR in name else "language_model"


def freeze(
    model: ViTPForConditionalGeneration,
    vision: bool = False,
    projector: bool = False,
    language_model: bool = False,
    unfreeze_vision_layers: int = 0,
) -> None:
    """Take the gradients of whole parts away; of a frozen ViT, the last `unfreeze_vision_layers` layers train.

    Raises:
        ValueError: if nothing is left to train, or layers of a ViT that is not frozen are to be unfrozen.
    """
    layers = unfrozen_layers(model, vision, unfreeze_vision_layers)
    model.model.vision_tower.requires_grad_(not vision)
    model.model.multi_modal_projector.requires_grad_(not projector)
    model.model.language_model.requires_grad_(not language_model)
    model.lm_head.requires_grad_(not language_model)
    for index in layers:
        model.model.vision_tower.encoder.layer[index].requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("ViT, projector and language model are all frozen: nothing is left to train.")


def lora_config(
    model: ViTPForConditionalGeneration,
    model_args: ModelConfig,
    freeze_vision: bool = False,
    freeze_projector: bool = False,
    freeze_language_model: bool = False,
    unfreeze_vision_layers: int = 0,
) -> LoraConfig | None:
    """LoRA on the language model; what else trains does so in full, as PEFT's `modules_to_save`.

    `lora_target_modules` are names of modules within the language model, all its linear ones by default. They never
    match the ViT, whose projections have the same names. `None` without `use_peft`.

    Raises:
        ValueError: if the language model is frozen, which is what LoRA would train.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    if freeze_language_model:
        raise ValueError("use_peft puts LoRA on the language model, and freeze_language_model freezes it: give one.")
    targets = model_args.lora_target_modules
    if targets is None or targets == "all-linear":
        modules = model.model.language_model.named_modules()
        targets = {name.split(".")[-1] for name, module in modules if isinstance(module, (nn.Linear, Conv1D))}
    names = "|".join(sorted([targets] if isinstance(targets, str) else targets))
    config.target_modules = rf"model\.language_model\.(.*\.)?({names})"

    layers = unfrozen_layers(model, freeze_vision, unfreeze_vision_layers)
    trained = [f"{VISION}.encoder.layer.{index}" for index in layers] if freeze_vision else [VISION]
    trained += [] if freeze_projector else [PROJECTOR]
    config.modules_to_save = trained + (model_args.lora_modules_to_save or [])
    return config


def unfrozen_layers(model: ViTPForConditionalGeneration, freeze_vision: bool, number: int) -> range:
    """Return the last layers of a frozen ViT that train all the same."""
    depth = model.config.vision_config.num_hidden_layers
    if number and not freeze_vision:
        raise ValueError(f"unfreeze_vision_layers={number} has a meaning only with freeze_vision.")
    if not 0 <= number <= depth:
        raise ValueError(f"unfreeze_vision_layers={number}, but the ViT has {depth} layers.")
    return range(depth - number, depth)


def layer_decay_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    num_layers: int,
    level_embeddings_at_input: bool = False,
    position_weight_decay: bool = False,
) -> list[dict]:
    """Return groups of parameters for an optimizer, as BEiT's fine-tuning has them (arXiv 2106.08254).

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
    """Return 0 for the embeddings of the ViT, 1 + i for its layer i, L + 1 for what is not part of it."""
    layer = re.search(r"(?:^|\.)encoder\.layer\.(\d+)\.", name)
    if layer:
        return 1 + int(layer[1])
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else num_layers + 1
