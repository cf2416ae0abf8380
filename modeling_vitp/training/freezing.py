"""Freezing of model parts, LoRA, and learning rates of parameter groups."""

import re
from collections.abc import Collection

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from ..modeling_vitp import ViTPForConditionalGeneration
from ..vision_towers import TOWERS, VisionTower, tower_of
from .arguments import Part

LEVELS = "level_embeddings"
VISION = "vision_tower"
PROJECTOR = "multi_modal_projector"


def part_of(name: str) -> Part:
    """Return the part of the model that a weight belongs to."""
    if VISION in name:
        return "vision"
    if PROJECTOR in name:
        return "projector"
    return "language_model"


def freeze(
    model: ViTPForConditionalGeneration,
    parts: Collection[Part] = (),
    unfreeze_vision_layers: int = 0,
) -> None:
    """Freeze parts of a model, except the last `unfreeze_vision_layers` layers of a frozen ViT.

    Other parts become trainable.

    Raises:
        ValueError: if all parameters are frozen, or if `unfreeze_vision_layers` is set without a frozen ViT.
    """
    unfrozen = unfrozen_layers(model, parts, unfreeze_vision_layers)
    vit = model.model.vision_tower
    tower = tower_of(model.config.vision_config)
    vit.requires_grad_("vision" not in parts)
    model.model.multi_modal_projector.requires_grad_("projector" not in parts)
    model.model.language_model.requires_grad_("language_model" not in parts)
    model.lm_head.requires_grad_("language_model" not in parts)
    layers = vit.get_submodule(tower.layers)
    for index in unfrozen:
        layers[index].requires_grad_(True)
    tower.freeze_unused(vit)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("ViT, projector and language model are all frozen. Leave at least one of them trainable.")


def lora_config(
    model: ViTPForConditionalGeneration,
    model_args: ModelConfig,
    frozen_parts: Collection[Part] = (),
    unfreeze_vision_layers: int = 0,
    lora_on_vision: bool = False,
) -> LoraConfig | None:
    """Return the configuration of LoRA on the language model, or `None` without `use_peft`.

    Other trainable parts are PEFT's `modules_to_save`. `lora_target_modules` are names of modules in the language
    model, by default all linear modules. They never match modules of the ViT, whose projections have the same names.

    Args:
        frozen_parts: parts of the model that are frozen, see [`freeze`].
        unfreeze_vision_layers: number of last layers of a frozen ViT that still train.
        lora_on_vision: whether LoRA is also trained on all linear modules of the ViT's layers, instead of the ViT.

    Raises:
        ValueError: if the language model is frozen and `use_peft` is set, or the ViT and `lora_on_vision`.
    """
    config = get_peft_config(model_args)
    if config is None:
        if lora_on_vision:
            raise ValueError("lora_on_vision has no effect without use_peft. Add --use_peft true.")
        return None
    if "language_model" in frozen_parts:
        raise ValueError("use_peft trains LoRA on the language model. Remove language_model from freeze.")
    names = "|".join(sorted(lora_targets(model, model_args.lora_target_modules)))
    config.target_modules = rf"model\.language_model\.(.*\.)?({names})"

    unfrozen = unfrozen_layers(model, frozen_parts, unfreeze_vision_layers)
    path = f"{VISION}.{tower_of(model.config.vision_config).layers}"
    if lora_on_vision:
        if "vision" in frozen_parts:
            raise ValueError("lora_on_vision trains LoRA on the ViT. Remove it, or vision from freeze.")
        names = "|".join(sorted(linear_names(model.model.get_submodule(path))))
        config.target_modules += rf"|model\.{re.escape(path)}\.\d+\.({names})"
        trained_modules = []
    elif "vision" in frozen_parts:
        trained_modules = [f"{path}.{index}" for index in unfrozen]
    else:
        trained_modules = [VISION]
    if "projector" not in frozen_parts:
        trained_modules.append(PROJECTOR)
    config.modules_to_save = trained_modules + (model_args.lora_modules_to_save or [])
    return config


def lora_targets(model: ViTPForConditionalGeneration, names: list[str] | str | None) -> list[str] | set[str]:
    """Return the names of the modules of the language model to train LoRA on, by default those of all linear ones."""
    if names is not None and names != "all-linear":
        return [names] if isinstance(names, str) else names
    linear_modules = set()
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            linear_modules.add(name.split(".")[-1])
    return linear_modules


