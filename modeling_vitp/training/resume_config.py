"""The settings that a run is compared by where it goes on: those of every trainer, and those of a pretraining."""

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import nn
from transformers import TrainingArguments

from ..instructions.rows import describe_rows
from .checkpointing import TRAINING_DATA
from .freezing import PROJECTOR, VISION

if TYPE_CHECKING:
    from .vitp_trainer import ViTPTrainer

FREE = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps optim weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm bf16 fp16 per_device_train_batch_size gradient_accumulation_steps"
).split()
FREE_IF_USED = ("lr_scheduler_kwargs", "optim_args", "label_smoothing_factor", "neftune_noise_alpha")
# What makes an adapter, by the names of the options: the fields of PEFT's configuration.
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
LOOKED_AT = 64  # values of each weight
PRETRAINED = re.compile(r"\bencoder\.layer\.|\blanguage_model\.")  # the ViT's and the language model's


def free_settings(args: TrainingArguments) -> dict[str, Any]:
    """What changes the course of a run only. Some are `None` if they are not in use, as in checkpoints that are older
    than these settings.
    """
    free = {name: getattr(args, name) for name in FREE} | {"num_processes": args.world_size}
    return free | {name: getattr(args, name) or None for name in FREE_IF_USED}


def pretraining_settings(trainer: "ViTPTrainer") -> dict[str, dict[str, Any]]:
    """Those of a pretraining, see [`~modeling_vitp.training.checkpointing.check_settings`]."""
    args, collator, image_processor = trainer.args, trainer.data_collator, trainer.processing_class.image_processor
    model = trainer.accelerator.unwrap_model(trainer.model)
    fixed = {
        "seed": args.seed,
        "data_seed": trainer.data_seed,
        "global batch size": trainer.get_total_train_batch_size(args),
        "train_sampling_strategy": args.train_sampling_strategy,
        "dataloader_drop_last": args.dataloader_drop_last,
        "vrl_drop_ratio": collator.vrl_drop_ratio,
        "vrl_apply_prob": collator.vrl_apply_prob,
        # `None` if it is not in use, as in checkpoints that are older than these settings.
        "vrl_warmup_steps": collator.vrl_warmup_steps or None,
        "answer_mask_ratio": collator.answer_mask_ratio or None,
        "task_options": getattr(collator.sample_transform, "settings", None),
        "max_length": collator.max_length,
        "max_patches": image_processor.max_patches,
        "input_spec": image_processor.input_spec,
        "drop_path_rate": model.config.vision_config.drop_path_rate,
        TRAINING_DATA: describe_rows(trainer.train_dataset),
    }
    free = free_settings(args)
    if isinstance(trainer.train_dataset, torch.utils.data.IterableDataset):
        names = "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"
        fixed |= {name: free[name] for name in names} | {"dataloader_num_workers": args.dataloader_num_workers}
    free["loss_type"] = None if args.loss_type == "nll" else args.loss_type
    free["padding_free"] = getattr(collator, "padding_free", False) or None
    trained = frozen_parts(model) | adapter_settings(model)
    if trained["use_peft"]:
        trained["weights under the adapter"] = trainer.weights_under_adapter
    return {"fixed": fixed, "free": free, "model": trained}


def frozen_parts(model: nn.Module) -> dict[str, bool | int]:
    """Which parts train in full, by the options of [`~modeling_vitp.training.freezing.freeze`]; LoRA is none."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    layers = {name: re.search(rf"{VISION}\..*?\blayer\.(\d+)\.", name) for name in trained}
    freeze_vision = not any(VISION in name and layers[name] is None for name in trained)
    rest = [name for name in trained if VISION not in name and PROJECTOR not in name]
    return {
        "freeze_vision": freeze_vision,
        "freeze_projector": not any(PROJECTOR in name for name in trained),
        "freeze_language_model": not rest and not is_peft_model(model),
        "unfreeze_vision_layers": len({match[1] for match in layers.values() if match}) if freeze_vision else 0,
    }


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """What makes the adapter of a model, if it has one."""
    if not is_peft_model(model):
        return {"use_peft": False}
    config = model.active_peft_config
    values = {name: getattr(config, field, None) for name, field in ADAPTER.items()}
    in_order = {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in values.items()}
    return {"use_peft": True} | in_order


def base_fingerprint(model: nn.Module, is_main: bool) -> str:
    """That of every weight that an adapter lies on or stands for, which do not train; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: not weight.requires_grad)


def start_fingerprint(model: nn.Module, is_main: bool) -> str:
    """That of the layers of the ViT and the language model, whatever else is new; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: bool(PRETRAINED.search(name)))


def hash_of_weights(model: nn.Module, is_main: bool, is_chosen: Callable[[str, nn.Parameter], bool]) -> str:
    """A hash of some values of every weight that is chosen, taken by the main process, which has them all."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters() if is_main else []:
        if is_chosen(name, weight):
            name = name.replace("original_module.", "").replace("base_layer.", "")  # as PEFT has wrapped it
            values = weight.detach().flatten()[:: max(1, weight.numel() // LOOKED_AT)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return broadcast_object_list([digest.hexdigest()[:16]])[0]
