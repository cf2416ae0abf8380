"""Batches without padding: the samples lie end to end in one row, as in TRL's `padding_free`."""

import torch


def lay_end_to_end(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """The same batch in one row, without what its `attention_mask` hides.

    Each sample keeps the positions that it has, also those with the gaps that VRL leaves, and its first token is no
    label of what comes before. Where samples begin is in `cu_seq_lens_q` and `cu_seq_lens_k`, int32 of shape
    `(num_samples + 1,)`, and the longest has `max_length_q` and `max_length_k` tokens, as kernels for several sequences
    take them.

    Args:
        batch: what [`ViTPDataCollator`] makes of samples that are padded, on either side.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 of shape `(1, num_tokens)`, the places above, and what else the
        batch has, as it is.
    """
    is_token = batch["attention_mask"].bool()
    positions = {"position_ids": is_token.cumsum(1) - 1}
    rows = {name: (positions | batch)[name][is_token][None] for name in ("input_ids", "labels", "position_ids")}
    lengths = is_token.sum(1)
    places = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows["labels"][0, places[:-1]] = -100
    longest = lengths.max().item()
    rest = {name: value for name, value in batch.items() if name != "attention_mask"}
    return {
        **rest,
        **rows,
        "cu_seq_lens_q": places,
        "cu_seq_lens_k": places,
        "max_length_q": longest,
        "max_length_k": longest,
    }
