"""Resamples of test cases (bootstrap), the same for all models, scores over them, and differences with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

RESAMPLES = 1000
BOX_RESAMPLES = 200  # for scores of boxes, which take longer
LEVEL = 0.05  # error rate of an interval, or of the intervals of several comparisons together


def resample(
    num_cases: int,
    seed: int = 0,
    number: int = RESAMPLES,
) -> np.ndarray:
    """Draw resamples of cases with replacement, see Efron, *Bootstrap methods*, Annals of Statistics 7, 1979.

    Returns:
        Indices of the cases, int64 of shape `(number, num_cases)`.
    """
    generator = np.random.default_rng(seed)
    return generator.integers(num_cases, size=(number, num_cases))


def resample_mean(
    values: np.ndarray,
    case_ids: Sequence,
    seed: int = 0,
) -> np.ndarray:
    """Return the mean of values over resamples of their cases.

    Args:
        values: values of shape `(n,)`.
        case_ids: case of each value, all numbers or all strings.
        seed: see [`resample`].

    Returns:
        Means, float64 of shape `(RESAMPLES,)`.
    """
    _, cases = np.unique(case_ids, return_inverse=True)
    sums = np.bincount(cases, values)
    counts = np.bincount(cases)
    means = []
    for draw in resample(len(counts), seed):
        mean = sums[draw].sum() / counts[draw].sum()
        means.append(mean)
    return np.array(means)


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

    def __init__(
        self,
        scores: Mapping[str, float],
        main: Score | None = None,
    ):
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
        return replace(
            self,
            mean=-self.mean,
            low=-self.high,
            high=-self.low,
            greater_is_better=True,
        )


def paired_difference(
    ours: Sequence[Score],
    theirs: Sequence[Score],
    level: float = LEVEL,
) -> Difference:
    """Return the mean difference `ours - theirs` of runs with the same seeds, with its 95% interval.

    Half the width is sqrt(t² · A + u² · B). A is the variance over the seeds divided by their number (randomness of
    training). B is the variance over resamples of the cases of the mean over the seeds (bootstrap, Efron 1979), times
    n / (n - 1) for n cases. t and u are the quantiles of Student's t for the seeds and for the cases. Limits of the two
    sources are combined as in Zou and Donner, Statistics in Medicine 27, 2008. One quantile for A + B would give
    intervals that are too short with few seeds. With a single seed, the interval is over cases only, and `is_clear` is
    false because one run cannot show the randomness of training.

    Args:
        ours, theirs: scores of one model for each seed, in the same order, on the same test cases.
        level: error rate of the interval, by default that of 95% intervals.

    Raises:
        ValueError: if the models differ in the number of seeds, of resamples or of cases or in the direction of the
            score, or have no scores.
    """
    our_kinds = [kind_of(score) for score in ours]
    their_kinds = [kind_of(score) for score in theirs]
    is_paired = len(ours) == len(theirs) > 0
    if not is_paired or len(set(our_kinds + their_kinds)) > 1:
        raise ValueError(
            "Expected two scores of the same metric and cases for each seed. Each must have the same number of "
            "resamples, number of cases, and direction (whether a higher or a lower value is better). Got "
            f"{our_kinds} and {their_kinds}."
        )

    differences = []
    for our_score, their_score in zip(ours, theirs):
        differences.append(our_score.value - their_score.value)
    differences = np.array(differences)
    mean = float(differences.mean())
    seeds = len(differences)
    half_of_seeds = 0.0
    if seeds > 1:
        variance_of_seeds = float(differences.var(ddof=1)) / seeds
        half_of_seeds = half_width(variance_of_seeds, seeds - 1, level)

    resampled_differences = mean_resampled(ours) - mean_resampled(theirs)
    cases = ours[0].cases
    variance_of_draws = float(np.nanvar(resampled_differences, ddof=1))
    variance_of_cases = variance_of_draws * cases / max(cases - 1, 1)
    half_of_cases = half_width(variance_of_cases, cases - 1, level)

    half = math.hypot(half_of_seeds, half_of_cases)
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        is_clear=seeds > 1 and abs(mean) > half,
        seeds=seeds,
        greater_is_better=ours[0].greater_is_better,
    )


def first_near_best(scores: Sequence[Score]) -> int:
    """Return the index of the first score that is within one standard error of the best.

    This is the rule of one standard error for trees (Breiman et al., *Classification and Regression Trees*, 1984): if
    the simplest model comes first, the simplest one is taken among those that the cases cannot tell from the best. The
    standard error is that of the difference to the best score, over resamples in which both see the same cases.

    Args:
        scores: scores of models on the same cases, of which a higher one is better.
    """
    best = max(scores, key=lambda score: score.value)
    # Scores that were read from JSON have None in place of NaN, which the conversion to float undoes.
    best_resampled = np.array(best.resampled, float)
    for index, score in enumerate(scores):
        differences = best_resampled - np.array(score.resampled, float)
        if best.value - score.value <= np.nanstd(differences):
            return index
    return scores.index(best)


def corrected_differences(
    ours: Mapping[str, Sequence[Score]], theirs: Mapping[str, Sequence[Score]]
) -> dict[str, Difference]:
    """Return the difference to each of several models, of which at most 5% of runs call any clear if all are equal.

    The intervals are those of the tests of Holm, Scandinavian Journal of Statistics 6, 1979: of k models, the
    differences that are clear at 5% / k are found, the others are tested with k less by their number, and so on. The
    interval of a difference is that of its last test, so that it excludes 0 if and only if it is clear.

    Args:
        ours, theirs: by model, arguments of [`paired_difference`].
    """
    differences: dict[str, Difference] = {}
    open_names = list(theirs)
    while open_names:
        level = LEVEL / len(open_names)
        tested = {name: paired_difference(ours[name], theirs[name], level) for name in open_names}
        differences.update(tested)
        unclear_names = [name for name in open_names if not tested[name].is_clear]
        if unclear_names == open_names:
            break
        open_names = unclear_names
    return {name: differences[name] for name in theirs}


def kind_of(score: Score) -> tuple[int, int, str]:
    """Return what two scores must have in common: numbers of resamples and cases, and which value is better."""
    better = "higher" if score.greater_is_better else "lower"
    return len(score.resampled), score.cases, better


def mean_resampled(scores: Sequence[Score]) -> np.ndarray:
    """Return the mean over the seeds of the score of each resample."""
    # Scores that were read from JSON have None in place of NaN, which the conversion to float undoes.
    resampled = np.array([score.resampled for score in scores], float)
    return resampled.mean(0)


def half_width(variance: float, freedom: float, level: float = LEVEL) -> float:
    """Return half the width of an interval by Student's t.

    Args:
        variance: variance of a mean.
        freedom: degrees of freedom.
        level: error rate of the interval, by default that of 95% intervals.
    """
    quantile = stats.t.ppf(1 - level / 2, freedom)
    return float(quantile * math.sqrt(variance))
