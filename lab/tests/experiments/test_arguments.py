"""Mistakes in plans of experiments and in options of benchmarks: one line that names the mistake."""

import json
import math
import random
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from fuzzing import limits, mutate, one_input
from paths import PLANS, ROOT, TREES_BASE
from wrong_settings import wrong_values

from lab.benchmarks import benchmark, benchmark_loader
from lab.command import TREES_BASE as BASE
from lab.command import find_config, with_config
from lab.experiments import experiment
from lab.experiments.arguments import ArmSettings, ExperimentArguments, FinetuningPlan, TreeFinetuningPlan
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.command.settings import declarations_of
from modeling_vitp.training.command_line import parse

PLAN = {"output_dir": "o", "claim": "c", "against": "a", "arms": {"quickstart": None}, "control": "quickstart"}
PLAN |= {"measures": {"auc": "task.auc"}}
FINETUNING = {"config": "aerial_trees", "learning_rates": [1e-4], "layer_decays": [1.0], "label_shares": [1.0]}
FINETUNING |= {"held_out_scene": "s", "held_out_top": 0}


VALID = {ExperimentArguments: PLAN, ArmSettings: {}, TreeFinetuningPlan: FINETUNING}
VALID[FinetuningPlan] = {"data": "labels", "learning_rates": [1e-4], "steps": 3}


@pytest.mark.parametrize("cls", VALID)
def test_wrong_value_is_named(cls):
    cls(**VALID[cls])
    for name, declaration in declarations_of(cls).items():
        for value in wrong_values(declaration):
            with pytest.raises(ValueError, match=name):
                cls(**VALID[cls] | {name: value})


@pytest.mark.parametrize(
    "settings",
    [{"probe_color_jitter": {"gain": 2}}, {"probe_color_jitter": {"hue": 0.1}}, {"control": "none"}],
)
def test_bad_value_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        ExperimentArguments(**PLAN | settings)


ARMS = {"arms": {"x": {"label_share": 0.5}}, "measures": {"m": "a.b"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": {"x": 3}}, "arms: x .*got 3"),
        ({"arms": {"x": None}, "measures": {"m": 3}}, "measures: m .*got 3"),
        ({"base": "empty.yaml"}, "task and dataset_name.*empty.yaml"),
        ({"arms": {"x": {"label_share": 2}}}, "label_share.*got 2"),
        ({"arms": {"x": {"without_scenes": "y"}}}, "without_scenes.*list.*'y'"),
        ({"arms": {"x": {"objective": "y"}}}, "objective.*masks.*'y'"),
        ({"finetuning": FINETUNING | {"config": "nofile"}}, "'nofile'"),
    ],
)
def test_mistake_in_plan_is_one_line(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("{}")
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN | {"control": "x"} | ARMS | settings))
    with pytest.raises(ValueError, match=message) as found:
        experiment.main(["--config", "plan.yaml"])
    assert len(str(found.value).splitlines()) == 1 and sorted(tmp_path.iterdir()) == [
        tmp_path / "empty.yaml",
        tmp_path / "plan.yaml",
    ]


def test_plans_are_found_by_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = PLANS / "experiment_colors.yaml"
    assert find_config("experiment_colors") == plan and find_config(BASE) == TREES_BASE
    assert find_config("lab/experiments/configs/experiment_colors.yaml") == plan
    assert find_config("loveda").samefile(ROOT / "recipes/configs/loveda.yaml")
    words = ["--seeds", "0", "--config"]
    assert with_config([*words, "experiment_colors"]) == [*words, str(plan)]
    assert with_config(["--config=experiment_colors"]) == [f"--config={plan}"]
    with pytest.raises(WrongArguments, match="'experiment_sounds'"):
        find_config("experiment_sounds")


@pytest.mark.parametrize(("module", "words"), [(benchmark, "--steps 0"), (benchmark_loader, "--batch_size x")])
def test_bad_option_of_benchmark_is_refused(module, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m lab"])
    with pytest.raises(WrongArguments, match=words.split()[0]):
        module.main(words.split())


@pytest.mark.slow
def test_malformed_plans_are_named(tmp_path):
    rng = random.Random(1)
    config = yaml.safe_load((PLANS / "experiment_backbone.yaml").read_text())
    assert config.keys() <= {item.name for item in fields(ExperimentArguments)}
    path = tmp_path / "config.yaml"
    with limits():
        for _ in range(400):
            path.write_text(json.dumps(mutate(rng, config, rng.choice([1, 1, 2, 3]))))
            try:
                with one_input():
                    (parsed,) = parse(["--config", str(path)], "", (ExperimentArguments,))
            except WrongArguments as error:
                assert re.fullmatch(r"[^\n]*\S[^\n]*", str(error))
            except SystemExit as end:
                assert end.code == 2
            else:
                numbers = [value for value in vars(parsed).values() if isinstance(value, float)]
                assert not any(map(math.isnan, numbers))
