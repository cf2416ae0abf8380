"""Arguments, plan and progress of an adaptation."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from modeling_vitp import ViTPImageProcessor
from modeling_vitp.adaptation import plan
from modeling_vitp.adaptation.arguments import AdaptArguments, read_budget
from modeling_vitp.adaptation.plan import (
    Costs,
    NumRuns,
    choose_fine_tuning_steps,
    choose_samples,
    choose_steps,
    choose_tiling,
    measure_costs,
    measure_runs,
)
from modeling_vitp.evaluation.comparison import Progress

GIVEN = {"data": "folder", "start": "vit", "output_dir": "out"}


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("90min", 5400), ("1.5d", 129600), ("600 s", 600)])
def test_budget_is_read(text, seconds):
    assert read_budget(text) == seconds


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"budget": "24"}, "budget"),
        ({"budget": "0h"}, "budget"),
        ({"start": None}, "start"),
        ({"baselines": []}, "baselines"),
        ({"baselines": ["mae", "mae"]}, "baselines"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    with pytest.raises((ValueError, OSError), match=name):
        AdaptArguments(**GIVEN | changes)


def test_settings_of_a_configuration_exclude_data_and_steps():
    settings = {"pretraining": "quickstart", "fine_tuning": "rsar", "label_fractions": [0.1]}
    args = AdaptArguments(data="folder", output_dir="out", **settings)
    assert args.pretraining["from_scratch"]["vision_config"]["hidden_size"] == 192
    assert not {"task", "dataset_name", "max_steps", "output_dir"} & args.pretraining.keys()
    assert args.label_fractions == [1.0, 0.1]
    assert args.fine_tuning["layer_decay"] == 0.95
    assert not {"test_split", "train_splits", "learning_rate"} & args.fine_tuning.keys()


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [((112, 112), 49, (1, 0.75)), ((500, 460), 256, (12, 0.75)), ((224, 224), 16, (4, 0.5)), ((60, 60), 8, (1, 0.0))],
)
def test_tiles_and_drop_ratio_follow_the_images(size, tokens, expected):
    chosen = choose_tiling(size, ViTPImageProcessor(size={"height": 112, "width": 112}), tokens)
    assert (chosen["max_patches"], chosen["vrl_drop_ratio"]) == expected


@pytest.mark.parametrize(("rows", "samples"), [(3, 8), (200, 8), (600, 32), (10**6, 128)])
def test_samples_of_a_step_follow_the_rows(rows, samples):
    assert choose_samples(rows) == samples


def runs(seeds: int) -> NumRuns:
    """Return the runs of each backbone: two other learning rates, and each seed, which is also scored."""
    return NumRuns(2 + seeds, seeds)


def test_steps_fill_the_budget():
    """Costs of the fine-tuning are those of all backbones."""
    chosen = choose_steps(10_000, Costs(2.0, 1.5, 30.0), 10**6, 20, 2, runs)
    assert chosen["steps"] == 0.5 * 10_000 / (2 * 2.0)
    assert chosen["fine_tuning_steps"] == int((0.35 * 10_000 - (5 + 3) * 30) / (5 * 1.5))
    assert chosen["seeds"] == [0, 1, 2]


def test_seeds_are_fewer_before_steps_are_too_few():
    costs = Costs(1.0, 3.0, 0.0)
    assert choose_steps(1500, costs, 100, 40, 1, runs)["seeds"] == [0, 1]
    assert choose_steps(10**9, costs, 100, 40, 1, runs)["steps"] == plan.MOST_EPOCHS * 100
    with pytest.raises(ValueError, match="budget: 20 s are left.* 3 fine-tunings"):
        choose_steps(20, costs, 100, 40, 1, runs)


def test_given_seeds_share_the_budget():
    costs = Costs(2.0, 1.5, 30.0)
    chosen = choose_steps(10_000, costs, 10**6, 20, 2, runs, 6)
    assert chosen["fine_tuning_steps"] == int((0.35 * 10_000 - (8 + 6) * 30) / (8 * 1.5))
    with pytest.raises(ValueError, match="budget: .*8 fine-tunings"):
        choose_steps(600, costs, 10**6, 20, 2, runs, 6)


def test_fine_tunings_have_fewer_steps_if_less_time_is_left(tmp_path):
    args = AdaptArguments(**GIVEN, budget="1000s", learning_rates=[1e-4])
    planned = {"seeds": [0], "fine_tuning_steps": 500}
    for spent_seconds, steps in ((0, 500), (450, 430), (5000, 1)):
        progress = Progress(tmp_path / f"{spent_seconds}.json")
        progress.result("plan/costs", lambda: {"step": 1.0, "fine_tuning_step": 1.0, "evaluation": 10.0})
        for later in (0, 100):  # The second call is that of a resumed run.
            clock = partial(int, spent_seconds + later)
            assert choose_fine_tuning_steps(args, planned, progress, clock) == steps
    given = AdaptArguments(**GIVEN, fine_tuning_steps=7)
    assert choose_fine_tuning_steps(given, planned, Progress(tmp_path / "none.json"), lambda: 0) == 7


@pytest.mark.parametrize(
    ("seconds", "measured"),
    [
        (10_000, [(1, 2), (3, 64)]),
        (120, [(1, 2), (1, 64)]),
        (60, [(1, 2), (1, 36)]),  # 24 seconds are for the first run, and for loading in the second one
        (10, [(1, 2)]),
    ],
)
def test_measurement_begins_small_and_keeps_its_time(tmp_path, monkeypatch, seconds, measured):
    """A run takes 11 seconds to load and to score, and 1 second for each sample."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(plan.time, "monotonic", lambda: clock.now)
    taken = []

    def run(settings, output):
        batch, steps = settings["global_batch_size"], settings["max_steps"]
        assert settings["per_device_train_batch_size"] <= 64 and settings["learning_rate"] == 1.0
        taken.append((steps, batch))
        clock.now += 11 + steps * batch
        return {"train": {"train_runtime": steps * batch}}

    settings = {"per_device_train_batch_size": 64, "learning_rate": 1.0, "gradient_accumulation_steps": 3}
    step, rest = measure_runs(run, settings, 64, tmp_path / "run", seconds)
    assert taken == measured and (step, rest) == (64, 11)
    assert clock.now <= max(seconds, 13)


