"""Visual Robustness Learning (VRL, arXiv 2509.17562): random choice of the visual tokens for the language model.

Patches can be dropped too, before the ViT (FLIP, arXiv 2212.00794).
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch


def check_drop_ratio(drop_ratio: float, name: str = "vrl_drop_ratio") -> float:
    """Return `drop_ratio`, the setting `name`, as a float. Raise a `ValueError` unless it is in [0, 1)."""
    drop_ratio = float(drop_ratio)
    if not 0.0 <= drop_ratio < 1.0:
        raise ValueError(
            f"Expected `{name}` in [0, 1), got {drop_ratio}. 0 keeps every visual token, 0.75 (the paper's value for "
            "VRL) keeps a quarter."
        )
    return drop_ratio


def check_apply_prob(apply_prob: float) -> float:
    """Return `apply_prob` as a float. Raise a `ValueError` unless it is in [0, 1]."""
    apply_prob = float(apply_prob)
    if not 0.0 <= apply_prob <= 1.0:
        raise ValueError(
            f"Expected `vrl_apply_prob` (share of samples that VRL is applied to) in [0, 1], got {apply_prob}."
        )
    return apply_prob


def check_warmup_steps(warmup_steps: int) -> int:
    """Return `warmup_steps`. Raise a `ValueError` unless it is a non-negative integer."""
    if warmup_steps < 0 or warmup_steps != int(warmup_steps):
        raise ValueError(
            "`vrl_warmup_steps` (optimizer steps at the beginning without dropped tokens) must be a non-negative "
            f"integer, got {warmup_steps}."
        )
    return int(warmup_steps)


def num_kept_tokens(num_tokens: int, drop_ratio: float) -> int:
    """Return the number of kept tokens, |X| = ceil((1 - r) * |S|), with r interpreted as a decimal number.

    In floats, (1 - 0.7) * 10 is 3.0000000000000004 and its ceiling 4; as a decimal, 0.7 keeps 3 of 10.
    """
    ratio = Fraction(str(check_drop_ratio(drop_ratio)))
    return num_tokens - math.floor(ratio * num_tokens)


def num_language_tokens(num_tiles: float, tokens_of_tile: int, drop_ratio: float, patch_drop_ratio: float = 0.0) -> int:
    """Return the number of visual tokens that the language model sees of a sample, or of a mean number of tiles.

    Both ratios are of all tokens, so VRL drops nothing if it would keep more tokens than the ViT computes.
    """
    num_kept = num_kept_tokens(round(num_tiles * tokens_of_tile), drop_ratio)
    num_visible = round(num_tiles * num_kept_tokens(tokens_of_tile, patch_drop_ratio))
    return min(num_kept, num_visible)


def keyed_generator(*key: object) -> torch.Generator:
    """Return a CPU generator that is seeded by the key alone, e.g. `keyed_generator(seed, sample_id, epoch)`.

    The key is converted with `str`, so a sample id may be a string or a number. Worker, rank, batch and earlier draws
    do not change the random numbers, so that a resumed run is exact.
    """
    text = "\x1f".join(map(str, key))
    digest = hashlib.sha256(text.encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits
    return torch.Generator().manual_seed(seed)


def draw_visual_tokens(
    num_tokens: int,
    drop_ratio: float,
    apply_prob: float = 1.0,
    generator: torch.Generator | None = None,
    visible_indices: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """Draw the visual tokens that one sample keeps.

    Args:
        num_tokens: |S|, number of projected image tokens of the sample: every tile of every image, in order.
        drop_ratio: r in [0, 1).
        apply_prob: probability that VRL is applied to the sample; otherwise every token is kept. 1.0 in the paper;
            the authors' released code amounts to 1 - r.
        generator: random generator. Defaults to torch's global one.
        visible_indices: ascending indices of the tokens that the ViT computes, from which those to keep are drawn. All
            are kept if they are too few. Defaults to all tokens.

    Returns:
        Ascending indices in [0, num_tokens) of a uniformly random subset, int64 of shape `(num_kept,)`.

    Raises:
        ValueError: if `drop_ratio` is outside [0, 1) or `apply_prob` outside [0, 1].
    """
    num_kept = num_kept_tokens(num_tokens, drop_ratio)
    # The device is named, because another one may be torch's default.
    draw = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
    if draw >= check_apply_prob(apply_prob):
        num_kept = num_tokens
    if visible_indices is None:
        visible_indices = torch.arange(num_tokens, device="cpu")
    order = torch.randperm(len(visible_indices), generator=generator, device="cpu")
    return visible_indices[order[:num_kept].sort().values]


def draw_visible_tokens(
    num_tiles: int, tokens_of_tile: int, drop_ratio: float, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """Draw the visual tokens of each tile whose patches the ViT computes.

    Args:
        num_tiles: number of tiles of a sample.
        tokens_of_tile: visual tokens of a tile, each of which the pixel shuffle makes of a block of patches.
        drop_ratio: share of the tokens of each tile that is dropped, in [0, 1).
        generator: random generator. Defaults to torch's global one.

    Returns:
        Ascending indices of a uniformly random subset of the tokens of each tile, int64 `(num_tiles, num_visible)`.
        All tiles keep the same number, so that any tiles are a batch without padding.
    """
    num_visible = num_kept_tokens(tokens_of_tile, drop_ratio)
    numbers = torch.rand(num_tiles, tokens_of_tile, dtype=torch.float64, generator=generator, device="cpu")
    return numbers.argsort(1)[:, :num_visible].sort(1).values


def flat_indices(visible_token_indices: torch.LongTensor, tokens_of_tile: int) -> torch.LongTensor:
    """Return the indices of the visible tokens of tiles, `(num_tiles, num_visible)`, among the tokens of all tiles."""
    num_tiles = len(visible_token_indices)
    first_tokens = tokens_of_tile * torch.arange(num_tiles, device=visible_token_indices.device)
    return (visible_token_indices + first_tokens[:, None]).flatten()


@dataclass
class KeptTokens:
    """Visual tokens of one image that VRL keeps."""

    indices: np.ndarray  # int64, ascending, among all tokens of the image
    num_tokens: int  # of the image, with those that are dropped

    def __len__(self) -> int:
        return len(self.indices)


def split_by_image(indices: np.ndarray, num_tokens: list[int]) -> list[KeptTokens]:
    """Return the kept tokens of each image.

    Args:
        indices: kept tokens of all images, int64, ascending, `(num_kept,)`.
        num_tokens: number of tokens of each image.
    """
    kept_of_image = []
    first_token = 0
    first_index = 0
    for number in num_tokens:
        last_token = first_token + number
        last_index = int(np.searchsorted(indices, last_token))
        image_indices = indices[first_index:last_index] - first_token
        kept_of_image.append(KeptTokens(image_indices, number))
        first_token = last_token
        first_index = last_index
    return kept_of_image


def draw_kept_tokens(
    num_tokens: list[int],
    drop_ratio: float,
    apply_prob: float,
    key: object | None,
    visible_indices: torch.LongTensor | None = None,
) -> tuple[torch.LongTensor, list[KeptTokens]]:
    """Draw the visual tokens that a sample keeps.

    Args:
        num_tokens: number of tokens of each image of the sample.
        drop_ratio: share of the visual tokens that is dropped; with 0, nothing is drawn.
        apply_prob: probability that VRL is applied to the sample.
        key: seed of the draw, or a list of its parts. Default: torch's global generator.
        visible_indices: ascending indices of the tokens that the ViT computes. Default: all tokens.

    Returns:
        Indices of the kept tokens among those of the sample, int64 `(num_kept,)`, and the kept tokens of each image.
    """
    if visible_indices is None:
        visible_indices = torch.arange(sum(num_tokens), device="cpu")
    if drop_ratio > 0:
        generator = None
        if isinstance(key, (list, tuple)):
            generator = keyed_generator(*key)
        elif key is not None:
            generator = keyed_generator(key)
        indices = draw_visual_tokens(sum(num_tokens), drop_ratio, apply_prob, generator, visible_indices)
    else:
        indices = visible_indices
    return indices, split_by_image(indices.numpy(), num_tokens)


def positions_after_drop(
    image_tokens: np.ndarray,
    image_ends: np.ndarray,
    is_real: np.ndarray,
    kept_of_image: list[KeptTokens],
) -> np.ndarray:
    """Return the positions of the tokens of a shortened sequence in its full sequence; 0 at padding.

    Args:
        image_tokens: indices of all visual tokens in the sequence, ascending.
        image_ends: index of the token after the visual tokens of each image.
        is_real: bool `(sequence_length,)`, false at padding.
        kept_of_image: kept tokens of each image.

    Returns:
        int64 `(sequence_length,)`.
    """
    dropped_before = np.zeros(len(is_real), np.int64)  # number of dropped tokens just before each token
    start = 0
    for image_end, kept_tokens in zip(image_ends, kept_of_image):
        gaps = np.diff(kept_tokens.indices, prepend=-1, append=kept_tokens.num_tokens) - 1
        tokens = image_tokens[start : start + len(kept_tokens)]
        dropped_before[tokens] = gaps[:-1]
        dropped_before[image_end] = gaps[-1]
        start += len(kept_tokens)
    steps = (1 + dropped_before) * is_real
    return np.where(is_real, steps.cumsum() - 1, 0)
