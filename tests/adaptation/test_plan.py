"""Arguments, plan and progress of an adaptation."""

import json

import pytest
import torch

from modeling_vitp import ViTPImageProcessor
from modeling_vitp.adaptation import plan
from modeling_vitp.adaptation.arguments import AdaptArguments, read_budget
from modeling_vitp.adaptation.plan import Costs, choose_samples, choose_steps, choose_tiling
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


def runs(seeds: int) -> int:
    return 3 * (2 + seeds)


def test_steps_fill_the_budget():
    chosen = choose_steps(10_000, Costs(2.0, 0.5, 10.0), 10**6, 20, True, runs)
    assert chosen["steps"] == 0.5 * 10_000 / (2 * 2.0)
    assert chosen["fine_tuning_steps"] == int((0.35 * 10_000 / 15 - 10) / 0.5)
    assert chosen["seeds"] == [0, 1, 2]


def test_seeds_are_fewer_before_steps_are_too_few():
    costs = Costs(1.0, 1.0, 0.0)
    assert choose_steps(1500, costs, 100, 40, False, runs)["seeds"] == [0, 1]
    assert choose_steps(10**9, costs, 100, 40, False, runs)["steps"] == plan.MOST_EPOCHS * 100
    with pytest.raises(ValueError, match="budget: .*9 fine-tunings"):
        choose_steps(20, costs, 100, 40, False, runs)


def test_given_seeds_share_the_budget():
    chosen = choose_steps(10_000, Costs(2.0, 0.5, 10.0), 10**6, 20, True, runs, 6)
    assert chosen["fine_tuning_steps"] == int((0.35 * 10_000 / 24 - 10) / 0.5)
    with pytest.raises(ValueError, match="budget: .*24 fine-tunings"):
        choose_steps(600, Costs(2.0, 0.5, 10.0), 10**6, 20, True, runs, 6)


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
