"""Ranking metrics: area under the ROC curve and average precision of scores."""

from collections.abc import Iterable

import numpy as np


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a positive has a higher score than a negative.

    Ties count one half (Mann and Whitney). The area is NaN without positives or without negatives.

    Args:
        scores: scores of shape `(n,)`.
        is_positive: bool of shape `(n,)`.
    """
    return weighted_areas(scores, is_positive, [np.ones(len(scores))])[0]


def weighted_areas(scores: np.ndarray, is_positive: np.ndarray, weights: Iterable[np.ndarray]) -> list[float]:
    """Return the area under the ROC curve for each of several weights of the scores, see [`area_under_curve`].

    Args:
        scores, is_positive: see [`area_under_curve`].
        weights: weights of shape `(n,)`, such as how often a resample has each score.
    """
    _, ranks = np.unique(scores, return_inverse=True)
    areas = []
    for weight in weights:
        positives, negatives = (np.bincount(ranks, weight * side) for side in (is_positive, ~is_positive))
        pairs = positives.sum() * negatives.sum()
        ordered = (positives * (np.cumsum(negatives) - negatives / 2)).sum()
        areas.append(float(ordered / pairs) if pairs else float("nan"))
    return areas


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the mean precision over the positives, at the score of each positive. Ties are counted together.

    Args:
        scores: scores of shape `(n,)`.
        is_positive: bool of shape `(n,)`, at least one true.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # Last index of each distinct score.
    found = np.cumsum(is_positive[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """Return the log-odds of a class against all others, `(n,)`, from logits of shape `(n, classes)`."""
    return logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)


def mean_area(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean one-against-rest area under the ROC curve over the classes that occur, ranked by log-odds.

    Args:
        logits: float of shape `(n, classes)`.
        labels: class indices, integers of shape `(n,)`.

    Returns:
        Mean area, NaN if fewer than two classes occur.
    """
    areas = [area_under_curve(log_odds(logits, label), labels == label) for label in np.unique(labels)]
    return float(np.mean(areas))
