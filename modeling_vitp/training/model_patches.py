"""Changes of a model for training: attention without padding, and compiled layers.

FlashAttention has kernels for sequences that lie end to end. PyTorch's attention has none, and a mask over all pairs of
their tokens would cost more than padding does, so each sequence attends by itself.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.dinov3_vit.modeling_dinov3_vit import Dinov3ViTDropPath
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings

from ..modeling_vitp import ViTPModel

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


def checkpoint_activations(model: PreTrainedModel, every_n_layers: int = 1) -> None:
    """Compute the activations of every n-th layer again in the backward pass (of all before transformers 5.23)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(every_n_layers=every_n_layers)
    else:
        model.gradient_checkpointing_enable()


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
