"""Settings, data and tokenizer that must match when a run goes on from a checkpoint."""

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
# What makes an adapter, by the names of the options: the fields of PEFT's configuration.
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
TRAINING_DATA = "training data"  # the setting that describes, in short, what is trained on
LOOKED_AT = 64  # values of each weight
PRETRAINED = re.compile(r"\bencoder\.layer\.|\blanguage_model\.")  # the ViT's and the language model's


def free_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that may differ, with a warning; some are `None` if they are not in use."""
    free = {name: getattr(args, name) for name in FREE} | {"num_processes": args.world_size}
    return free | {name: getattr(args, name) or None for name in FREE_IF_USED}


def frozen_parts(model: nn.Module) -> dict[str, bool | int]:
    """Return which parts train in full, by the options of [`~modeling_vitp.training.freezing.freeze`]."""
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
    """Return the settings of the adapter of a model, if it has one."""
    if not is_peft_model(model):
        return {"use_peft": False}
    config = model.active_peft_config
    values = {name: getattr(config, field, None) for name, field in ADAPTER.items()}
    in_order = {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in values.items()}
    return {"use_peft": True} | in_order


def base_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the weights under an adapter, which do not train; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: not weight.requires_grad)


def start_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the layers of the ViT and the language model, whatever else is new; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: bool(PRETRAINED.search(name)))


def hash_of_weights(model: nn.Module, is_main: bool, is_chosen: Callable[[str, nn.Parameter], bool]) -> str:
    """Hash some values of every chosen weight, in the main process, which has them all."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters() if is_main else []:
        if is_chosen(name, weight):
            name = name.replace("original_module.", "").replace("base_layer.", "")  # as PEFT has wrapped it
            values = weight.detach().flatten()[:: max(1, weight.numel() // LOOKED_AT)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return broadcast_object_list([digest.hexdigest()[:16]])[0]


def default_warmup(args: Any, data: Dataset | IterableDataset) -> int:
    """Return the steps of VRL's warm-up for a language model from scratch, if they are not given: half of all.

    A run that goes on, perhaps to another number of steps, keeps those that it began with.

    Args:
        args: [`~modeling_vitp.ViTPTrainingConfig`].
        data: what is trained on, which gives the number of steps where `max_steps` does not.
    """
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    record = read_checkpoint_record(checkpoint) if checkpoint is not None else {}
    if record:
        return record["settings"]["fixed"].get("vrl_warmup_steps") or 0
    if args.max_steps > 0 or isinstance(data, IterableDataset):  # of a stream, max_steps is required
        return max(args.max_steps, 0) // 2
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_batches = len(data) // batch_size if args.dataloader_drop_last else math.ceil(len(data) / batch_size)
    return math.ceil(args.num_train_epochs * num_batches) // 2


def check_going_on(
    checkpoint: str | Path,
    settings: dict[str, dict[str, Any]],
    data: dict[str, str | None],
    allow_changed_data: bool = False,
) -> None:
    """Raise a `ValueError` if a run may not go on from a checkpoint, see [`check_resume_settings`] and [`check_data`].

    A checkpoint without a record, such as one of another trainer, is only warned about.
    """
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has weights alone, as save_only_model leaves them, so that the run cannot go on. Start a "
            "new one: give the checkpoint as model_name_or_path, and another output_dir."
        )
    record = read_checkpoint_record(checkpoint)
    if not record:
        logger.warning("%s has no record of its run: whether the run goes on exactly is not known.", checkpoint)
        return
    check_data(checkpoint, record["data"] or {}, data, allow_changed_data)
    if allow_changed_data:
        fixed = {name: value for name, value in settings["fixed"].items() if name != TRAINING_DATA}
        settings = settings | {"fixed": fixed}
    check_resume_settings(checkpoint, record["settings"], settings)


def check_resume_settings(
    checkpoint: str | Path, recorded: dict[str, dict[str, Any]], settings: dict[str, dict[str, Any]]
) -> None:
    """Compare the settings of a run with those that a checkpoint was made under.

    Args:
        settings: `fixed` and `model` (what trains) must match; `free` may differ, with a warning; `given` (what the run
            begins with and how it reads) must match where both know it, which a trainer in Python need not.

    Raises:
        ValueError: names each setting that differs and must match, with both values.
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
        start = " from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": give another output_dir."  # an adapter is no model to start from
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong)}. Restore them to go on; or "
            f"start a new run{start}"
        )
    if differences["free"]:
        logger.warning(
            "Going on from %s with changed settings, so not as a run that never stopped: %s.",
            checkpoint,
            "; ".join(differences["free"]),
        )


def check_data(
    checkpoint: str | Path, recorded: dict[str, str | None], data: dict[str, str | None], may_change: bool = False
) -> None:
    """Compare the fingerprint of a run's data with that of a checkpoint.

    Args:
        may_change: whether other data are only a warning.

    Raises:
        ValueError: names the parts that differ, and what to do.
    """
    unknown = [name for name in data if data[name] is None]
    if unknown:
        logger.warning("Whether %s changed since %s is not known.", ", ".join(map(repr, unknown)), checkpoint)
    names = [name for name in {**recorded, **data} if recorded.get(name) != data.get(name) and name not in unknown]
    if not names:
        return
    changed = f"{', '.join(map(repr, names))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"What is trained on is not what it was: {changed} (contents, sizes or times of files). Restore it to go "
            "on as a run that never stopped; go on all the same with --allow_changed_data; or start a new run from its "
            "weights: give the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Going on with other data, so not as a run that never stopped: %s.", changed)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `ValueError` if the tokenizer is not that of a checkpoint.

    That of a model from scratch is another one if the texts that it is trained on have changed.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored, given = Tokenizer.from_file(str(file)).get_vocab(), tokenizer.get_vocab()
    if stored != given:
        raise ValueError(
            f"The tokenizer of {checkpoint} has {len(stored)} tokens, and the run's {len(given)}, not the same: that "
            "of a model from_scratch is trained on the texts, which have changed. Restore them; or start a new run "
            "from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a `ValueError` if a checkpoint and the model that it was loaded into do not have the same keys."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration that the run was started with."
        )
