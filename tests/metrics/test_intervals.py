"""Tests of paired differences against formulas by hand and against simulated runs with a known difference."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from modeling_vitp.metrics.resampling import (
    RESAMPLES,
    Score,
    corrected_differences,
    paired_difference,
    resample,
    resample_mean,
)


def scores_of(images: np.ndarray) -> list[Score]:
    """Return the score of each seed, the mean over images, from values of shape `(seeds, images)`."""
    draws = resample(images.shape[1])
    return [Score(float(values.mean()), values[draws].mean(1).tolist(), images.shape[1]) for values in images]


def simulate(
    seed: int, difference: float, seeds: int = 3, run: float = 0.02, image: float = 0.1, images: int = 60
) -> tuple[list[Score], list[Score]]:
    """Return the scores of two models.

    Images are easy or hard for both models, one model is better on some images, each run is better or worse on all
    images, and each run differs on each image.
    """
    random = np.random.default_rng(seed)
    shared, gain = random.normal(0.6, 0.2, images), random.normal(difference, image, images)
    runs = random.normal(0, run, (2, seeds, 1)) + random.normal(0, image, (2, seeds, images))
    return scores_of(shared + gain + runs[0]), scores_of(shared + runs[1])


def test_interval_equals_formula():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(0.7, 0.1, (3, 40)), random.normal(0.6, 0.1, (3, 40))
    found = paired_difference(scores_of(ours), scores_of(theirs))
    differences = ours - theirs
    of_seeds = differences.mean(1).var(ddof=1) / 3
    of_images = np.var([differences[:, draw].mean() for draw in resample(40)], ddof=1)
    of_images *= 40 / 39
    half = math.sqrt(stats.t.ppf(0.975, 2) ** 2 * of_seeds + stats.t.ppf(0.975, 39) ** 2 * of_images)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert found.is_clear is (abs(found.mean) > half) and found.seeds == 3
    # The variance over resamples is that of a mean.
    assert of_images == pytest.approx(differences.mean(0).var(ddof=1) / 40, rel=0.1)


def test_single_seed_is_never_clear():
    ours, theirs = np.full((1, 20), 0.9), np.linspace(0.1, 0.3, 20)[None]
    found = paired_difference(scores_of(ours), scores_of(theirs))
    assert found.mean == pytest.approx(0.7) and found.low > 0.6 and not found.is_clear
    low, high = stats.t.interval(0.95, 19, 0, stats.sem(theirs[0]))
    assert (found.low - found.mean, found.high - found.mean) == pytest.approx((low, high), rel=0.05)


def test_equal_models_do_not_differ():
    scores = scores_of(np.random.default_rng(0).random((3, 20)))
    found = paired_difference(scores, scores)
    assert (found.mean, found.low, found.high, found.is_clear) == (0, 0, 0, False)


def test_images_add_nothing_to_seeds_if_all_are_equal():
    ours = np.repeat([[0.7], [0.8], [0.6]], 30, axis=1)
    found = paired_difference(scores_of(ours), scores_of(np.full((3, 30), 0.5)))
    low, high = stats.t.interval(0.95, 2, 0.2, stats.sem([0.2, 0.3, 0.1]))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)


def test_resamples_without_a_score_are_left_out():
    ours, theirs = (scores_of(np.random.default_rng(seed).random((2, 20))) for seed in range(2))
    expected = paired_difference(ours, theirs)
    for absent in (math.nan, None):
        found = paired_difference([Score(one.value, [*one.resampled[:-1], absent], 20) for one in ours], theirs)
        assert found.mean == expected.mean and found.high == pytest.approx(expected.high, rel=1e-2)


def test_gain_is_positive_if_a_lower_score_falls():
    ours, theirs = (scores_of(np.random.default_rng(seed).random((3, 20)) + seed) for seed in range(2))
    difference = paired_difference(ours, theirs)
    assert difference.mean < 0 and difference.as_gain() == difference
    ours, theirs = ([replace(score, greater_is_better=False) for score in scores] for scores in (ours, theirs))
    lower = paired_difference(ours, theirs)
    assert (lower.mean, lower.low, lower.high) == (difference.mean, difference.low, difference.high)
    gain = lower.as_gain()
    assert (gain.mean, gain.low, gain.high) == (-lower.mean, -lower.high, -lower.low)
    assert gain.is_clear and gain.as_gain() == gain


def test_scores_of_two_directions_are_refused():
    score = scores_of(np.random.default_rng(0).random((1, 20)))
    with pytest.raises(ValueError, match="higher.*lower"):
        paired_difference(score, [replace(score[0], greater_is_better=False)])


def test_scores_that_cannot_be_paired_are_refused():
    one, other, more = (Score(0.5, [0.5] * draws, cases) for draws, cases in ((RESAMPLES, 3), (10, 3), (RESAMPLES, 4)))
    for ours, theirs in (([one], [other]), ([one], [more]), ([one, one], [one]), ([], [])):
        with pytest.raises(ValueError, match="resamples"):
            paired_difference(ours, theirs)


@pytest.mark.parametrize(("seeds", "run", "image"), [(2, 0.05, 0.05), (3, 0.002, 0.1), (5, 0.02, 0.05)])
def test_intervals_contain_true_difference(seeds, run, image):
    """Nominally 95% of the intervals contain it; of 200, 190 ± 3."""
    found = [paired_difference(*simulate(trial, 0.03, seeds, run, image)) for trial in range(200)]
    assert sum(one.low <= 0.03 <= one.high for one in found) >= 187


def test_no_difference_is_rarely_clear():
    for run in (0.002, 0.02, 0.05):
        assert sum(paired_difference(*simulate(seed, 0, 3, run)).is_clear for seed in range(20)) <= 1
    assert all(paired_difference(*simulate(seed, 0.3)).is_clear for seed in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("num_baselines", [1, 2, 5])
@pytest.mark.parametrize("images", [8, 60])
def test_equal_baselines_are_rarely_clear(num_baselines, images):
    """Of 300 runs with equal backbones, at most 5% call any difference clear, whatever the number of baselines."""
    num_clear = 0
    for trial in range(300):
        random = np.random.default_rng(trial)
        shared = random.normal(0.6, 0.2, images)
        models = []
        for _ in range(num_baselines + 1):
            of_model = random.normal(0, 0.1, images)  # on which images a model is better
            of_runs = random.normal(0, 0.01, (3, 1)) + random.normal(0, 0.05, (3, images))
            models.append(scores_of(shared + of_model + of_runs))
        baselines = {str(index): model for index, model in enumerate(models[1:])}
        differences = corrected_differences(dict.fromkeys(baselines, models[0]), baselines)
        num_clear += any(difference.is_clear for difference in differences.values())
    assert num_clear <= 15


def test_correction_is_that_of_holm():
    """With p-values of .001, .02, .03 and .3, levels are 5% / 4, 5% / 3 and so on: the second one stops the tests."""
    images = np.random.default_rng(0).normal(0, 1, (1, 40)).repeat(3, 0)
    images = (images - images.mean()) / images.std(ddof=1)
    ours, theirs = {}, {}
    for p_value in (0.03, 0.001, 0.3, 0.02):
        mean = stats.t.ppf(1 - p_value / 2, 39) / math.sqrt(40)
        ours[str(p_value)] = scores_of(images + mean)
        theirs[str(p_value)] = scores_of(np.zeros((3, 40)))
    alone = {name: paired_difference(ours[name], theirs[name]) for name in ours}
    corrected = corrected_differences(ours, theirs)
    assert list(corrected) == list(theirs)
    assert [name for name in ours if alone[name].is_clear] == ["0.03", "0.001", "0.02"]
    assert [name for name in ours if corrected[name].is_clear] == ["0.001"]
    for name, difference in corrected.items():
        assert difference.is_clear == (difference.low > 0 or difference.high < 0)
        level = 0.05 / 4 if name == "0.001" else 0.05 / 3
        assert difference == paired_difference(ours[name], theirs[name], level)
    (only,) = corrected_differences({"a": ours["0.02"]}, {"a": theirs["0.02"]}).values()
    assert only == alone["0.02"]


@pytest.mark.slow
def test_tiles_of_few_scenes_are_not_as_many_images():
    """Equal models differ by scene and by tile. Resampled tiles would give too narrow intervals, scenes do not."""
    clear = []
    for scenes, tiles in ((120, 1), (4, 30)):
        clear.append([0, 0])
        for seed in range(200):
            random = np.random.default_rng(seed)
            of_scenes = [random.normal(0, 0.05, scenes).repeat(tiles) for _ in range(2)]
            found = [values + random.normal(0, 0.1, (3, scenes * tiles)) for values in of_scenes]
            by_scene = [values.reshape(3, scenes, tiles).mean(2) for values in found]
            for way, models in enumerate((found, by_scene)):
                clear[-1][way] += paired_difference(*map(scores_of, models)).is_clear
    assert clear == [[4, 4], [68, 3]]


def test_mean_is_resampled_over_cases():
    rng = np.random.default_rng(0)
    values, images = rng.normal(0.3, 1, 400), np.arange(400)
    resampled = resample_mean(values, images)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
    # Values of the same image are equal, so that draws are over images.
    assert resample_mean(np.repeat(values, 3), np.repeat(images, 3)) == pytest.approx(resampled)
