"""How well scores rank what is of a class above what is not."""

import numpy as np


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Area under the receiver operating characteristic: the probability that a positive outranks a negative.

    Ties count one half (Mann and Whitney). NaN without positives or without negatives.

    Args:
        scores: of shape `(n,)`.
        is_positive: bool of shape `(n,)`.
    """
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # of ties the mean
    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The mean over the positives of the precision from their score upwards, ties being taken together.

    Args:
        scores: of shape `(n,)`.
        is_positive: bool of shape `(n,)`, with a positive at least.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of those with a score
    found = np.cumsum(is_positive[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """Of a class against the others, `(n,)`, by logits of shape `(n, classes)`."""
    return logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)


def mean_area(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes that occur of the area of each against the rest, ranked by its log-odds.

    Args:
        logits: float of shape `(n, classes)`.
        labels: classes, integers of shape `(n,)`.

    Returns:
        NaN if fewer than two classes occur.
    """
    areas = [area_under_curve(log_odds(logits, label), labels == label) for label in np.unique(labels)]
    return float(np.mean(areas))