def linear_names(layers: nn.ModuleList) -> set[str]:
    """Return the names of the linear modules within a layer."""
    names = set()
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            _, _, name_in_layer = name.partition(".")
            names.add(name_in_layer)
    return names


def freeze_vit(model: PreTrainedModel, lora_r: int = 0) -> None:
    """Freeze the ViT of a task model, and add LoRA of rank `lora_r` to the linear modules of its layers, 0 for none.

    A neck such as ViT-Adapter stays trainable. LoRA's alpha is twice its rank.
    """
    prefix, tower = find_vit(model)
    vit = model.get_submodule(prefix.removesuffix("."))
    prefixes_of_vit = [*tower.embeddings, f"{tower.layers}."]
    if tower.norm is not None:
        prefixes_of_vit.append(f"{tower.norm}.")
    for name, parameter in vit.named_parameters():
        if name.startswith(tuple(prefixes_of_vit)):
            parameter.requires_grad_(False)
    if lora_r:
        layers = vit.get_submodule(tower.layers)
        config = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=sorted(linear_names(layers)))
        inject_adapter_in_model(config, layers)


def lora_rank(model: nn.Module) -> int | None:
    """Return the rank of LoRA in a task model, `None` without LoRA."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            return module.r["default"]
    return None


def unfrozen_layers(model: ViTPForConditionalGeneration, frozen_parts: Collection[Part], number: int) -> range:
    """Return the indices of the last layers of a frozen ViT that still train."""
    depth = model.config.vision_config.num_hidden_layers
    if number and "vision" not in frozen_parts:
        raise ValueError(f"unfreeze_vision_layers={number} needs vision in freeze. Add it, or remove the option.")
    if not 0 <= number <= depth:
        raise ValueError(f"Expected unfreeze_vision_layers in [0, {depth}], the layers of the ViT, got {number}.")
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
    """Return parameter groups with layer-wise learning rate decay, as in BEiT's fine-tuning (arXiv 2106.08254).

    In a ViT with L layers, layer i (from 0) has the learning rate `learning_rate * layer_decay ** (L - i)`. The patch
    and position embeddings have `learning_rate * layer_decay ** (L + 1)`. All other parameters (adapter, heads) have
    `learning_rate`. Parameters of one dimension (norms, biases, gates, LayerScale), position embeddings and the CLS
    token have no weight decay.

    Args:
        model: model that contains a ViT. Frozen parameters are ignored.
        learning_rate: learning rate of the adapter and the heads.
        weight_decay: weight decay of parameters with more than one dimension.
        layer_decay: factor between the learning rates of neighboring layers.
        num_layers: number of layers L.
        level_embeddings_at_input: whether the adapter's level embeddings have the learning rate of the patch
            embeddings, as in ViTP's release.
        position_weight_decay: whether position embeddings have weight decay, as in ViTP's release.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and, for logs, `name`.
    """
    groups = {}
    prefix, tower = find_vit(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if level_embeddings_at_input and name.endswith(LEVELS):
            depth = 0
        elif name.startswith(prefix):
            depth = vit_depth(name.removeprefix(prefix), tower, num_layers)
        else:
            depth = num_layers + 1
        decays = parameter.ndim > 1 and not name.endswith(tower.prefix_tokens)
        if tower.positions and name.endswith(tower.positions) and not position_weight_decay:
            decays = False
        if (depth, decays) not in groups:
            groups[depth, decays] = {
                "params": [],
                "lr": learning_rate * layer_decay ** (num_layers + 1 - depth),
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"depth {depth}" if decays else f"depth {depth}, no weight decay",
            }
        groups[depth, decays]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def find_vit(model: nn.Module) -> tuple[str, VisionTower]:
    """Return the prefix of the parameters of a model's ViT, with a dot at its end, and the family of the ViT."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        config = module.config
        # A model with a `vit_config` has a ViT of another family within, which is found after it.
        if config.model_type in TOWERS and getattr(config, "vit_config", None) is None:
            prefix = f"{name}." if name else ""
            return prefix, TOWERS[config.model_type]
    raise ValueError(f"{type(model).__name__} contains no ViT of a family among {', '.join(TOWERS)}.")


def vit_depth(name: str, tower: VisionTower, num_layers: int) -> int:
    """Return 0 for the embeddings of a ViT, 1 + i for its layer i, and L + 1 for all other parameters."""
    layer = re.match(rf"{re.escape(tower.layers)}\.(\d+)\.", name)
    if layer:
        return 1 + int(layer[1])
    if name.startswith(tower.embeddings):
        return 0
    return num_layers + 1
