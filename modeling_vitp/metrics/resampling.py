"""Resamples of test cases (bootstrap), the same for all models, and scores over them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
BOX_RESAMPLES = 200  # for scores of boxes, which take longer


def resample(num_cases: int, seed: int = 0, number: int = RESAMPLES) -> np.ndarray:
    """Draw resamples of cases with replacement, see Efron, *Bootstrap methods*, Annals of Statistics 7, 1979.

    Returns:
        Indices of the cases, int64 of shape `(number, num_cases)`.
    """
    return np.random.default_rng(seed).integers(num_cases, size=(number, num_cases))


@dataclass(frozen=True)
class Score:
    """Score of a test split, and of each resample of its cases: images, or scenes or patients with several images.

    Args:
        value: score of all images.
        resampled: scores of the draws of [`resample`], which are the same for all models of a test split. A score
            without anything to count is NaN.
        cases: number of cases.
    """

    value: float
    resampled: list[float]
    cases: int


class Scores(dict[str, float]):
    """Scores by name, with the main score over resamples of the test cases.

    Args:
        scores: scores by name.
        main: main score, if it was resampled.
    """

    def __init__(self, scores: Mapping[str, float], main: Score | None = None):
        super().__init__(scores)
        self.main = main
