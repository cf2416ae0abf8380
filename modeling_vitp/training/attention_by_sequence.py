"""Attention in batches without padding: of each sequence by itself, for language models that run under SDPA.

FlashAttention has kernels for sequences that lie end to end. PyTorch's attention has none, and a mask over all pairs of
their tokens would cost more than padding does.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..modeling_vitp import ViTPModel

SDPA = "sdpa"
BY_SEQUENCE = "sdpa_by_sequence"


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
    """That of a [`ViTPForConditionalGeneration`], also one that has an adapter."""
    return next(module for module in model.modules() if isinstance(module, ViTPModel)).language_model


def check_attention(model: nn.Module) -> None:
    """Raises a `ValueError` if attention in the language model cannot be of each sequence by itself."""
    config = language_model_of(model).config
    used = config._attn_implementation
    if "flash" in used:
        return
    if used != SDPA:
        raise ValueError(
            f"padding_free=True: attn_implementation={used!r} does not take several sequences in one row. Leave it "
            "out, for sdpa, or give 'flash_attention_2'."
        )
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        raise ValueError(
            "padding_free=True: the language model has layers whose attention is not over the whole sequence, which "
            "sdpa does not take several sequences in one row for. Give attn_implementation='flash_attention_2'."
        )


@contextlib.contextmanager
def attention_by_sequence(model: nn.Module) -> Iterator[None]:
    """Within it, a language model under SDPA takes batches without padding, and any other as before."""
    language_model = language_model_of(model)
    is_sdpa = language_model.config._attn_implementation == SDPA
    if is_sdpa:
        language_model.set_attn_implementation(BY_SEQUENCE)
    try:
        yield
    finally:
        if is_sdpa:
            language_model.set_attn_implementation(SDPA)
