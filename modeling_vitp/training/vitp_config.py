"""Settings of the pretraining, and those that all trainers share."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from .arguments import RunArguments, VRLArguments, check_type, check_within, read_mapping

HAS_ACTIVATION_CHECKPOINTING = any(field.name == "activation_checkpointing" for field in fields(TrainingArguments))


class BaseConfig(RunArguments):
    """Base of the settings of all trainers, before [`~transformers.TrainingArguments`]: trains on the accelerator if
    there is one, and in bf16 wherever the hardware has it.
    """

    limits = {
        "learning_rate": "[0, inf)",
        "weight_decay": "[0, inf)",
        "adam_beta1": "[0, 1)",
        "adam_beta2": "[0, 1)",
        "max_grad_norm": "[0, inf)",
        "num_train_epochs": "(0, inf)",
        "max_steps": "[-1, inf)",
        "per_device_train_batch_size": "[1, inf)",
        "per_device_eval_batch_size": "[1, inf)",
        "gradient_accumulation_steps": "[1, inf)",
        "dataloader_num_workers": "[0, inf)",
    }

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        for name in self._VALID_DICT_FIELDS:
            text = getattr(self, name)
            if isinstance(text, str) and text.startswith("{"):
                read_mapping(name, text)  # transformers reads it again, and would not say which option is no JSON
        if not HAS_ACTIVATION_CHECKPOINTING:  # transformers before 5.23
            kwargs = self.activation_checkpointing_kwargs
            kwargs = read_mapping("activation_checkpointing_kwargs", kwargs) if isinstance(kwargs, str) else kwargs
            if "every_n_layers" in (kwargs or {}):
                raise ValueError("activation_checkpointing_kwargs: every_n_layers needs transformers 5.23 or newer.")
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs
            self.gradient_checkpointing = self.activation_checkpointing
        super().__post_init__()
        check_type("activation_checkpointing_kwargs", self.activation_checkpointing_kwargs, dict[str, Any] | None)
        every = (self.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        check_type("every_n_layers", every, int)
        check_within("every_n_layers", every, "[1, inf)")
        if self.global_batch_size is not None:
            steps = self.accumulation_on(self.world_size)
            if self.gradient_accumulation_steps not in (1, steps):
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} makes {steps} accumulation steps here, and "
                    f"gradient_accumulation_steps={self.gradient_accumulation_steps} is given: leave one of them out."
                )
            self.gradient_accumulation_steps = steps
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # the next batch comes while one is computed

    def accumulation_on(self, num_processes: int) -> int:
        """Return the batches of a process in an optimizer step, on so many processes.

        Raises:
            ValueError: if they cannot make up `global_batch_size`.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = self.train_batch_size * num_processes
        steps, rest = divmod(self.global_batch_size, at_once)
        if rest or not steps:
            nearest = sorted({max(steps, 1) * at_once, (steps + 1) * at_once})
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of the {at_once} samples that "
                f"{num_processes} process(es) take at once (per_device_train_batch_size="
                f"{self.per_device_train_batch_size}). The nearest are {' and '.join(map(str, nearest))}."
            )
        return steps

    @property
    def checkpoint_every(self) -> int:
        """Return N where every N-th layer computes its activations again in the backward pass; 0 for none."""
        kwargs = self.activation_checkpointing_kwargs or {}
        return kwargs.get("every_n_layers", 1) if self.activation_checkpointing else 0


@dataclass
class ViTPTrainingConfig(VRLArguments, BaseConfig, SFTConfig):
    """[`~trl.SFTConfig`] with VRL, and defaults for ViTP: 4,096 tokens, and bf16 wherever the hardware has it."""

    def __post_init__(self):
        # Rows are encoded by the collator, which needs the images; TRL would tokenise a text-only set beforehand.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip would train on rows twice, and skipping reads no image: leave it out.")
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False: only answers are learned here, never questions: leave it out."
            )
        if self.eval_packing:
            raise ValueError("eval_packing=True: rows with images are not packed: leave it out.")
        if self.padding_free and self.neftune_noise_alpha:
            raise ValueError(
                "padding_free=True: neftune_noise_alpha would be scaled by the length of all samples, not of each: "
                "leave one out."
            )
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True: the loss computes only logits of answers already: leave it out.")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is for classes of images: leave it out.")
        self.loss_type = self.loss_type or "nll"  # TRL 1.14 would replace the model's forward pass
        super().__post_init__()
        if self.activation_offloading and self.use_cpu:
            raise ValueError(
                "activation_offloading=True: there is no accelerator to take activations from: leave it out."
            )
        # One process would read batches and slice all their tensors alike, but tiles are not rows.
        self.accelerator_config.dispatch_batches = False


def has_fast_bf16() -> bool:
    """Return whether the device that training will run on computes in bfloat16 natively."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type != "cuda" or torch.cuda.is_bf16_supported(False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
