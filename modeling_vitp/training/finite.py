"""Training ends at the first step that is not finite, before anything of it is saved."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..convert.finite import not_finite
from .stops import RunStopped

SAMPLES = "sample_ids"
SMALLEST_SCALE = 1.0  # of a GradScaler: gradients that are not finite at it are so by themselves


class NamedBatches:
    """A collator whose batches carry the ids of their rows, under `sample_ids`; [`take_names`] takes them out."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any] | None]) -> dict[str, Any]:
        # Before the collator, which may change the rows.
        names = [str(row["id"]) for row in examples if isinstance(row, dict) and row.get("id") is not None]
        batch = self.collator(examples)
        batch[SAMPLES] = names
        return batch


def take_names(batches: list[dict[str, Any]]) -> list[str]:
    return [name for batch in batches for name in batch.pop(SAMPLES, [])]


class StopAtNotFinite(TrainerCallback):
    """Raises [`RunStopped`] after the first step with a loss or weights that are NaN or infinite.

    A gradient that is not finite makes the weights so; a step that a GradScaler skips does not.

    Attributes:
        losses: of the batches of this step.
        samples: the ids of the rows in them, of this process.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.samples: list[str] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        scaler = self.trainer.accelerator.scaler
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        wrong = not_finite(parameters)
        if wrong:
            what = f"weights are NaN or infinite, in {', '.join(wrong[:3])}{' …' * (len(wrong) > 3)}"
        elif all(loss.isfinite() for loss in self.losses):
            return
        elif scaler is not None and scaler.get_scale() >= SMALLEST_SCALE:
            return
        else:
            what = f"the loss is {sum(loss.item() for loss in self.losses)}"
        names = ", ".join(map(repr, self.samples)) or "without ids"
        raise RunStopped(
            f"Step {state.global_step} is not finite: {what}. Its samples here: {names}. Nothing of it is saved; go on "
            "from the last checkpoint with a smaller learning_rate, more warmup_steps or without these samples."
        )
