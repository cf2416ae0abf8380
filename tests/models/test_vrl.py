import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp import vrl
from modeling_vitp.vrl import (
    draw_visible_tokens,
    draw_visual_tokens,
    flat_indices,
    keyed_generator,
    num_kept_tokens,
    num_language_tokens,
)

CASES = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def kept_of(num_tokens: int, percent: int) -> int:
    """Return ceil((100 - percent) / 100 * num_tokens), computed in integers."""
    return -((-(100 - percent) * num_tokens) // 100)


def chi_square_bounds(freedom: int, z: float = 3.3) -> tuple[float, float]:
    """Return Wilson-Hilferty approximations of the quantiles at -z and +z, which enclose 99.9%."""
    spread = 2 / (9 * freedom)
    return tuple(freedom * (1 - spread + sign * z * math.sqrt(spread)) ** 3 for sign in (-1, 1))


def assert_chi_square(statistic: float, freedom: int) -> None:
    low, high = chi_square_bounds(freedom)
    assert low < statistic < high


def test_chi_square_bounds_agree_with_tables():
    assert chi_square_bounds(27, z=2.3263)[1] == pytest.approx(46.963, rel=2e-3)
    assert chi_square_bounds(10, z=1.6449) == pytest.approx((3.940, 18.307), rel=5e-3)


def test_number_of_kept_tokens_is_decimal_ceiling():
    assert math.ceil((1 - 0.7) * 10) == 4  # the error of a formula in floats
    assert num_kept_tokens(10, 0.7) == 3
    for percent in range(100):
        for num_tokens in (*range(1, 130), 256, 300, 1000, 1792, 3328, 4000, 4096):
            assert num_kept_tokens(num_tokens, percent / 100) == kept_of(num_tokens, percent)


@given(digits=st.integers(0, 10**6 - 1), num_tokens=st.integers(0, 10**5))
@CASES
def test_number_of_kept_tokens_for_long_decimals(digits, num_tokens):
    ratio = float(Decimal(digits) / 10**6)
    assert num_kept_tokens(num_tokens, ratio) == -((-(10**6 - digits) * num_tokens) // 10**6)


@given(percent=st.integers(0, 99), num_tokens=st.integers(0, 600), key=st.tuples(st.integers(), st.text()))
@CASES
def test_draw_is_ascending_unique_and_in_range(percent, num_tokens, key):
    drawn = draw_visual_tokens(num_tokens, percent / 100, generator=keyed_generator(*key))
    assert drawn.dtype == torch.int64
    values = drawn.tolist()
    assert len(values) == kept_of(num_tokens, percent)
    assert all(low < high for low, high in itertools.pairwise([-1, *values, num_tokens]))


def test_every_token_is_kept_equally_often():
    num_tokens, drop_ratio, num_kept, draws = 30, 0.37, 19, 2000
    counts = torch.zeros(num_tokens)
    for sample in range(draws):
        counts[draw_visual_tokens(num_tokens, drop_ratio, generator=keyed_generator(0, sample, 0))] += 1
    share = num_kept / num_tokens
    assert counts.sum() == draws * num_kept
    # Without replacement the counts have covariance draws * share * (1 - share) * n / (n - 1) * (I - 1/n).
    statistic = ((counts - draws * share) ** 2).sum().item() / (draws * share * (1 - share))
    assert_chi_square(statistic * (num_tokens - 1) / num_tokens, num_tokens - 1)


@pytest.mark.parametrize(("num_tokens", "drop_ratio", "num_kept"), [(8, 0.75, 2), (7, 0.4, 5)])
def test_every_subset_is_drawn_equally_often(num_tokens, drop_ratio, num_kept):
    subsets = list(itertools.combinations(range(num_tokens), num_kept))
    expected = 60
    counts = Counter(
        tuple(draw_visual_tokens(num_tokens, drop_ratio, generator=keyed_generator(1, sample, 0)).tolist())
        for sample in range(expected * len(subsets))
    )
    assert set(counts) == set(subsets)
    statistic = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    assert_chi_square(statistic, len(subsets) - 1)


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=["epoch", "sample", "seed"])
def test_draws_of_neighboring_keys_are_independent(other):
    num_tokens, num_kept, draws = 32, 8, 600
    total = 0
    for base in range(0, 10 * draws, 10):
        keys = (base, base, base), tuple(base + step for step in other)
        first, second = (
            set(draw_visual_tokens(num_tokens, 0.75, generator=keyed_generator(*key)).tolist()) for key in keys
        )
        total += len(first & second)
    mean = num_kept**2 / num_tokens
    variance = mean * (1 - num_kept / num_tokens) * (num_tokens - num_kept) / (num_tokens - 1)
    assert abs(total - draws * mean) < 3.3 * math.sqrt(draws * variance)


def test_draw_depends_on_the_key_alone():
    keys = [(seed, sample, epoch) for seed in (0, 1) for sample in ("a", 7) for epoch in (0, 1)]
    torch.manual_seed(0)
    forwards = {key: draw_visual_tokens(64, 0.75, 0.8, keyed_generator(*key)).tolist() for key in keys}
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    backwards = {key: draw_visual_tokens(64, 0.75, 0.8, keyed_generator(*key)).tolist() for key in reversed(keys)}
    assert forwards == backwards
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_draw_is_equal_in_another_process():
    program = f"""
import sys
sys.path.insert(0, {str(Path(vrl.__file__).parent)!r})
from vrl import draw_visual_tokens, keyed_generator
print([draw_visual_tokens(40, 0.6, 0.5, keyed_generator(3, f"s{{i}}", 2)).tolist() for i in range(20)])
"""
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=environment)
    here = [draw_visual_tokens(40, 0.6, 0.5, keyed_generator(3, f"s{i}", 2)).tolist() for i in range(20)]
    assert json.loads(there.stdout) == here


