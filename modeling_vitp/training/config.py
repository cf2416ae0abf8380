"""Base of the training configurations of all trainers, and the device that they train on."""

import logging
import math
import os
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from transformers import TrainingArguments

from ..command.settings import (
    Interval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    from_mapping,
    read_mapping,
)
from .arguments import RunArguments

logger = logging.getLogger(__name__)
LAUNCHER_PRECISION = "ACCELERATE_MIXED_PRECISION"  # environment variable of `accelerate launch`
HAS_ACTIVATION_CHECKPOINTING = any(field.name == "activation_checkpointing" for field in fields(TrainingArguments))


@dataclass
class CheckpointingOptions:
    """Keys of `activation_checkpointing_kwargs`: those of transformers, and of `torch.utils.checkpoint`."""

    every_n_layers: PositiveInt = 1
    offload: bool = False
    use_reentrant: bool | None = None
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    early_stop: bool = True
    debug: bool = False
    context_fn: Any = None


class BaseConfig(RunArguments):
    """Base of the training configurations of all trainers, a mixin that precedes [`~transformers.TrainingArguments`].

    By default, training runs on the accelerator if the machine has one, and in bf16 on hardware with native bfloat16.
    """

    # Ranges of fields of TrainingArguments, which declares their defaults and help.
    learning_rate: NonNegativeFloat
    weight_decay: NonNegativeFloat
    adam_beta1: Annotated[float, Interval("[0, 1)")]
    adam_beta2: Annotated[float, Interval("[0, 1)")]
    max_grad_norm: NonNegativeFloat
    num_train_epochs: PositiveFloat
    max_steps: Annotated[int, Interval("[-1, inf)")]
    per_device_train_batch_size: PositiveInt
    per_device_eval_batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    dataloader_num_workers: NonNegativeInt
    label_smoothing_factor: Annotated[float, Interval("[0, 1)")]

    unsupported = {
        "auto_find_batch_size": "batches keep their size, so that a run resumes exactly. Set a smaller "
        "per_device_train_batch_size with the same global_batch_size.",
        "restore_callback_states_from_checkpoint": "callbacks of this package are bound to their trainer, which "
        "restores their state anyway. Remove it.",
        "enable_jit_checkpoint": "save_on_signal does the same. Remove it.",
    }

    def __post_init__(self):
        self.remove_unused_columns = False  # the errors of a step name the ids of its samples
        if self.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 for as many as num_train_epochs need, got 0.")
        self._set_precision()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        for name in self._VALID_DICT_FIELDS:
            text = getattr(self, name)
            if isinstance(text, str) and text.startswith("{"):
                read_mapping(name, text)  # transformers parses it too, but its error does not name the option
        if not HAS_ACTIVATION_CHECKPOINTING:
            self._set_gradient_checkpointing()
        super().__post_init__()
        if self.n_gpu > 1:  # nn.DataParallel would cut tiles and rows at different places
            logger.warning("%s GPUs are visible, but one process uses one GPU; accelerate launch uses all.", self.n_gpu)
            self._n_gpu = 1
        if self.activation_checkpointing_kwargs is not None:
            from_mapping(CheckpointingOptions, self.activation_checkpointing_kwargs, "activation_checkpointing_kwargs")
        if self.global_batch_size is not None:
            steps = self.accumulation_on(self.world_size)
            if self.gradient_accumulation_steps not in (1, steps):
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} needs {steps} accumulation steps here, but "
                    f"gradient_accumulation_steps={self.gradient_accumulation_steps} is set. Remove one of them."
                )
            self.gradient_accumulation_steps = steps
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # copy the next batch during computation

    def _set_precision(self) -> None:
        """Set the device, and bfloat16 on hardware with native bfloat16 unless the launcher asks for float16."""
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.fp16 = self.fp16 or os.environ.get(LAUNCHER_PRECISION) == "fp16"
            self.bf16 = not self.fp16 and has_fast_bf16()
        if not (self.bf16 or self.fp16):
            # transformers, accelerate and DeepSpeed would train in the precision of the launcher.
            os.environ[LAUNCHER_PRECISION] = "no"

    def _set_gradient_checkpointing(self) -> None:
        """Set the options of activation checkpointing by the names of transformers before 5.23."""
        kwargs = self.activation_checkpointing_kwargs
        if isinstance(kwargs, str):
            kwargs = read_mapping("activation_checkpointing_kwargs", kwargs)
        if kwargs and "every_n_layers" in kwargs:
            raise ValueError("activation_checkpointing_kwargs: every_n_layers needs transformers 5.23 or newer.")
        self.activation_checkpointing_kwargs = kwargs
        self.gradient_checkpointing_kwargs = kwargs
        self.gradient_checkpointing = self.activation_checkpointing

    def accumulation_on(self, num_processes: int) -> int:
        """Return the gradient accumulation steps for a number of processes.

        Raises:
            ValueError: if `global_batch_size` is not a multiple of the samples per forward pass of all processes.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        samples_at_once = self.train_batch_size * num_processes
        steps, num_left_over = divmod(self.global_batch_size, samples_at_once)
        if num_left_over or not steps:
            nearest = sorted({max(steps, 1) * samples_at_once, (steps + 1) * samples_at_once})
            raise ValueError(
                f"Expected global_batch_size to be a multiple of {samples_at_once}, the samples of {num_processes} "
                f"process(es) with per_device_train_batch_size={self.per_device_train_batch_size}, got "
                f"{self.global_batch_size}. The nearest values are {' and '.join(map(str, nearest))}."
            )
        return steps

    def number_of_steps(self, num_rows: int | None, num_processes: int) -> int | None:
        """Return the optimizer steps of a run, `None` if they depend on an unknown number of rows."""
        if self.max_steps > 0:
            return self.max_steps
        if num_rows is None:
            return None
        batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        num_batches = num_rows // batch_size if self.dataloader_drop_last else math.ceil(num_rows / batch_size)
        return math.ceil(self.num_train_epochs * num_batches)

    @property
    def checkpoint_every(self) -> int:
        """Number N for activation checkpointing of every N-th layer, 0 without activation checkpointing."""
        if not self.activation_checkpointing:
            return 0
        kwargs = self.activation_checkpointing_kwargs or {}
        return kwargs.get("every_n_layers", 1)


def default_device() -> torch.device:
    """Return the accelerator of the machine, or the CPU without one."""
    # `current_accelerator` alone is CUDA for every CUDA build of torch, also on a machine without a GPU.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def has_fast_bf16() -> bool:
    """Return whether the training device has native bfloat16 arithmetic."""
    device = default_device()
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
