"""Hidden answers: a language model that cannot read the beginning of its answer has to look at the image.

CapPa (arXiv 2306.07915) hides the whole caption from the decoder's input for three samples of four. Here each token is
hidden by itself, so that one ratio serves words and long maps alike; at a ratio of 1 it is CapPa's parallel prediction,
for every sample.
"""

import torch

from ..processing_vitp import ViTPProcessor


def check_mask_ratio(mask_ratio: float) -> float:
    """Returns `mask_ratio` as a float; raises `ValueError` unless it lies in [0, 1]."""
    mask_ratio = float(mask_ratio)
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(
            f"answer_mask_ratio={mask_ratio} is outside [0, 1]: it is the share of answer tokens hidden from the input."
        )
    return mask_ratio


def mask_token_id(processor: ViTPProcessor) -> int:
    """The token that stands for a hidden one: the tokenizer's mask token, or else its pad or unknown token.

    Of these the first that the chat template does not write itself, as it may write the pad token at the end of a turn.
    Qwen2.5's and InternVL2.5's is `<|endoftext|>`.

    Raises:
        ValueError: if there is none.
    """
    tokenizer, template = processor.tokenizer, processor.chat_template
    for name in ("mask_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, name)
        is_end = token == tokenizer.eos_token and "eos_token" in template
        if token is not None and token not in template and not is_end:
            return tokenizer.convert_tokens_to_ids(token)
    raise ValueError(
        "answer_mask_ratio needs a token that stands for hidden ones, and the tokenizer has neither mask, pad nor "
        "unknown token that the chat template does not use: set tokenizer.mask_token."
    )


def hide_answers(
    input_ids: torch.LongTensor,
    is_answer: torch.BoolTensor,
    mask_ratio: float,
    mask_id: int,
    generator: torch.Generator,
) -> torch.LongTensor:
    """The tokens of a sample with each one of an answer replaced with probability `mask_ratio`.

    The last token of an answer ends the turn and stays; nothing of the answer is predicted from it.

    Args:
        input_ids: int64 `(sequence_length,)`.
        is_answer: bool `(sequence_length,)`, true in the answers and at their ends.
        mask_id: see [`mask_token_id`].
        generator: draws one number for each token of the answers, in order, whatever is between them.

    Returns:
        int64 `(sequence_length,)`.
    """
    is_last = is_answer & ~torch.cat([is_answer[1:], is_answer.new_zeros(1)])
    is_drawn = torch.zeros_like(is_answer)
    is_drawn[is_answer] = torch.rand(int(is_answer.sum()), generator=generator, dtype=torch.float64) < mask_ratio
    return input_ids.masked_fill(is_drawn & ~is_last, mask_id)
