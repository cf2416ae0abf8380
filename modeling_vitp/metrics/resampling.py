"""Resamples of test cases (bootstrap), the same for all models, scores over them, and differences with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

RESAMPLES = 1000
BOX_RESAMPLES = 200  # for scores of boxes, which take longer


def resample(num_cases: int, seed: int = 0, number: int = RESAMPLES) -> np.ndarray:
    """Draw resamples of cases with replacement, see Efron, *Bootstrap methods*, Annals of Statistics 7, 1979.

    Returns:
        Indices of the cases, int64 of shape `(number, num_cases)`.
    """
    return np.random.default_rng(seed).integers(num_cases, size=(number, num_cases))


def resample_mean(values: np.ndarray, case_ids: Sequence, seed: int = 0) -> np.ndarray:
    """Return the mean of values over resamples of their cases.

    Args:
        values: values of shape `(n,)`.
        case_ids: case of each value, all numbers or all strings.
        seed: see [`resample`].

    Returns:
        Means, float64 of shape `(RESAMPLES,)`.
    """
    cases = np.unique(case_ids, return_inverse=True)[1]
    sums, counts = np.bincount(cases, values), np.bincount(cases)
    return np.array([sums[draw].sum() / counts[draw].sum() for draw in resample(len(counts), seed)])


@dataclass(frozen=True)
class Score:
    """Score of a test split, and of each resample of its cases: images, or scenes or patients with several images.

    Args:
        value: score of all images.
        resampled: scores of the draws of [`resample`], which are the same for all models of a test split. A score
            without anything to count is NaN.
        cases: number of cases.
        greater_is_better: whether a higher value is better, see
            [`~modeling_vitp.metrics.base.DistributedMetric.greater_is_better`].
    """

    value: float
    resampled: list[float]
    cases: int
    greater_is_better: bool = True


class Scores(dict[str, float]):
    """Scores by name, with the main score over resamples of the test cases.

    Args:
        scores: scores by name.
        main: main score, if it was resampled.
    """

    def __init__(self, scores: Mapping[str, float], main: Score | None = None):
        super().__init__(scores)
        self.main = main


@dataclass(frozen=True)
class Difference:
    """Difference of the scores of two models.

    Args:
        mean: mean over the seeds.
        low, high: 95% interval.
        is_clear: whether the interval excludes 0. Always false for a single seed.
        seeds: number of seeds.
        greater_is_better: whether a higher score is better.
    """

    mean: float
    low: float
    high: float
    is_clear: bool
    seeds: int
    greater_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def as_gain(self) -> "Difference":
        """Return the difference as an improvement, which is positive if the first model is better."""
        if self.greater_is_better:
            return self
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low, greater_is_better=True)


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
        ValueError: if the models differ in the number of seeds, of resamples or of cases or in the direction of the
            score, or have no scores.
    """
    if not len(ours) == len(theirs) > 0 or len({(len(one.resampled), one.cases) for one in (*ours, *theirs)}) > 1:
        found = [[(len(one.resampled), one.cases) for one in scores] for scores in (ours, theirs)]
        raise ValueError(
            f"Expected two scores of the same cases for each seed, got numbers of resamples and cases {found}."
        )
    directions = {score.greater_is_better for score in (*ours, *theirs)}
    if len(directions) > 1:
        raise ValueError("Expected scores of one metric, got some that are better when higher and some when lower.")
    values = np.array([one.value - other.value for one, other in zip(ours, theirs)])
    # Scores that were read from JSON have None in place of NaN.
    resampled, others = (np.array([one.resampled for one in scores], float).mean(0) for scores in (ours, theirs))
    mean, seeds = float(values.mean()), len(values)
    of_seeds = float(values.var(ddof=1)) / seeds if seeds > 1 else 0.0
    cases = ours[0].cases
    of_cases = float(np.nanvar(resampled - others, ddof=1)) * cases / max(cases - 1, 1)
    halves = half_width(of_seeds, seeds - 1) if seeds > 1 else 0.0, half_width(of_cases, cases - 1)
    half = math.hypot(*halves)
    is_clear = seeds > 1 and abs(mean) > half
    return Difference(mean, mean - half, mean + half, is_clear, seeds, directions.pop())


def half_width(variance: float, freedom: float) -> float:
    """Return half the width of a 95% interval by Student's t, from the variance of a mean and degrees of freedom."""
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