def test_slow_first_step_of_a_process_is_not_measured(tmp_path):
    """The first run is slower than the second one with more samples, as with the kernels that are made then."""
    seconds_of_runs = iter([20.0, 16.0])

    def run(settings, output):
        return {"train": {"train_runtime": next(seconds_of_runs)}}

    step, _ = measure_runs(run, {"per_device_train_batch_size": 8}, 8, tmp_path / "run", 125)
    assert step == 16


def test_plan_measures_all_backbones(tmp_path, monkeypatch):
    """Adapted, start and random weights have the costs of the start, and the other ViT has its own."""
    monkeypatch.setattr(plan, "measure_runs", lambda run, settings, *args: settings["costs"])
    monkeypatch.setattr(plan, "settings_of_backbone", lambda task, settings, backbone: {"costs": backbone})
    (tmp_path / "plan").mkdir()
    arguments = SimpleNamespace(training_args=SimpleNamespace(per_device_train_batch_size=4))
    pretraining = SimpleNamespace(
        folder=tmp_path / "plan",
        settings=lambda **settings: {"costs": (2.0, 9.0)},
        parse=lambda settings, steps: arguments,
    )
    backbones = SimpleNamespace(
        models=dict.fromkeys(["adapted", "vit", "random", "large"]),
        others=["large"],
        of_each_shape=lambda: [(1.0, 10.0), (5.0, 20.0)],
    )
    fine_tuning = {"per_device_train_batch_size": 8}
    costs = measure_costs(pretraining, {"global_batch_size": 8}, "classification", fine_tuning, backbones, 60)
    assert costs == Costs(2.0, 3 * 1.0 + 5.0, 3 * 10.0 + 20.0)


def test_finished_parts_are_not_run_again(tmp_path):
    calls = []

    def run() -> dict:
        calls.append(1)
        return {"score": 0.5}

    for _ in range(2):
        progress = Progress(tmp_path / "progress.json")
        assert progress.result("fine_tuning/a", run) == {"score": 0.5}
    assert calls == [1]
    stored = json.loads((tmp_path / "progress.json").read_text())
    assert progress.seconds("fine_tuning") == stored["fine_tuning/a"]["seconds"]
    with pytest.raises(RuntimeError):
        progress.result("mae", lambda: torch.zeros(2) @ torch.zeros(3))
    assert "mae" not in Progress(tmp_path / "progress.json").parts
    progress.forget("fine_tuning/a")
    assert Progress(tmp_path / "progress.json").result("fine_tuning/a", lambda: 2) == 2
