"""Changes of a model for training: attention without padding, and the head of the language model on answers alone.

FlashAttention has kernels for sequences that lie end to end. PyTorch's attention has none, and a mask over all pairs of
their tokens would cost more than padding does, so each sequence attends by itself.
"""

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.dinov3_vit.modeling_dinov3_vit import Dinov3ViTDropPath
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings

try:  # TRL 1.14 has another loss, which needs no patch
    from trl.trainer.utils import add_fused_lm_head
except ImportError:
    add_fused_lm_head = None

from ..modeling_vitp import ViTPModel

OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's trainer asks of the head
SDPA = "sdpa"
BY_SEQUENCE = "sdpa_by_sequence"
WHOLE, SLIDING = "full_attention", "sliding_attention"  # kinds of layers


def attend_by_sequence(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.IntTensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA; with `cu_seq_lens_q`, int32 of shape `(num_sequences + 1,)`, of each sequence by itself.

    Args:
        query, key, value: of shape `(batch_size, num_heads, num_tokens, head_size)`.

    Returns:
        What was read, of shape `(batch_size, num_tokens, num_heads, head_size)`, and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    read = [sdpa_attention_forward(module, *sequence, None, **kwargs)[0] for sequence in sequences]
    return torch.cat(read, dim=1), None


def mask_unless_end_to_end(
    *args, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs
) -> torch.Tensor | None:
    """transformers' mask for SDPA, but none for sequences that lie end to end, which it finds by their positions."""
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
AttentionMaskInterface.register(BY_SEQUENCE, mask_unless_end_to_end)


def language_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the language model of a [`ViTPForConditionalGeneration`], also of one with an adapter."""
    return next(module for module in model.modules() if isinstance(module, ViTPModel)).language_model


def check_attention(model: nn.Module) -> None:
    """Raise a `ValueError` if a sample in the language model would see those before it in its row."""
    language_model = language_model_of(model)
    config = language_model.config
    used, is_windowed = config._attn_implementation, getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if is_windowed else None
    kinds = set(getattr(config, "layer_types", None) or [WHOLE if window is None else SLIDING])
    if language_model._is_stateful or not kinds <= {WHOLE, SLIDING}:
        raise ValueError(
            f"padding_free=True: the language model, a {config.model_type!r}, has layers that are no attention over "
            "tokens and would carry something from one sample to the next. Leave padding_free out."
        )
    if used != SDPA and "flash" not in used:
        raise ValueError(
            f"padding_free=True: the language model has attn_implementation={used!r}, which does not take several "
            "sequences in one row. Leave padding_free out, or give 'sdpa' or 'flash_attention_2' if the model has it."
        )
    if used == SDPA and SLIDING in kinds:
        raise ValueError(
            f"padding_free=True: the language model, a {config.model_type!r}, has layers that see a window of the "
            "sequence, which sdpa here does not. Leave padding_free out, or give "
            "attn_implementation='flash_attention_2'."
        )


@contextlib.contextmanager
def attention_by_sequence(model: nn.Module) -> Iterator[None]:
    """Let a language model under SDPA take batches without padding in this context, and others as before."""
    language_model = language_model_of(model)
    is_sdpa = language_model.config._attn_implementation == SDPA
    if is_sdpa:
        language_model.set_attn_implementation(BY_SEQUENCE)
    try:
        yield
    finally:
        if is_sdpa:
            language_model.set_attn_implementation(SDPA)


def gather_head_before_loss(model: PreTrainedModel) -> None:
    """Have FSDP2 gather the head for a loss that takes its weight without calling it, and so reduce its gradient.

    TRL's does, and gathers a weight that is still sharded itself; of the gradient of what it has gathered, each process
    then keeps its part of its own alone, and those of the others are lost.
    """

    def gather(*_) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)


def add_head_of_loss(model: PreTrainedModel) -> None:
    """Give a model the head that it trains with in TRL's trainer and in ours, see [`apply_head_to_answers`]."""
    add_fused_lm_head(model, outputs=OUTPUTS)
    apply_head_to_answers(model)


def apply_head_to_answers(model: PreTrainedModel) -> None:
    """Have TRL's loss score only the positions that have a label on a CPU, as it does on a GPU.

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


def compile_layers(model: nn.Module) -> None:
    """Have accelerate compile each layer of a model by itself, and not the whole, in the Trainer that is made next.

    Layers share what was compiled for the first of them, shapes are dynamic, and random numbers are those of a run that
    is not compiled. Evaluation and checkpoints are those of the model itself, under its own names.
    """
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"
    torch._inductor.config.fallback_random = True
    # Stochastic depth has another rate in each layer, which would be compiled anew for it. Compiled embeddings of one
    # tile give gradients that share memory, so that what is accumulated is added to both.
    for module in model.modules():
        if isinstance(module, Dinov3ViTDropPath | InternVLVisionEmbeddings):
            module.forward = torch.compiler.disable(module.forward)
