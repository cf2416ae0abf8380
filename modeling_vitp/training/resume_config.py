"""Settings, data and tokenizer that must match on resume."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from .checkpointing import last_checkpoint, read_checkpoint_record
from .freezing import PROJECTOR, VISION

logger = logging.getLogger(__name__)
FREE = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps optim weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm bf16 fp16 per_device_train_batch_size gradient_accumulation_steps"
).split()
FREE_IF_USED = ("lr_scheduler_kwargs", "optim_args", "label_smoothing_factor", "neftune_noise_alpha")
# Options of an adapter and the fields of PEFT's configuration.
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
TRAINING_DATA = "training data"  # name of the setting that describes the training rows
HASHED_VALUES = 64  # approximate number of hashed values of each weight
VISION_LAYER = re.compile(rf"\b{VISION}\..*?\b(?:layer|layers|blocks)\.(\d+)\.")  # of any family of ViT
PRETRAINED = re.compile(rf"{VISION_LAYER.pattern}|\bencoder\.layer\.|\blanguage_model\.")


def free_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that may differ on resume with a warning; unused settings are `None`."""
    free = {name: getattr(args, name) for name in FREE} | {"num_processes": args.world_size}
    return free | {name: getattr(args, name) or None for name in FREE_IF_USED}


def frozen_parts(model: nn.Module) -> dict[str, bool | int]:
    """Return the frozen parts of a model as arguments of [`~modeling_vitp.training.freezing.freeze`]."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    layers = {name: VISION_LAYER.search(name) for name in trained}
    freeze_vision = not any(VISION in name and layers[name] is None for name in trained)
    rest = [name for name in trained if VISION not in name and PROJECTOR not in name]
    return {
        "freeze_vision": freeze_vision,
        "freeze_projector": not any(PROJECTOR in name for name in trained),
        "freeze_language_model": not rest and not is_peft_model(model),
        "unfreeze_vision_layers": len({match[1] for match in layers.values() if match}) if freeze_vision else 0,
    }


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model's adapter, or `{"use_peft": False}` without one."""
    if not is_peft_model(model):
        return {"use_peft": False}
    config = model.active_peft_config
    values = {name: getattr(config, field, None) for name, field in ADAPTER.items()}
    in_order = {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in values.items()}
    return {"use_peft": True} | in_order


def base_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the frozen base weights of a model with an adapter, see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: not weight.requires_grad)


def start_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the layers of the ViT and the language model, which are never newly initialized; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: bool(PRETRAINED.search(name)))