def test_keys_have_different_draws():
    keys = [*itertools.product(range(5), range(20), range(5)), (0, 12, 3, 4), ("01", 23, 4), (0, "a b"), (0, "a", "b")]
    draws = {tuple(draw_visual_tokens(128, 0.5, generator=keyed_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_sample_id_may_be_number_or_string():
    number, string = (draw_visual_tokens(64, 0.75, generator=keyed_generator(0, sample, 1)) for sample in (5, "5"))
    assert torch.equal(number, string)


def test_share_of_shortened_samples_is_apply_prob():
    apply_prob, draws = 0.6, 2000
    lengths = Counter(
        len(draw_visual_tokens(16, 0.75, apply_prob, keyed_generator(0, sample, 0))) for sample in range(draws)
    )
    assert set(lengths) == {4, 16}
    assert abs(lengths[4] - draws * apply_prob) < 3.3 * math.sqrt(draws * apply_prob * (1 - apply_prob))


def test_apply_prob_does_not_bias_draw():
    num_tokens, draws = 16, 3000
    counts = torch.zeros(num_tokens)
    shortened = 0
    for sample in range(draws):
        drawn = draw_visual_tokens(num_tokens, 0.75, 0.3, keyed_generator(2, sample))
        if len(drawn) < num_tokens:
            counts[drawn] += 1
            shortened += 1
    statistic = ((counts - shortened / 4) ** 2).sum().item() / (shortened * 0.25 * 0.75)
    assert_chi_square(statistic * (num_tokens - 1) / num_tokens, num_tokens - 1)


@pytest.mark.parametrize(
    ("drop_ratio", "patch_drop_ratio", "number"),
    [(0.75, 0.5, 64), (0.5, 0.75, 64), (0.0, 0.5, 128), (0.75, 0.0, 64), (0.0, 0.0, 256), (0.75, 0.75, 64)],
)
def test_ratios_are_of_all_tokens(drop_ratio, patch_drop_ratio, number):
    assert num_language_tokens(1, 256, drop_ratio, patch_drop_ratio) == number
    assert num_language_tokens(2.5, 256, drop_ratio, patch_drop_ratio) == 2.5 * number


def test_visible_tokens_are_a_uniform_subset_of_each_tile():
    """Five tokens of two tiles of nine are left, the ceiling of half of them."""
    draws = 2000
    counts = torch.zeros(2, 9)
    for sample in range(draws):
        visible = draw_visible_tokens(2, 9, 0.5, keyed_generator(0, sample, 0, "patches"))
        assert visible.dtype == torch.int64 and visible.shape == (2, 5)
        for tile, tokens in enumerate(visible.tolist()):
            assert all(low < high for low, high in itertools.pairwise([-1, *tokens, 9]))
            counts[tile, tokens] += 1
    share = 5 / 9
    for tile_counts in counts:
        statistic = ((tile_counts - draws * share) ** 2).sum().item() / (draws * share * (1 - share))
        assert_chi_square(statistic * 8 / 9, 8)
    assert draw_visible_tokens(0, 9, 0.5, keyed_generator(0)).shape == (0, 5)


def test_visible_tokens_of_tiles_are_counted_in_the_batch():
    assert flat_indices(torch.tensor([[0, 3], [1, 2], [0, 1]]), 4).tolist() == [0, 3, 5, 6, 8, 9]


@given(percent=st.integers(0, 99), patch_percent=st.integers(0, 99), num_tiles=st.integers(0, 6))
@CASES
def test_vrl_draws_among_visible_tokens(percent, patch_percent, num_tiles):
    visible = flat_indices(draw_visible_tokens(num_tiles, 16, patch_percent / 100, keyed_generator(0)), 16)
    drawn = draw_visual_tokens(16 * num_tiles, percent / 100, 1.0, keyed_generator(1), visible).tolist()
    assert len(drawn) == min(kept_of(16 * num_tiles, percent), num_tiles * kept_of(16, patch_percent))
    assert len(drawn) == num_language_tokens(num_tiles, 16, percent / 100, patch_percent / 100)
    assert drawn == sorted(set(drawn)) and set(drawn) <= set(visible.tolist())
    if kept_of(16 * num_tiles, percent) >= len(visible):
        assert drawn == visible.tolist()


def test_sample_without_vrl_keeps_visible_tokens():
    visible = torch.tensor([0, 3, 5, 6])
    assert torch.equal(draw_visual_tokens(8, 0.75, 0.0, keyed_generator(1), visible), visible)
