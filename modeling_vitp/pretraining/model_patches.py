"""Changes of a model for training: attention without padding, and compiled layers.

FlashAttention has kernels for concatenated sequences. PyTorch's SDPA has none, and a mask over all pairs of tokens
would cost more than padding. Therefore attention is computed for each sequence separately.
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
WHOLE = "full_attention"  # types of layers
SLIDING = "sliding_attention"


def attend_by_sequence(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.IntTensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute SDPA as transformers does, separately for each sequence if `cu_seq_lens_q` is given.

    Args:
        module: attention module.
        query: queries of shape `(batch_size, num_heads, num_tokens, head_size)`.
        key: keys of shape `(batch_size, num_key_value_heads, num_tokens, head_size)`.
        value: values of the same shape as `key`.
        attention_mask: mask, ignored if `cu_seq_lens_q` is given.
        cu_seq_lens_q: boundaries of the sequences, int32 of shape `(num_sequences + 1,)`.
        kwargs: further arguments of `sdpa_attention_forward`.

    Returns:
        Output of shape `(batch_size, num_tokens, num_heads, head_size)`, and `None` for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    queries = query.split(lengths, dim=2)
    keys = key.split(lengths, dim=2)
    values = value.split(lengths, dim=2)
    outputs = []
    for sequence_query, sequence_key, sequence_value in zip(queries, keys, values):
        output, _ = sdpa_attention_forward(module, sequence_query, sequence_key, sequence_value, None, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def mask_unless_end_to_end(
    *args, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs
) -> torch.Tensor | None:
    """Return the mask of transformers for SDPA, or `None` for concatenated sequences, which it finds by positions."""
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
AttentionMaskInterface.register(BY_SEQUENCE, mask_unless_end_to_end)


def vitp_of(model: nn.Module) -> ViTPModel:
    """Return the [`ViTPModel`] within a [`ViTPForConditionalGeneration`] with or without an adapter."""
    return next(module for module in model.modules() if isinstance(module, ViTPModel))


def check_attention(model: nn.Module) -> None:
    """Raise a `ValueError` if a sample in the language model would attend to earlier samples of its row."""
    language_model = vitp_of(model).language_model
    config = language_model.config
    implementation = config._attn_implementation
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        uses_window = getattr(config, "use_sliding_window", True)
        has_window = uses_window and getattr(config, "sliding_window", None) is not None
        layer_types = [SLIDING if has_window else WHOLE]
    is_stateful = getattr(language_model, "_is_stateful", False)  # until transformers 5.24
    if is_stateful or not {WHOLE, SLIDING}.issuperset(layer_types):
        raise ValueError(
            f"padding_free=True: the language model, a {config.model_type!r}, has layers other than attention, which "
            "would carry state from one sample to the next. Remove padding_free."
        )
    if implementation != SDPA and "flash" not in implementation:
        raise ValueError(
            f"padding_free=True: the language model has attn_implementation={implementation!r}, which does not "
            "support several sequences in one row. Remove padding_free, or set 'sdpa' or 'flash_attention_2' if the "
            "model supports it."
        )
    if implementation == SDPA and SLIDING in layer_types:
        raise ValueError(
            f"padding_free=True: the language model, a {config.model_type!r}, has layers with sliding-window "
            "attention, which is not supported with sdpa. Remove padding_free, or set "
            "attn_implementation='flash_attention_2'."
        )


@contextlib.contextmanager
def attention_by_sequence(model: nn.Module) -> Iterator[None]:
    """Enable batches without padding for a language model under SDPA inside this context."""
    language_model = vitp_of(model).language_model
    is_sdpa = language_model.config._attn_implementation == SDPA
    if is_sdpa:
        language_model.set_attn_implementation(BY_SEQUENCE)
    try:
        yield
    finally:
        if is_sdpa:
            language_model.set_attn_implementation(SDPA)


def checkpoint_activations(model: PreTrainedModel, every_n_layers: int = 1) -> None:
    """Enable activation checkpointing of every n-th layer (of all layers before transformers 5.23)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(every_n_layers=every_n_layers)
    else:
        model.gradient_checkpointing_enable()


def compile_layers(model: nn.Module) -> None:
    """Configure accelerate to compile each layer of a model separately in the Trainer that is created next.

    Layers share the code compiled for the first layer, shapes are dynamic, and random numbers equal those of a run
    without compilation. Evaluation and checkpoints use the model itself and its parameter names.
    """
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"
    torch._inductor.config.fallback_random = True
    # Stochastic depth has a different rate in each layer, so that each layer would be compiled again. Compiled
    # embeddings of one tile return gradients that share memory, so that accumulated gradients would be added to both.
    for module in model.modules():
        if isinstance(module, Dinov3ViTDropPath | InternVLVisionEmbeddings):
            module.forward = torch.compiler.disable(module.forward)
