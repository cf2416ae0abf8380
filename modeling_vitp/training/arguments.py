"""Arguments that pretraining and fine-tuning share. Importing them loads no heavy library."""

import argparse
from dataclasses import dataclass, field
from typing import Literal

from ..command.paths import Shard
from ..command.settings import (
    JsonText,
    NonNegativeInt,
    PositiveInt,
    Settings,
)

Part = Literal["vision", "projector", "language_model"]  # of a vision-language model
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "none")


def shard(text: str) -> Shard:
    """Read a shard, `NUMBER/COUNT`, as an argparse type."""
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass
class RunArguments(Settings):
    """Arguments of all trainers: precision, batch size, signals, resuming and logged predictions."""

    advanced = ("activation_checkpointing_kwargs", "save_on_signal", "stop_at_step", "allow_changed_data")

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. By default true on hardware with native bfloat16, else false."},
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass, which saves memory and costs time. By default the "
            "value of gradient_checkpointing, which is true for pretraining and false for fine-tuning."
        },
    )
    activation_checkpointing_kwargs: dict | JsonText | None = field(
        default=None,
        metadata={"help": 'Options of activation checkpointing as JSON, such as {"every_n_layers": 2}.'},
    )
    global_batch_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Samples per optimizer step over all processes. gradient_accumulation_steps is computed from it. "
            "By default, gradient_accumulation_steps is used."
        },
    )
    save_on_signal: list[str] = field(
        default_factory=lambda: ["SIGTERM", "SIGINT", "SIGHUP"],
        metadata={
            "help": "Signals that save a checkpoint at the end of the step and stop the run: SIGTERM (sent by a "
            "scheduler), SIGINT (Ctrl-C; a second one stops at once), SIGHUP (a closed terminal, except under nohup), "
            "or none. Default: all three."
        },
    )
    stop_at_step: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Step after which the run saves a checkpoint and stops, as on a signal. The same command without "
            "this option resumes it. By default the run does not stop."
        },
    )
    allow_changed_data: bool = field(
        default=False,
        metadata={"help": "Resume with a warning if the training data have changed. By default, resuming then fails."},
    )

    watch_samples: NonNegativeInt = field(
        default=4,
        metadata={
            "help": "Number of samples whose predictions and features are drawn before training and at each evaluation "
            "(without evaluation, at each checkpoint), to `watch` in output_dir and to report_to. 0: none."
        },
    )

    def __post_init__(self):
        if isinstance(self.save_on_signal, str):
            self.save_on_signal = self.save_on_signal.split()
        super().__post_init__()
        for name in self.save_on_signal:
            if name not in STOP_SIGNALS:
                raise ValueError(f"Expected save_on_signal to be some of {', '.join(STOP_SIGNALS)}, got {name!r}.")
        self.save_on_signal = [name for name in self.save_on_signal if name != "none"]


@dataclass
class PlanArguments(Settings):
    """Arguments of the estimated cost of a run."""

    advanced = ("plan_devices",)

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the estimated cost of the run, for a pretraining with a summary of its mixture, and stop. "
            "Neither data nor Hub nor GPU is needed. Default: false."
        },
    )
    plan_device: str | None = field(
        default=None,
        metadata={
            "help": "GPU of the dry_run estimate: a40, a100, h100, rtx4090 …, or memory and peak speed such as "
            "24GiB,71TFLOP/s. By default the GPU of this machine. Without a GPU a40 for pretraining, as in the paper, "
            "and rtx4090 for fine-tuning, a card of 24 GiB."
        },
    )
    plan_devices: PositiveInt = field(default=1, metadata={"help": "Number of GPUs of the dry_run estimate."})