def hash_of_weights(model: nn.Module, is_main: bool, is_chosen: Callable[[str, nn.Parameter], bool]) -> str:
    """Hash some values of every chosen weight in the main process, and return the hash in all processes."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters() if is_main else []:
        if is_chosen(name, weight):
            name = name.replace("original_module.", "").replace("base_layer.", "")  # names in modules wrapped by PEFT
            values = weight.detach().flatten()[:: max(1, weight.numel() // HASHED_VALUES)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return broadcast_object_list([digest.hexdigest()[:16]])[0]


def default_warmup(args: Any, data: Dataset | IterableDataset) -> int:
    """Return the default steps of VRL's warm-up for a language model from scratch, half of all steps.

    A resumed run keeps the number of the original run, even if the number of steps has changed.

    Args:
        args: [`~modeling_vitp.ViTPTrainingConfig`].
        data: training data, which determine the number of steps without `max_steps`.
    """
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    record = read_checkpoint_record(checkpoint) if checkpoint is not None else {}
    if record:
        return record["settings"]["fixed"].get("vrl_warmup_steps") or 0
    if args.max_steps > 0 or isinstance(data, IterableDataset):  # streams require max_steps
        return max(args.max_steps, 0) // 2
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_batches = len(data) // batch_size if args.dataloader_drop_last else math.ceil(len(data) / batch_size)
    return math.ceil(args.num_train_epochs * num_batches) // 2


def check_resume(
    checkpoint: str | Path,
    settings: dict[str, dict[str, Any]],
    data: dict[str, str | None],
    allow_changed_data: bool = False,
) -> None:
    """Raise a `ValueError` if a run cannot resume from a checkpoint.

    Settings are checked by [`check_resume_settings`], data by [`check_data`]. For a checkpoint without a record, such
    as that of another trainer, a warning is logged.
    """
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has only weights (save_only_model), so the run cannot resume. Start a new run: set the "
            "checkpoint as model_name_or_path, and another output_dir."
        )
    record = read_checkpoint_record(checkpoint)
    if not record:
        logger.warning("%s has no record of its run. Settings and data cannot be compared.", checkpoint)
        return
    check_data(checkpoint, record["data"] or {}, data, allow_changed_data)
    if allow_changed_data:
        fixed = {name: value for name, value in settings["fixed"].items() if name != TRAINING_DATA}
        settings = settings | {"fixed": fixed}
    check_resume_settings(checkpoint, record["settings"], settings)


def check_resume_settings(
    checkpoint: str | Path, recorded: dict[str, dict[str, Any]], settings: dict[str, dict[str, Any]]
) -> None:
    """Compare the settings of a run with the settings of a checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        recorded: settings of the checkpoint.
        settings: settings of the run. `fixed` and `model` (trainable parts) must match; `free` may differ, with a
            warning; `given` (initial weights and input spec) must match if both have the setting.

    Raises:
        ValueError: if settings that must match differ; the message names them with both values.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the record
    differences = {
        kind: [
            f"{name} was {recorded.get(kind, {}).get(name)!r} and is {value!r}"
            for name, value in values.items()
            if recorded.get(kind, {}).get(name) != value and (kind != "given" or name in recorded.get(kind, {}))
        ]
        for kind, values in settings.items()
    }
    wrong = [item for kind in ("fixed", "model", "given") for item in differences.get(kind, [])]
    if wrong:
        start = " from its weights: set the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": set another output_dir."  # a run cannot start from an adapter
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong)}. Restore them to resume, or "
            f"start a new run{start}"
        )
    if differences["free"]:
        logger.warning(
            "Resuming from %s with changed settings; the result differs from an uninterrupted run: %s.",
            checkpoint,
            "; ".join(differences["free"]),
        )


def check_data(
    checkpoint: str | Path, recorded: dict[str, str | None], data: dict[str, str | None], may_change: bool = False
) -> None:
    """Compare the fingerprint of a run's data with the fingerprint of a checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        recorded: fingerprint of the checkpoint.
        data: fingerprint of the run.
        may_change: whether changed data cause a warning instead of an error.

    Raises:
        ValueError: if data have changed; the message names the changed parts.
    """
    unknown = [name for name in data if data[name] is None]
    if unknown:
        logger.warning("Changes of %s since %s cannot be detected.", ", ".join(map(repr, unknown)), checkpoint)
    names = [name for name in {**recorded, **data} if recorded.get(name) != data.get(name) and name not in unknown]
    if not names:
        return
    changed = f"{', '.join(map(repr, names))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"The training data have changed: {changed} (contents, sizes or times of files). Restore the data to "
            "resume exactly, or resume with the changed data by --allow_changed_data, or start a new run from the "
            "weights: set the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Resuming with changed data; the result differs from an uninterrupted run: %s.", changed)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `ValueError` if the tokenizer differs from that of a checkpoint.

    The tokenizer of a model from scratch changes if its training texts change.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored, current = Tokenizer.from_file(str(file)).get_vocab(), tokenizer.get_vocab()
    if stored != current:
        raise ValueError(
            f"The tokenizer of {checkpoint} ({len(stored)} tokens) differs from that of the run ({len(current)} "
            "tokens). With from_scratch it is trained on the texts, which have changed. Restore them, or start a new "
            "run from the weights: set the checkpoint as model_name_or_path, and another output_dir."
        )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a `ValueError` if a checkpoint has missing or unexpected keys for a model."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not match the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration of the original run."
        )
