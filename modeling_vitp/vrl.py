"""Visual Robustness Learning (VRL, arXiv 2509.17562): which visual tokens of a sample reach the language model."""

import functools
import hashlib
import math
from fractions import Fraction

import torch


def check_drop_ratio(drop_ratio: float) -> float:
    """Returns `drop_ratio` as a float; raises `ValueError` unless it lies in [0, 1)."""
    drop_ratio = float(drop_ratio)
    if not 0.0 <= drop_ratio < 1.0:
        raise ValueError(
            f"vrl_drop_ratio={drop_ratio} is outside [0, 1): 0 keeps every visual token, 0.75 (the paper's choice) "
            "keeps a quarter of them, and 1 would keep none."
        )
    return drop_ratio


def check_apply_prob(apply_prob: float) -> float:
    """Returns `apply_prob` as a float; raises `ValueError` unless it lies in [0, 1]."""
    apply_prob = float(apply_prob)
    if not 0.0 <= apply_prob <= 1.0:
        raise ValueError(
            f"vrl_apply_prob={apply_prob} is outside [0, 1]: it is the share of samples that VRL shortens."
        )
    return apply_prob


def check_warmup_steps(warmup_steps: int) -> int:
    """Returns `warmup_steps`; raises `ValueError` unless it is a whole number of steps."""
    if warmup_steps < 0 or warmup_steps != int(warmup_steps):
        raise ValueError(
            f"vrl_warmup_steps={warmup_steps} is no number of steps: it is how many optimizer steps at the beginning "
            "drop nothing."
        )
    return int(warmup_steps)


def num_kept_tokens(num_tokens: int, drop_ratio: float) -> int:
    """|X| = ceil((1 - r) * |S|), with r read as the decimal that was written.

    In floats (1 - 0.7) * 10 is 3.0000000000000004 and its ceiling 4; the decimal 0.7 keeps 3 of 10.
    """
    return num_tokens - math.floor(_as_written(check_drop_ratio(drop_ratio)) * num_tokens)


_as_written = functools.lru_cache(lambda ratio: Fraction(str(ratio)))


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone, e.g. `keyed_generator(seed, sample_id, epoch)`.

    The key is read through `str`, so a sample id may be a string or a number. Neither the worker, the rank, the batch
    nor anything drawn before can change the stream: that is what makes resuming exact.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_visual_tokens(
    num_tokens: int,
    drop_ratio: float,
    apply_prob: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """Draws the visual tokens that one sample keeps.

    Args:
        num_tokens: |S|, all projected image tokens of the sample: every tile of every image, in order.
        drop_ratio: r in [0, 1).
        apply_prob: probability that VRL is applied to the sample at all; otherwise every token is kept. The paper
            applies it always (1.0); the authors' released code amounts to 1 - r.
        generator: source of the draw; the global one if not given.

    Returns:
        Ascending indices in [0, num_tokens) of a uniformly random subset, int64, of shape `(num_kept,)`.

    Raises:
        ValueError: if `drop_ratio` is outside [0, 1) or `apply_prob` outside [0, 1].
    """
    num_kept = num_kept_tokens(num_tokens, drop_ratio)
    if torch.rand((), generator=generator, dtype=torch.float64) >= check_apply_prob(apply_prob):
        num_kept = num_tokens
    return torch.randperm(num_tokens, generator=generator)[:num_kept].sort().values
