import json
import math

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import finish, start_program
from metrics_run import METRICS, score
from paths import HELPERS

from modeling_vitp.metrics import pixel_metrics

NAN = float("nan")


def load(name, **options):
    return evaluate.load(str(METRICS / name), **options)


@pytest.fixture(scope="module")
def metrics():
    options = {"num_labels": 4, "ignore_index": 255}
    return {name: load(name, **options) for name in ("mean_iou", "dice", "change_detection")}


@st.composite
def label_maps(draw):
    """Draw label maps of different sizes with up to four classes and with ignored pixels."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    occurring = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    predictions, references = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = random.integers(1, 7, 2)
        predictions.append(random.choice(occurring, size))
        reference = random.choice(occurring, size)
        references.append(np.where(random.random(size) < ignored, 255, reference))
    return predictions, references


def loop_areas(predictions, references, label):
    """Count the pixels of a class in both maps, in the prediction and in the reference."""
    both = predicted = labeled = 0
    for prediction, reference in zip(predictions, references):
        for left, right in zip(prediction.flatten(), reference.flatten()):
            if right != 255:
                both += left == right == label
                predicted += left == label
                labeled += right == label
    return int(both), int(predicted), int(labeled)


def divide(numerator, denominator):
    return numerator / denominator if denominator else NAN


def mean(values):
    counted = [value for value in values if not math.isnan(value)]
    return divide(sum(counted), len(counted))


def check(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, abs=1e-12, rel=0, nan_ok=True), name


@settings(deadline=None, max_examples=25)
@given(maps=label_maps())
def test_mean_iou_equals_a_loop(metrics, maps):
    areas = [loop_areas(*maps, label) for label in range(4)]
    iou = [divide(both, predicted + labeled - both) for both, predicted, labeled in areas]
    accuracy = [divide(both, labeled) for both, _, labeled in areas]
    expected = {
        "mean_iou": mean(iou),
        "mean_accuracy": mean(accuracy),
        "overall_accuracy": divide(sum(both for both, *_ in areas), sum(labeled for *_, labeled in areas)),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }
    check(metrics["mean_iou"].compute(predictions=maps[0], references=maps[1]), expected)


@settings(deadline=None, max_examples=25)
@given(maps=label_maps(), cases=st.lists(st.sampled_from("ab"), min_size=4, max_size=4), given_cases=st.booleans())
def test_dice_equals_a_loop(metrics, maps, cases, given_cases):
    cases = cases[: len(maps[0])] if given_cases else list(range(len(maps[0])))

    def dice(places, label):
        both, predicted, labeled = loop_areas(*([one[place] for place in places] for one in maps), label)
        return divide(2 * both, predicted + labeled)

    of_data_set = [dice(range(len(cases)), label) for label in range(4)]
    of_cases = []
    for label in range(4):
        places = [[place for place, case in enumerate(cases) if case == one] for one in sorted(set(cases))]
        of_cases.append(mean([dice(part, label) for part in places]))
    expected = {
        "mean_dice": mean(of_data_set),
        "mean_dice_foreground": mean(of_data_set[1:]),
        "mean_dice_by_case": mean(of_cases),
        "mean_dice_by_case_foreground": mean(of_cases[1:]),
        "per_category_dice": of_data_set,
        "per_category_dice_by_case": of_cases,
    }
    metric = metrics["dice"]
    for place, case in enumerate(cases):  # One map per batch, so a case is in several batches.
        ids = {"case_ids": [case]} if given_cases else {}
        metric.add_batch(predictions=[maps[0][place]], references=[maps[1][place]], **ids)
    check(metric.compute(), expected)


@settings(deadline=None, max_examples=25)
@given(maps=label_maps())
def test_change_detection_equals_a_loop(metrics, maps):
    both, predicted, labeled = loop_areas(*maps, 1)
    expected = {
        "f1": divide(2 * both, predicted + labeled),
        "precision": divide(both, predicted),
        "recall": divide(both, labeled),
        "iou": divide(both, predicted + labeled - both),
    }
    check(metrics["change_detection"].compute(predictions=maps[0], references=maps[1]), expected)


def test_change_class_is_found_by_name():
    for names, label in ((["Change", "unchanged"], 0), (["a", "b"], 1), (["a", "b", "Changed"], 2)):
        metric = load("change_detection", num_labels=len(names))
        metric.set_names(names)
        assert metric.change_label == label
    with pytest.raises(ValueError, match="razed"):
        load("change_detection", num_labels=3).set_names(["unchanged", "built", "razed"])


def test_scores_equal_scikit_learn():
    random = np.random.default_rng(0)
    prediction, reference = random.integers(0, 4, (2, 3, 20, 30))
    flat = (reference.flatten(), prediction.flatten())
    iou = load("mean_iou", num_labels=5).compute(predictions=prediction, references=reference)
    expected = sklearn.metrics.jaccard_score(*flat, labels=range(4), average=None)
    np.testing.assert_allclose(iou["per_category_iou"], [*expected, NAN], rtol=0, atol=1e-12)
    assert iou["mean_iou"] == pytest.approx(expected.mean(), abs=1e-12)
    assert iou["mean_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(*flat), abs=1e-12)
    assert iou["overall_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*flat), abs=1e-12)
    dice = load("dice", num_labels=4).compute(predictions=prediction, references=reference)
    np.testing.assert_allclose(dice["per_category_dice"], sklearn.metrics.f1_score(*flat, average=None), atol=1e-12)
    flat = [values == 1 for values in flat]
    change = load("change_detection").compute(predictions=prediction == 1, references=reference == 1)
    for name in ("f1", "precision", "recall"):
        expected = getattr(sklearn.metrics, f"{name}_score")(*flat)
        assert change[name] == pytest.approx(expected, abs=1e-12), name
    assert change["iou"] == pytest.approx(sklearn.metrics.jaccard_score(*flat), abs=1e-12)


def test_metric_resets_and_keeps_no_maps():
    metric = load("mean_iou", num_labels=2)
    for _ in range(3):
        metric.add_batch(predictions=torch.zeros(2, 500, 500).long(), references=torch.zeros(2, 500, 500).byte())
        metric.add(prediction=[[1]], reference=[[1]])
    assert sum(areas.nbytes for areas in metric.kept.values()) == 9 * 3 * 2 * 8
    assert metric.writer is None
    assert metric.compute()["per_category_iou"] == [1.0, 1.0]
    assert metric.compute(predictions=[[[0, 1]]], references=[[[1, 1]]])["per_category_iou"] == [0.0, 0.5]
    with pytest.raises(ValueError, match="mean_iou"):
        metric.compute()


@pytest.mark.parametrize(
    "options, prediction, reference, message",
    [
        ({}, [[0, 1]], [[0, 7]], r"map 1 of the batch: .*reference in \[0, 2\).*\[7\]"),
        ({"ignore_index": 255}, [[0, -1]], [[0, 1]], r"ignore_index=255.*\[-1\]"),
        ({}, [[0, 1]], [[0, 1, 1]], r"\(1, 3\), got \(1, 2\)"),
        ({}, [[0.5, 0.5]], [[0, 1]], "prediction .*torch.float64"),
    ],
)
def test_bad_maps_are_refused(options, prediction, reference, message):
    good = [[0, 1]]
    with pytest.raises(ValueError, match=message):
        load("change_detection", **options).add_batch(predictions=[good, prediction], references=[good, reference])


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="'predictions': 1, 'references': 2"):
        load("change_detection").add_batch(predictions=[[[0]]], references=[[[0]], [[0]]])
    with pytest.raises(ValueError, match="'case_ids': 1"):
        load("dice", num_labels=2).add_batch(predictions=[[[0]]] * 2, references=[[[0]]] * 2, case_ids=["a"])
    with pytest.raises(ValueError, match="'group_ids': 1"):
        load("dice", num_labels=2).add_batch(predictions=[[[0]]] * 2, references=[[[0]]] * 2, group_ids=["a"])


@pytest.mark.slow
def test_two_processes_score_like_one(tmp_path):
    words, output = [HELPERS / "metrics_run.py", tmp_path], tmp_path / "output.txt"
    assert finish([start_program([*words, rank], output) for rank in range(2)]) == [0, 0], output.read_text()[-5000:]
    expected = score([range(7)])
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, scores in expected.items():
            check(result[name], scores)


def test_missing_processes_are_refused():
    metric = load("mean_iou", num_labels=2, num_process=2, process_id=0)
    metric.add_batch(predictions=[[[0]]], references=[[[0]]])
    with pytest.raises(ValueError, match="num_process=2"):
        metric.compute()


def test_method_without_docstring_is_named():
    with pytest.raises(ValueError, match="EdgeError.*'add_batch'"):

        class EdgeError(pixel_metrics.PixelMetric):
            def add_batch(self, *, predictions, references, case_ids=None, group_ids=None):
                pass
