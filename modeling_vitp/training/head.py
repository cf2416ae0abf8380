"""The head of the language model in TRL's loss: gathered where FSDP2 shards it, and applied to answers alone."""

import functools
import types
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from trl.trainer.utils import add_fused_lm_head

OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's trainer asks of the head


def gather_head_before_loss(model: PreTrainedModel) -> None:
    """Has FSDP2 gather the head for a loss that takes its weight without calling it, and so reduce its gradient.

    TRL's does, and gathers a weight that is still sharded itself; of the gradient of what it has gathered, each process
    then keeps its part of its own alone, and those of the others are lost.
    """

    def gather(*_) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)


def add_head_of_loss(model: PreTrainedModel) -> None:
    """Gives a model the head that it trains with in TRL's trainer and in ours, see [`apply_head_to_answers`]."""
    add_fused_lm_head(model, outputs=OUTPUTS)
    apply_head_to_answers(model)


def apply_head_to_answers(model: PreTrainedModel) -> None:
    """Has TRL's loss score on a CPU the places alone that have a label, as it does on a GPU, and not all of them.

    `log_probs`, `label_mask` and the like are then of these places, of shape `(1, num_labels)`.

    Args:
        model: has TRL's fused head already.
    """
    scored = model.forward.__func__  # of copies too, such as the one that is compiled
    chosen: list[torch.Tensor] = []  # while the forward pass runs, which places are scored

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs
    ) -> Any:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs or labels.device.type != "cpu":
            return scored(self, *args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        labels = labels[:, 1:]
        chosen.append(labels != -100)
        try:
            return scored(self, *args, fused_lm_head=True, shift_labels=labels[chosen[0]][None], **kwargs)
        finally:
            chosen.clear()

    def keep(module: torch.nn.Module, inputs: tuple, outputs: ModelOutput) -> None:
        if chosen:
            outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][chosen[0]][None]

    model.forward = types.MethodType(forward, model)
    model.base_model.register_forward_hook(keep)
