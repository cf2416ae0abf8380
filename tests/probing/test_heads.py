"""Heads of the probes, compared with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitp.probing.heads import fit_linear, fit_nonlinear, nearest_neighbours


@pytest.mark.parametrize(("number", "neighbours"), [(60, 7), (5, 20)])
def test_nearest_neighbors_match_scikit_learn(number, neighbours):
    rng = np.random.default_rng(0)
    features, queries = rng.normal(size=(number, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    labels = rng.integers(0, 4, number)
    labels[:4] = range(4)
    oracle = KNeighborsClassifier(
        min(neighbours, number),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.2),
    ).fit(features, labels)
    votes = nearest_neighbours(features, np.eye(4, dtype=bool)[labels], queries, neighbours, temperature=0.2)
    np.testing.assert_allclose(votes, oracle.predict_proba(queries), atol=1e-5)
    assert len(np.unique(votes.argmax(1))) > 1


def test_neighbors_vote_for_several_classes():
    rng = np.random.default_rng(0)
    features, queries = rng.normal(size=(60, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    presence = rng.random((60, 3)) < [0.7, 0.4, 0.1]
    oracle = KNeighborsRegressor(
        7,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.2),
    ).fit(features, presence.astype(float))
    votes = nearest_neighbours(features, presence, queries, 7, temperature=0.2)
    np.testing.assert_allclose(votes, oracle.predict(queries), atol=1e-5)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_linear_probe_matches_scikit_learn(l2):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(90, 6)) * rng.uniform(0.1, 50, 6) + 100).astype(np.float32)
    features[:, 4] = 3.0  # The feature is constant.
    labels = (features[:, 0] > np.median(features[:, 0])) * 1 + (features[:, 1] > np.quantile(features[:, 1], 0.8))
    used = np.arange(10, 90)
    regression = LogisticRegression(C=1 / (len(used) * l2), tol=1e-10, max_iter=10000)
    oracle = make_pipeline(StandardScaler(), regression).fit(features[used].astype(float), labels[used])
    probe = fit_linear(features, np.eye(3, dtype=np.float32)[labels], used, l2)
    np.testing.assert_allclose(probe.weight, oracle[1].coef_ - oracle[1].coef_.mean(0), atol=2e-3)
    probabilities = probe(torch.tensor(features)).softmax(-1)
    np.testing.assert_allclose(probabilities, oracle.predict_proba(features.astype(float)), atol=1e-3)


def test_linear_probe_of_several_classes_matches_scikit_learn():
    """Compare with a regression of each class. Unknown labels, and images of which all are unknown, are left out."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(90, 6))
    features = (values * rng.uniform(0.1, 50, 6) + 100).astype(np.float32)
    labels = (values[:, :3] + rng.normal(size=(90, 3)) > [-0.5, 0.0, 1.3]) * 1.0
    labels[20] = 0
    for is_complete in (True, False):
        used = np.arange(10, 90)
        if not is_complete:
            labels[rng.random(labels.shape) < 0.2] = -100
            labels[30] = -100
        counts = np.concatenate([labels == 1, labels == 0], axis=1).astype(np.float32)
        probe = fit_linear(features, counts, used, 1e-2, multi_label=True)
        used = used[(labels[used] != -100).any(1)]
        num_labels = (labels[used] != -100).sum() / 3
        assert num_labels == 80 or not is_complete
        inputs = StandardScaler().fit(features[used].astype(float)).transform(features.astype(float))
        probabilities = probe(torch.tensor(features)).sigmoid()
        for label in range(3):
            known = used[labels[used, label] != -100]
            oracle = LogisticRegression(C=1 / (num_labels * 1e-2), tol=1e-10, max_iter=10000)
            expected = oracle.fit(inputs[known], labels[known, label]).predict_proba(inputs)[:, 1]
            np.testing.assert_allclose(probabilities[:, label], expected, atol=1e-3)


def test_linear_probe_of_patches_equals_that_of_pixels(monkeypatch):
    """Use pixel counts as weights; unlabeled positions and the number of rows per part have no effect."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 3, 2, 4)).astype(np.float32)
    counts = rng.integers(0, 4, (5, 3, 2, 3)).astype(np.float32)
    counts[1, 2] = 0
    used = np.array([1, 2, 4])
    rows, pixels = features[used].reshape(-1, 4).astype(float), counts[used].reshape(-1, 3)
    labelled = pixels.sum(1) > 0
    scaler = StandardScaler().fit(rows[labelled])
    repeated = [
        (row, label) for row, count in zip(rows, pixels) for label in range(3) for _ in range(int(count[label]))
    ]
    inputs, labels = scaler.transform([row for row, _ in repeated]), [label for _, label in repeated]
    oracle = LogisticRegression(C=1 / (len(labels) * 0.01), tol=1e-10, max_iter=10000).fit(inputs, labels)
    expected = oracle.predict_proba(scaler.transform(features.reshape(-1, 4))).reshape(5, 3, 2, 3)
    for rows_at_once in (65536, 6):
        monkeypatch.setattr("modeling_vitp.probing.heads.ROWS_AT_ONCE", rows_at_once)
        probe = fit_linear(features, counts, used, l2=0.01)
        np.testing.assert_allclose(probe(torch.tensor(features)).softmax(-1), expected, atol=1e-3)
    with pytest.raises(ValueError, match="No labels"):
        fit_linear(features, np.zeros_like(counts), used)


def test_nonlinear_probe_learns_xor():
    """Learn XOR at labeled positions, with equal results for equal seeds."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5, 4, 3)).astype(np.float32) * [1, 10, 0.1] + [0, 5, 0]
    features = features.astype(np.float32)
    labels = ((features[..., 0] > 0) != (features[..., 1] > 5)).astype(int)
    counts = np.eye(2, dtype=np.float32)[labels] * rng.integers(0, 3, labels.shape)[..., None]
    used = np.arange(30)
    state = torch.get_rng_state()
    probe = fit_nonlinear(features, counts, used)
    assert torch.equal(torch.get_rng_state(), state)
    held_out = torch.tensor(features[30:])

    def accuracy(reader):
        return (reader(held_out).argmax(-1).numpy() == labels[30:]).mean()

    assert accuracy(probe) > 0.9
    assert accuracy(fit_linear(features, counts, used)) < 0.65
    states = []
    for seed in (0, 0, 1):
        torch.rand(5)
        states.append(fit_nonlinear(features, counts, used, steps=20, seed=seed)(held_out))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_nonlinear_probe_uses_only_labeled_positions():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 4, 4, 3)).astype(np.float32)
    counts = rng.integers(0, 3, (6, 4, 4, 2)).astype(np.float32)
    counts[:, 0] = 0
    used = np.array([0, 2, 5])
    expected = fit_nonlinear(features, counts, used, steps=20)(torch.tensor(features))
    features_of_others = features.copy()
    features_of_others[[1, 3, 4]] = np.nan
    features_of_others[:, 0] = np.nan
    probe = fit_nonlinear(features_of_others, counts, used, steps=20)
    assert torch.equal(probe(torch.tensor(features)), expected)
