"""Tests of the surface distances against loops over all pairs of voxels in numpy."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
from metrics_run import METRICS

pytest.importorskip("monai")
SPACING = (3.0, 0.7, 0.9)


def load(**options):
    return evaluate.load(str(METRICS / "surface_distance"), **options)


def surface(mask):
    """Return the indices of voxels with a neighbor outside the mask or the array."""
    found = []
    for place in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbor = place.copy()
            neighbor[axis] += step
            if not 0 <= neighbor[axis] < mask.shape[axis] or not mask[tuple(neighbor)]:
                found.append(place)
                break
    return np.array(found)


def brute_force(prediction, reference, spacing, tolerance):
    """Return surface Dice and Hausdorff distance of two masks that are not empty."""
    if len(prediction) == 1:
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    ours, theirs = surface(prediction) * spacing, surface(reference) * spacing
    distances = np.sqrt(((ours[:, None] - theirs[None]) ** 2).sum(-1))
    there, back = distances.min(1), distances.min(0)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return near / (len(there) + len(back)), max(np.percentile(there, 95), np.percentile(back, 95))


def blobs(rng, shape, labels=3):
    """Return a label map of random boxes with noise."""
    found = np.zeros(shape, dtype=np.uint8)
    for label in range(1, labels):
        low = [rng.integers(0, max(length - 1, 1)) for length in shape]
        part = tuple(slice(start, start + rng.integers(1, 5)) for start in low)
        found[part] = label
    noise = rng.random(shape) < 0.02
    found[noise] = rng.integers(0, labels, noise.sum())
    return found


@pytest.mark.parametrize(("shape", "tolerance"), [((6, 9, 8), 1.0), ((1, 9, 8), 3.0), ((5, 1, 7), 3.0)])
def test_random_cases_equal_loop_over_pairs(shape, tolerance):
    rng = np.random.default_rng(sum(shape))
    metric = load(num_labels=3, tolerance=tolerance)
    scores = {1: [], 2: []}
    for _ in range(4):
        prediction, reference = blobs(rng, shape), blobs(rng, shape)
        metric.add_batch(predictions=[prediction], references=[reference], spacings=[SPACING])
        for label, found in scores.items():
            if (prediction == label).any() and (reference == label).any():
                found.append(brute_force(prediction == label, reference == label, SPACING, tolerance))
            elif (prediction == label).any() or (reference == label).any():
                found.append((0, math.dist((0, 0, 0), np.multiply(shape, SPACING))))
    result = metric.compute()
    expected = np.array([np.mean(found, axis=0) for found in scores.values()])
    np.testing.assert_allclose(result["per_category_surface_dice"][1:], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(result["per_category_hausdorff_95"][1:], expected[:, 1], rtol=1e-5)
    assert math.isnan(result["per_category_hausdorff_95"][0])
    assert result["mean_surface_dice"] == pytest.approx(expected[:, 0].mean(), rel=1e-5)
    assert result["mean_hausdorff_95"] == pytest.approx(expected[:, 1].mean(), rel=1e-5)


def test_class_in_one_map_or_neither():
    empty, cube = np.zeros((2, 4, 6), dtype=int), np.zeros((2, 4, 6), dtype=int)
    cube[:, 1:3, 1:4] = 1
    diagonal = math.sqrt((2 * 3) ** 2 + (4 * 0.7) ** 2 + (6 * 0.9) ** 2)
    cases = {
        "no prediction": (empty, cube, 0, diagonal, 1),
        "no truth": (cube, empty, 0, diagonal, 1),
        "both": (cube, cube, 1, 0, 0),
        "neither": (empty, empty, math.nan, math.nan, 0),
    }
    for name, (prediction, reference, surface_dice, hausdorff, missed) in cases.items():
        metric = load(num_labels=3)
        metric.add_batch(predictions=[prediction], references=[reference], spacings=[SPACING])
        result = metric.compute()
        assert result["per_category_surface_dice"][1] == pytest.approx(surface_dice, nan_ok=True), name
        assert result["mean_hausdorff_95"] == pytest.approx(hausdorff, nan_ok=True), name
        assert result["per_category_missed_cases"] == [0, missed, 0], name


def test_slice_order_and_ignored_voxels_are_handled():
    rng = np.random.default_rng(0)
    prediction, reference = blobs(rng, (5, 7, 6)), blobs(rng, (5, 7, 6))
    ignored = rng.random(reference.shape) < 0.1
    metric = load(num_labels=3, ignore_index=255)
    shown = np.where(ignored, 255, reference)
    for place in (3, 0, 4, 1, 2):
        metric.add_batch(
            predictions=prediction[[place]],
            references=shown[[place]],
            spacings=[SPACING],
            case_ids=["a"],
            places=[place],
        )
    whole = load(num_labels=3)
    without = [np.where(ignored, 0, values) for values in (prediction, reference)]
    whole.add_batch(predictions=without[:1], references=without[1:], spacings=[SPACING])
    np.testing.assert_equal(metric.compute(), whole.compute())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_processes_share_cases_and_slices(monkeypatch):
    """Check two threads, each with every other slice, that exchange their parts."""
    rng = np.random.default_rng(1)
    volumes = {case: (blobs(rng, (4, 6, 5)), blobs(rng, (4, 6, 5))) for case in "abc"}
    barrier, parts = threading.Barrier(2), {}

    def gather(part, num_process, name):
        if num_process == 1:
            return [part]
        parts[threading.get_ident()] = part
        barrier.wait()
        found = list(parts.values())
        barrier.wait()
        return found

    monkeypatch.setattr("modeling_vitp.metrics.base.gather_parts", gather)

    def run(process, metric):
        for case, (prediction, reference) in volumes.items():
            for place in range(process, 4, metric.num_process):
                metric.add_batch(
                    predictions=prediction[[place]],
                    references=reference[[place]],
                    spacings=[SPACING],
                    case_ids=[case],
                    places=[place],
                )
        return metric.compute()

    metrics = [load(num_labels=3, num_process=2, process_id=process) for process in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2), metrics))
    np.testing.assert_equal(results[0], results[1])
    np.testing.assert_equal(results[0], run(0, load(num_labels=3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacings": [(1, 0, 1)]}, r"map 0 of the batch: .*\(2, 3, 3\) and \(1, 0, 1\)"),
        ({"spacings": []}, "'spacings': 0"),
        ({"references": np.full((1, 2, 3, 3), 7)}, r"map 0 of the batch: .*reference.*\[7\]"),
        ({"case_ids": ["a"]}, "'places': 0"),
        ({"case_ids": ["a"], "places": [1]}, "slice 0 of case 'a'"),
    ],
)
def test_bad_volumes_are_refused(change, message):
    empty = np.zeros((1, 2, 3, 3), dtype=int)
    with pytest.raises(ValueError, match=message):
        load(num_labels=2).compute(**{"predictions": empty, "references": empty, "spacings": [(1, 1, 1)]} | change)


def test_lower_distances_are_better():
    metric = load(num_labels=2)
    assert metric.greater_is_better("mean_surface_dice") and metric.greater_is_better("surface_dice/liver")
    lower = ("mean_hausdorff_95", "hausdorff_95/liver", "per_category_hausdorff_95", "missed_cases/liver")
    assert not any(metric.greater_is_better(name) for name in lower)
