"""Tests of the classification metrics against scikit-learn and loops."""

from collections.abc import Sequence

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_run import METRICS
from sklearn.metrics import average_precision_score, roc_auc_score

from modeling_vitp.metrics.ranking import area_under_curve, average_precision, mean_area


def load(**options):
    return evaluate.load(str(METRICS / "classification"), **options)


@pytest.fixture(scope="module")
def metrics():
    return {several: load(num_labels=4, multi_label=several) for several in (False, True)}


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(1, 12), occurring=st.integers(1, 4))
def test_single_label_scores_equal_scikit_learn(metrics, seed, number, occurring):
    """Check also classes that do not occur or are not predicted, ties, and few images."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (number, 4)) / 4 + np.arange(4) / 100  # The highest score of each row is unique.
    labels = random.integers(0, occurring, number)
    found = scores.argmax(1)
    result = metrics[False].compute(predictions=scores, references=labels)
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, found))
    f1 = sklearn.metrics.f1_score(labels, found, labels=range(4), average=None, zero_division=np.nan)
    np.testing.assert_allclose(result["per_category_f1"], f1, atol=1e-12)
    assert result["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, found, average="macro"))
    check_areas(result, scores.T, (labels[:, None] == np.arange(4)).T)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    unknown=st.sampled_from([0.0, 0.4]),
)
def test_multi_label_scores_equal_scikit_learn(metrics, seed, number, share, unknown):
    """Check that unknown labels do not count in any score."""
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, 5, (number, 4)) / 4, (random.random((number, 4)) < share).astype(int)
    labels[random.random((number, 4)) < unknown] = -100
    labels[0, 0] = max(labels[0, 0], 0)
    found = (scores > 0.5).astype(int)
    result = metrics[True].compute(predictions=torch.tensor(scores), references=torch.tensor(labels).float())
    known = [np.flatnonzero(row >= 0) for row in labels]
    right = [(row == other)[places] for row, other, places in zip(labels, found, known) if len(places)]
    assert result["accuracy"] == pytest.approx(np.mean([row.all() for row in right]))
    assert result["label_accuracy"] == pytest.approx(np.concatenate(right).mean())
    if not unknown:
        assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, found))
        assert result["label_accuracy"] == pytest.approx(1 - sklearn.metrics.hamming_loss(labels, found))
    by_class = [(labels[:, k] >= 0) for k in range(4)]
    truths, founds, ranks = (
        [column[kept] for column, kept in zip(table.T, by_class)] for table in (labels, found, scores)
    )
    f1 = [sklearn.metrics.f1_score(a, b, zero_division=np.nan) if len(a) else np.nan for a, b in zip(truths, founds)]
    np.testing.assert_allclose(result["per_category_f1"], f1, atol=1e-12)
    counted = [value for value in f1 if not np.isnan(value)]
    assert result["macro_f1"] == pytest.approx(np.mean(counted) if counted else np.nan, nan_ok=True)
    check_areas(result, ranks, [column.astype(bool) for column in truths])
    precisions = [
        sklearn.metrics.average_precision_score(is_there, one) for is_there, one in zip(truths, ranks) if any(is_there)
    ]
    expected = np.mean(precisions) if precisions else np.nan
    assert result["mean_average_precision"] == pytest.approx(expected, nan_ok=True)


def check_areas(result: dict, scores: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> None:
    """Compare the areas with scikit-learn, given the scores and the truth of each class."""
    expected = [
        sklearn.metrics.roc_auc_score(is_there, one) if 0 < is_there.sum() < len(is_there) else np.nan
        for is_there, one in zip(truth, scores)
    ]
    np.testing.assert_allclose(result["per_category_auroc"], expected, atol=1e-12)
    counted = [value for value in expected if not np.isnan(value)]
    assert result["auroc"] == pytest.approx(np.mean(counted) if counted else np.nan, nan_ok=True)


def test_auroc_is_one_against_rest():
    random = np.random.default_rng(0)
    scores, labels = random.dirichlet(np.ones(5), 200), random.integers(0, 5, 200)
    result = load(num_labels=5).compute(predictions=scores, references=labels)
    assert result["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr"))


def test_batches_add_up_and_are_reset():
    random = np.random.default_rng(1)
    scores, labels = random.random((9, 3)), random.integers(0, 3, 9)
    metric = load(num_labels=3)
    for start in range(0, 9, 4):
        metric.add_batch(predictions=torch.tensor(scores[start : start + 4]), references=labels[start : start + 4])
    assert len(metric) == 9
    whole = load(num_labels=3).compute(predictions=scores, references=labels)
    assert metric.compute() == whole
    with pytest.raises(ValueError, match="classification"):
        metric.compute()


@pytest.mark.parametrize(
    ("several", "scores", "labels", "message"),
    [
        (False, [[0.1, 0.9]], [2], r"labels in \[0, 1\].*\[2\]"),
        (False, [[0.1, 0.9, 0.0]], [1], r"shape.*got \(1, 3\) and \(1,\)"),
        (False, [[0.1, float("nan")]], [1], "image 0 of the batch .*NaN"),
        (True, [[0.1, 0.9]], [1], r"labels of shape \(1, 2\), got .*\(1,\)"),
        (True, [[0.1, 0.9]], [[0, 0.5]], r"labels in \[0, 1\].*\[0.5\]"),
        (True, [[0.1, 0.9]], [[0, -1]], r"labels in \[0, 1\].*\[-1\]"),
    ],
)
def test_bad_labels_are_refused(several, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        load(num_labels=2, multi_label=several).add_batch(predictions=scores, references=labels)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_area_and_average_precision_equal_pairs_and_scikit_learn(items):
    scores, positive = np.array([item[0] for item in items], float), np.array([item[1] for item in items])
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    area = area_under_curve(scores, positive)
    assert np.isnan(area) if not pairs else area == pytest.approx(np.mean(pairs))
    if positive.any():
        assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_mean_area_equals_scikit_learn(num_classes):
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
