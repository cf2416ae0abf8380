"""Which parts of the model train: in full, through LoRA, or not at all."""

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from ..modeling_vitp import ViTPForConditionalGeneration

VISION, PROJECTOR = "vision_tower", "multi_modal_projector"


def freeze(
    model: ViTPForConditionalGeneration,
    vision: bool = False,
    projector: bool = False,
    language_model: bool = False,
    unfreeze_vision_layers: int = 0,
) -> None:
    """Takes the gradients of whole parts away; of a frozen ViT, the last `unfreeze_vision_layers` layers train.

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
    """The last layers of a frozen ViT, which train all the same."""
    depth = model.config.vision_config.num_hidden_layers
    if number and not freeze_vision:
        raise ValueError(f"unfreeze_vision_layers={number} has a meaning only with freeze_vision.")
    if not 0 <= number <= depth:
        raise ValueError(f"unfreeze_vision_layers={number}, but the ViT has {depth} layers.")
    return range(depth - number, depth)
