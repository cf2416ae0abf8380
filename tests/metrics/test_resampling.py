"""Tests of scores over resamples of cases against the metrics computed from scratch on repeated images."""

import evaluate
import numpy as np
import pytest
from metrics_run import METRICS
from sklearn.metrics import roc_auc_score

from modeling_vitp.metrics.ranking import weighted_areas
from modeling_vitp.metrics.resampling import BOX_RESAMPLES, RESAMPLES, resample

NUMBER, PARTS = 6, 2  # cases, and maps, windows or images of each case


def of_maps(random: np.random.Generator) -> dict:
    references = random.integers(0, 3, (PARTS, 5, 4))
    predictions = np.where(random.random(references.shape) < 0.6, references, random.integers(0, 3, references.shape))
    return {"predictions": predictions, "references": np.where(random.random(references.shape) < 0.1, 255, references)}


def of_boxes(random: np.random.Generator, masks: bool = False) -> dict:
    """Return images of three classes with many equal scores, and a crowd."""
    found = {"predictions": [], "references": []}
    for _ in range(PARTS):
        low = random.integers(0, 40, (7, 2)).astype(float)
        boxes = np.concatenate([low, low + random.integers(8, 24, (7, 2))], 1)
        labels, moved = random.integers(0, 3, 7), boxes + random.integers(-2, 3, (7, 1))
        sides = {
            "predictions": {"boxes": moved, "labels": labels, "scores": random.integers(1, 4, 7) / 4},
            "references": {"boxes": boxes[2:], "labels": labels[2:], "crowd": np.arange(5) == 0},
        }
        for key, side in sides.items():
            if masks:
                side["masks"] = np.zeros((len(side["boxes"]), 70, 70), bool)
                for mask, (left, top, right, bottom) in zip(side["masks"], side["boxes"].astype(int)):
                    mask[max(top, 0) : bottom, max(left, 0) : right] = True
            found[key].append(side)
    return found


def of_classes(random: np.random.Generator, multi_label: bool = False) -> dict:
    references = random.integers(0, 2, (PARTS, 3)) if multi_label else random.integers(0, 3, PARTS)
    return {"predictions": random.integers(0, 9, (PARTS, 3)) / 8 + np.arange(3) / 100, "references": references}


KINDS = {
    "mean_iou": (of_maps, {"ignore_index": 255}, {}),
    "dice": (of_maps, {"ignore_index": 255}, {}),
    "change_detection": (of_maps, {"ignore_index": 255}, {}),
    "classification": (of_classes, {}, {}),
    "multi-label classification": (of_classes, {"multi_label": True}, {"multi_label": True}),
    "average_precision": (of_boxes, {"iou_thresholds": (0.5, 0.75)}, {}),
    "coco_average_precision": (of_boxes, {}, {}),
    "masks coco_average_precision": (of_boxes, {"masks": True}, {"masks": True}),
}


def load(kind: str):
    return evaluate.load(str(METRICS / kind.split()[-1]), num_labels=3, **KINDS[kind][1])


def add(metric, kind: str, case: dict, index: int, copy: int = 0) -> None:
    """Add a case, part by part except for classes, which are added at once."""
    if "classification" in kind:
        metric.add_batch(**case, case_ids=[f"{index}/{copy}"] * len(case["references"]))
        return
    for part in range(PARTS):
        ids = {"image_ids": [f"{index}/{part}/{copy}"]} if "precision" in kind else {}
        one = {key: values[part : part + 1] for key, values in case.items()}
        metric.add_batch(**one, case_ids=[f"{index}/{copy}"], **ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resampled_scores_equal_repeated_images(kind):
    make, _, options = KINDS[kind]
    random = np.random.default_rng(0)
    cases = [make(random, **options) for _ in range(NUMBER)]
    metric = load(kind)
    for index in random.permutation(NUMBER):
        add(metric, kind, cases[index], index)
    result = metric.compute()
    np.testing.assert_equal(metric.compute_cases(np.arange(NUMBER)), result)
    score = metric.score_images()
    assert score.greater_is_better
    assert score.value == result[metric.main_score] and score.cases == NUMBER
    assert len(score.resampled) == (BOX_RESAMPLES if "precision" in kind else RESAMPLES)
    for draw, resampled in list(zip(resample(NUMBER, number=len(score.resampled)), score.resampled))[:6]:
        repeated = load(kind)
        for position, index in enumerate(draw):
            add(repeated, kind, cases[index], index, position)
        expected = repeated.compute()
        assert resampled == pytest.approx(expected[metric.main_score], abs=1e-12, nan_ok=True)
        found = metric.compute_cases(draw)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)
    assert len(set(score.resampled)) > 5
    np.testing.assert_equal(metric.compute_cases(np.arange(NUMBER)), result)


def test_cases_of_a_group_are_resampled_together():
    cases, groups = [of_maps(np.random.default_rng(index)) for index in range(4)], ["b", "a", "b", "a"]
    grouped, joined = load("dice"), load("dice")
    for index, (case, group) in enumerate(zip(cases, groups)):
        ids = {"case_ids": [f"{index}"] * PARTS, "group_ids": [group] * PARTS}
        grouped.add_batch(**case, **ids)
        joined.add_batch(**case, case_ids=ids["group_ids"])
    own = load("dice").compute(
        **{key: np.concatenate([case[key] for case in cases]) for key in cases[0]},
        case_ids=np.arange(4).repeat(PARTS).tolist(),
    )
    assert grouped.compute() == own != joined.compute()
    assert grouped.score_images() == joined.score_images() and grouped.score_images().cases == 2


def test_other_score_is_resampled_and_unknown_score_refused():
    metric = load("mean_iou")
    for index in range(NUMBER):
        metric.add_batch(**of_maps(np.random.default_rng(index)))
    result = metric.compute()
    assert metric.score_images("overall_accuracy").value == result["overall_accuracy"]
    for name in ("f1", "per_category_iou"):
        with pytest.raises(ValueError, match=f"{name}.*mean_iou, mean_accuracy, overall_accuracy"):
            metric.score_images(name)


def test_resamples_are_shared_and_uniform():
    draws = resample(50)
    assert draws.shape == (RESAMPLES, 50) and np.array_equal(draws, resample(50))
    assert not np.array_equal(draws, resample(50, seed=1))
    counts = np.bincount(draws.ravel(), minlength=50)
    assert abs(counts - RESAMPLES).max() < 5 * np.sqrt(RESAMPLES)


def test_weighted_areas_equal_scikit_learn():
    random = np.random.default_rng(0)
    scores, is_positive = random.integers(0, 9, 60) / 8, random.random(60) < 0.3
    weights = [random.integers(0, 4, 60) for _ in range(5)]
    expected = [roc_auc_score(is_positive, scores, sample_weight=weight) for weight in weights]
    np.testing.assert_allclose(weighted_areas(scores, is_positive, weights), expected, rtol=0, atol=1e-12)
    assert np.isnan(weighted_areas(scores, is_positive, [is_positive])[0])
