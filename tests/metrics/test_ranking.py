"""Areas under curves, against scikit-learn and a loop over pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from modeling_vitp.metrics.ranking import area_under_curve, average_precision, mean_area


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_the_area_is_the_share_of_pairs_in_the_right_order(items):
    scores, positive = np.array([item[0] for item in items], float), np.array([item[1] for item in items])
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    area = area_under_curve(scores, positive)
    assert np.isnan(area) if not pairs else area == pytest.approx(np.mean(pairs))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_the_average_precision_is_that_of_scikit_learn(items):
    scores, positive = np.array([item[0] for item in items], float), np.array([item[1] for item in items])
    if positive.any():
        assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_mean_over_classes_is_that_of_scikit_learn(num_classes):
    rng = np.random.default_rng(num_classes)
    logits, labels = rng.normal(size=(200, num_classes)), rng.integers(0, num_classes, 200)
    logits[np.arange(200), labels] += 1
    odds = logits - np.log([np.exp(np.delete(logits, k, 1)).sum(1) for k in range(num_classes)]).T
    expected = [roc_auc_score(labels == label, odds[:, label]) for label in range(num_classes)]
    assert mean_area(logits, labels) == pytest.approx(np.mean(expected))
    if num_classes == 2:
        assert expected[0] == pytest.approx(expected[1])
    unseen = np.where(labels == 0, 1, labels)
    if num_classes == 4:
        expected = [roc_auc_score(unseen == label, odds[:, label]) for label in (1, 2, 3)]
        assert mean_area(logits, unseen) == pytest.approx(np.mean(expected))
    else:
        assert np.isnan(mean_area(logits, unseen))
