"""Paired differences of two models with 95% intervals over test cases and training runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..metrics.resampling import RESAMPLES, Score, resample

__all__ = ["RESAMPLES", "Difference", "Score", "half_width", "paired_difference", "resample"]


@dataclass(frozen=True)
class Difference:
    """Difference of the scores of two models.

    Args:
        mean: mean over the seeds.
        low, high: 95% interval.
        is_clear: whether the interval excludes 0. Always false for a single seed.
        seeds: number of seeds.
    """

    mean: float
    low: float
    high: float
    is_clear: bool
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def paired_difference(ours: Sequence[Score], theirs: Sequence[Score]) -> Difference:
    """Return the mean difference `ours - theirs` of runs with the same seeds, with its 95% interval.

    Half the width is sqrt(t² · A + u² · B). A is the variance over the seeds divided by their number (randomness of
    training). B is the variance over resamples of the cases of the mean over the seeds (bootstrap, Efron 1979), times
    n / (n - 1) for n cases. t and u are the quantiles of Student's t for the seeds and for the cases. Limits of the two
    sources are combined as in Zou and Donner, Statistics in Medicine 27, 2008. One quantile for A + B would give
    intervals that are too short with few seeds. With a single seed, the interval is over cases only, and `is_clear` is
    false because one run cannot show the randomness of training.

    Args:
        ours, theirs: scores of one model for each seed, in the same order, on the same test cases.

    Raises:
        ValueError: if the models differ in the number of seeds, of resamples or of cases, or have no scores.
    """
    if not len(ours) == len(theirs) > 0 or len({(len(one.resampled), one.cases) for one in (*ours, *theirs)}) > 1:
        found = [[(len(one.resampled), one.cases) for one in scores] for scores in (ours, theirs)]
        raise ValueError(
            f"Expected two scores of the same cases for each seed, got numbers of resamples and cases {found}."
        )
    values = np.array([one.value - other.value for one, other in zip(ours, theirs)])
    # Scores that were read from JSON have None in place of NaN.
    resampled, others = (np.array([one.resampled for one in scores], float).mean(0) for scores in (ours, theirs))
    mean, seeds = float(values.mean()), len(values)
    of_seeds = float(values.var(ddof=1)) / seeds if seeds > 1 else 0.0
    cases = ours[0].cases
    of_cases = float(np.nanvar(resampled - others, ddof=1)) * cases / max(cases - 1, 1)
    halves = half_width(of_seeds, seeds - 1) if seeds > 1 else 0.0, half_width(of_cases, cases - 1)
    half = math.hypot(*halves)
    return Difference(mean, mean - half, mean + half, seeds > 1 and abs(mean) > half, seeds)


def half_width(variance: float, freedom: float) -> float:
    """Return half the width of a 95% interval by Student's t, from the variance of a mean and degrees of freedom."""
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
