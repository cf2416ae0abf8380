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
    equal_weight = np.ones(len(scores))
    (area,) = weighted_areas(scores, is_positive, [equal_weight])
    return area


def weighted_areas(
    scores: np.ndarray,
    is_positive: np.ndarray,
    weights: Iterable[np.ndarray],
) -> list[float]:
    """Return the area under the ROC curve for each of several weights of the scores, see [`area_under_curve`].

    Args:
        scores, is_positive: see [`area_under_curve`].
        weights: weights of shape `(n,)`, such as how often a resample has each score.
    """
    _, ranks = np.unique(scores, return_inverse=True)
    areas = []
    for weight in weights:
        positives = np.bincount(ranks, weight * is_positive)
        negatives = np.bincount(ranks, weight * ~is_positive)
        num_pairs = positives.sum() * negatives.sum()
        if num_pairs == 0:
            areas.append(float("nan"))
            continue
        # Ties count one half.
        lower_negatives = np.cumsum(negatives) - negatives / 2
        num_ordered_pairs = np.sum(positives * lower_negatives)
        area = num_ordered_pairs / num_pairs
        areas.append(float(area))
    return areas


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the mean precision over the positives, at the score of each positive. Ties are counted together.

    Args:
        scores: scores of shape `(n,)`.
        is_positive: bool of shape `(n,)`, at least one true.
    """
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]
    is_sorted_positive = is_positive[order]
    # The last index of each distinct score.
    score_changes = np.flatnonzero(np.diff(sorted_scores))
    last_indices = np.append(score_changes, len(scores) - 1)

    num_scores = last_indices + 1
    num_positives = np.cumsum(is_sorted_positive)[last_indices]
    new_positives = np.diff(num_positives, prepend=0)
    precision_sum = np.sum(new_positives * num_positives / num_scores)
    return float(precision_sum / num_positives[-1])


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """Return the log-odds of a class against all others, `(n,)`, from logits of shape `(n, classes)`."""
    other_logits = np.delete(logits, label, axis=1)
    return logits[:, label] - np.logaddexp.reduce(other_logits, axis=1)


def mean_area(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean one-against-rest area under the ROC curve over the classes that occur, ranked by log-odds.

    Args:
        logits: float of shape `(n, classes)`.
        labels: class indices, integers of shape `(n,)`.

    Returns:
        Mean area, NaN if fewer than two classes occur.
    """
    areas = []
    for label in np.unique(labels):
        scores = log_odds(logits, label)
        is_positive = labels == label
        area = area_under_curve(scores, is_positive)
        areas.append(area)
    return float(np.mean(areas))
