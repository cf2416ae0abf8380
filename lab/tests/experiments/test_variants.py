"""Experiments with a fake pretraining that records its arguments."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from launching import locked_elsewhere
from paths import AERIAL_TREES
from paths import PLANS as PLANS_FOLDER
from scipy import stats
from trl import ModelConfig

from lab.experiments import controls, experiment
from lab.experiments.arguments import ROWS, ExperimentArguments
from lab.experiments.variants import Experiment, interval, merge_settings, plan_of, scores_of
from lab.trees import pretrain
from lab.trees.arguments import TreePretrainArguments
from lab.trees.instructions import TreeInstructions
from modeling_vitp.pretraining.arguments import SFT_MODULES, VRLArguments
from modeling_vitp.pretraining.options import make_options
from modeling_vitp.training.command_line import parse

BASE = {"max_steps": 10, "from_scratch": {"vocab_size": 5, "text_config": {"num_hidden_layers": 1, "hidden_size": 8}}}
ARMS = {
    "as it is": None,
    "two layers": {"from_scratch": {"text_config": {"num_hidden_layers": 2}}},
    "longer": {"max_steps": 20},
}


def figure_of(config: dict) -> float:
    layers = config["from_scratch"]["text_config"]["num_hidden_layers"]
    return config["seed"] ** 2 / 10 + layers * (1 + config["seed"] / 100) + config["max_steps"]


class Pretraining:
    """Fake entry point that writes metrics; the runs in `stops` are interrupted before."""

    def __init__(self, stops: tuple[int, ...] = ()):
        self.configs, self.stops = [], list(stops)

    def __call__(self, argv: list[str]) -> int:
        config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
        self.configs.append(config)
        folder = Path(config["output_dir"])
        (folder / "checkpoint-5").mkdir(exist_ok=True)
        if len(self.configs) - 1 in self.stops:
            raise KeyboardInterrupt
        (folder / "metrics.json").write_text(json.dumps({"task": {"test": {"auc": figure_of(config)}}}))
        return 1


def run(plan: dict, pretrain=None, task=None) -> dict:
    """Run an experiment with a fake pretraining and task, and return its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_vitp.recipes.pretrain.main", pretrain or Pretraining())
        if task is not None:
            patch.setattr("lab.experiments.controls.main", task.controls)
        return Experiment(ExperimentArguments(**plan), task).run()


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return {
        "output_dir": str(tmp_path / "out"),
        "claim": "Layers help.",
        "against": "They do not.",
        "base": str(tmp_path / "base.yaml"),
        "arms": ARMS,
        "control": "as it is",
        "measures": {"AUC": "task.test.auc"},
        "seeds": [0, 1, 2],
    }


def test_arms_differ_in_their_settings_only(plan):
    pretrain = Pretraining()
    run(plan, pretrain)
    assert [config["seed"] for config in pretrain.configs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for seed in range(3):
        control, layers, longer = (
            {name: value for name, value in config.items() if name != "output_dir"}
            for config in pretrain.configs[3 * seed : 3 * seed + 3]
        )
        assert control == {**BASE, "seed": seed}
        assert longer == {**BASE, "seed": seed, "max_steps": 20}
        text_config = {"num_hidden_layers": 2, "hidden_size": 8}
        assert layers == {**BASE, "seed": seed, "from_scratch": {"vocab_size": 5, "text_config": text_config}}


def test_summary_is_paired_by_seed(plan):
    metrics = run(plan)
    rows = {row["arm"]: row for row in metrics["summary"]}
    control, layers = np.array([11, 11.11, 11.42]), np.array([12, 12.12, 12.44])
    assert rows["as it is"]["values"] == pytest.approx(control)
    assert rows["two layers"]["mean"] == pytest.approx(layers.mean())
    low, high = stats.t.interval(0.95, 2, layers.mean(), stats.sem(layers))
    assert rows["two layers"]["interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    difference = layers - control
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    assert rows["two layers"]["difference"] == pytest.approx(difference.mean())
    assert rows["two layers"]["difference_interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert rows["two layers"]["difference_interval"] < rows["two layers"]["interval"]
    assert rows["as it is"]["difference"] == rows["as it is"]["difference_interval"] == 0


def test_processes_that_save_at_once_keep_all_scores(plan, monkeypatch):
    def write(path, text):
        time.sleep(0.1)  # Without a lock, the others read the file now.
        path.write_text(text)

    monkeypatch.setattr("lab.experiments.variants.write_whole", write)
    keys = [(seed, arm) for seed in range(2) for arm in ARMS]
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda key: Experiment(ExperimentArguments(**plan)).save({key: {"AUC": 0.5}}), keys))
    assert scores_of(json.loads(Path(plan["output_dir"], "metrics.json").read_text())).keys() == {*keys}


def test_finished_runs_are_kept(plan):
    pretrain = Pretraining(stops=(4,))
    with pytest.raises(KeyboardInterrupt):
        run(plan, pretrain)
    assert len(pretrain.configs) == 5
    metrics = run(plan, pretrain)
    assert len(pretrain.configs) == 10
    assert pretrain.configs[4] == pretrain.configs[5]
    assert (Path(pretrain.configs[5]["output_dir"]) / "checkpoint-5").is_dir()
    assert metrics["runs"] == run(plan)["runs"]
    pretrain = Pretraining()
    assert len(run(plan | {"seeds": [0, 1, 2, 3]}, pretrain)["runs"]) == 12
    assert [config["seed"] for config in pretrain.configs] == [3] * 3


def test_command_prints_plan_and_table(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling_vitp.recipes.pretrain.main", Pretraining())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert experiment.main(["--config", str(tmp_path / "plan.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "Layers help.\nContradicted by: They do not." in shown
    values, differences = [12, 12.12, 12.44], [1, 1.01, 1.02]
    halves = [stats.t.ppf(0.975, 2) * stats.sem(numbers) for numbers in (values, differences)]
    assert "|  | as it is | longer | two layers |" in shown
    assert f"| {np.mean(values):.3f} ± {halves[0]:.3f} (**+1.010 ± {halves[1]:.3f}**) |" in shown
    assert (tmp_path / "out" / "arms.png").is_file()
    del plan["seeds"][1:]
    plan["output_dir"] = str(tmp_path / "one seed")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert experiment.main(["--config", str(tmp_path / "plan.yaml")]) == 0
    assert "| AUC | 11.000 | 21.000 (+10.000) | 12.000 (+1.000) |" in capsys.readouterr().out
    assert "Infinity" not in (tmp_path / "one seed" / "metrics.json").read_text()
    plan["output_dir"] = str(tmp_path / "out")
    plan["arms"] = {**ARMS, "longer": {"max_steps": 30}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match="different arms"):
        experiment.main(["--config", str(tmp_path / "plan.yaml")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "nothing"}, "control: .*'nothing'"),
        ({"arms": {"as it is": {"seed": 3}}}, "arm 'as it is': set seed"),
        ({"base": "nothing"}, "configuration 'nothing'"),
        ({"arms": {"as it is": {"after": "another"}}}, "arm 'as it is': .*'another'"),
        ({"arms": {"as it is": {"label_share": None}}}, "arm 'as it is': label_share .*None"),
        ({"arms": {"as it is": {"without_scenes": None}}}, "arm 'as it is': without_scenes .*None"),
        ({"finetuning": {"rates": [1]}}, "finetuning: unknown key 'rates'"),
        ({"finetuning": {"steps": 1}}, "finetuning: missing 'data', 'learning_rates'"),
    ],
)
def test_invalid_plan_is_named(plan, changes, message):
    with pytest.raises(ValueError, match=message):
        ExperimentArguments(**{**plan, **changes})


def test_unknown_measure_is_named(plan):
    with pytest.raises(ValueError, match=r"'task.train.auc' .*\['test'\]"):
        run(plan | {"measures": {"AUC": "task.train.auc"}})


@pytest.mark.parametrize("found", [None, "1.5", [1.5]])
def test_non_numeric_measure_is_named(plan, found):
    def pretrain(argv: list[str]) -> int:
        (Path(argv[1]).with_suffix("") / "metrics.json").write_text(json.dumps({"task": {"test": {"auc": found}}}))
        return 0

    said = re.escape(f"measures: 'task.test.auc' must be a number in metrics.json, got {found!r}")
    with pytest.raises(ValueError, match=said):
        run(plan, pretrain)


def test_bad_plans_are_refused(plan):
    for one, other in [("无VRL", "有VRL"), ("VRL -", "VRL +"), ("lr 1e-4", "lr 1e+4"), ("A b", "a_B")]:
        with pytest.raises(ValueError, match=f"{re.escape(f'arms: {other!r}')}.*{re.escape(repr(one))}"):
            ExperimentArguments(**{**plan, "arms": {one: None, other: {"max_steps": 20}}, "control": one})
    for name in ("α", "+", ".."):
        with pytest.raises(ValueError, match=re.escape(f"arms: {name!r}")):
            ExperimentArguments(**{**plan, "arms": {"as it is": None, name: {"max_steps": 20}}})
    with pytest.raises(ValueError, match="seeds"):
        ExperimentArguments(**{**plan, "seeds": []})


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_interval_equals_students_t(values):
    mean, half = interval(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    expected = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    assert half == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert interval(values[:1]) == (values[0], None)


def test_changes_do_not_modify_base():
    base = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    assert merge_settings(base, {"a": {"b": 4}, "d": None}) == {"a": {"b": 4, "c": 2}, "d": None}
    assert base == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


PLANS = [path for path in sorted(PLANS_FOLDER.glob("experiment_*.yaml")) if "_paper_" not in path.stem]


@pytest.mark.parametrize("config", PLANS, ids=lambda path: path.stem)
def test_arms_of_the_plans_parse(config, tmp_path):
    """The options are parsed by the entry point and by the task."""
    args = ExperimentArguments(**yaml.safe_load(config.read_text()))
    assert len(args.seeds) >= 5
    rows = Dataset.from_dict({"image": [], "boxes": []})
    for settings in args.arms.values():
        settings = {name: value for name, value in (settings or {}).items() if name not in (*ROWS, "after")}
        merged = merge_settings(yaml.safe_load(Path(args.base).read_text()), settings) | {"output_dir": str(tmp_path)}
        if "task" not in merged:
            merged.pop("objective", None)
            merged["output_dir"] = str(tmp_path / "run")
            for name in ("annotations", "vision_model", "language_model"):  # They are built by lab.data.
                merged[name] = str(tmp_path)
            make_options(merged)
            continue
        merged["dataset_name"] = str(AERIAL_TREES)
        (tmp_path / "arm.yaml").write_text(yaml.safe_dump(merged))
        own, whole = (TreePretrainArguments, VRLArguments, ModelConfig), pretrain.WHOLE
        if "objective" in settings:
            own, whole = (controls.ControlArguments, *own), controls.WHOLE
        *_, parsed, _, _ = parse(["--config", str(tmp_path / "arm.yaml")], "", own, whole, SFT_MODULES)
        TreeInstructions(rows, **(parsed.task_options or {}))


class Scores:
    """Fake task that scores each run and records the calls."""

    def __init__(self):
        self.controls, self.scored, self.parts = Pretraining(), [], []

    def write_labeled(self, dataset_name, seed, folder, **rows):
        self.parts.append((dataset_name, seed, folder, rows))

    def score(self, experiment, arm, seed, folder):
        self.scored.append((seed, arm))
        return {"downstream": {"iou": seed + len(arm)}}


def test_arms_of_the_task(plan):
    plan |= {"seeds": [0, 1], "measures": {"AUC": "task.test.auc", "IoU": "downstream.iou"}}
    plan["arms"] = {**ARMS, "pixels": {"objective": "mae", "max_steps": 30}, "fewer": {"label_share": 0.1}}
    Path(plan["base"]).write_text(yaml.safe_dump({**BASE, "dataset_name": "rows"}))
    pretrain, task = Pretraining(), Scores()
    assert ExperimentArguments(**plan).needs_task and not ExperimentArguments(**{**plan, "arms": ARMS}).needs_task
    metrics = run(plan, pretrain, task)
    pixels, fewer = task.controls.configs[0], pretrain.configs[3]
    out = Path(plan["output_dir"]) / "seed_0"
    assert pixels == {**BASE, "dataset_name": "rows", "objective": "mae", "max_steps": 30, "seed": 0} | {
        "output_dir": str(out / "pixels")
    }
    assert fewer == {**BASE, "dataset_name": str(out / "fewer" / "labeled"), "seed": 0} | {
        "output_dir": str(out / "fewer")
    }
    assert task.parts[0] == ("rows", 0, out / "fewer" / "labeled", {"label_share": 0.1})
    assert [run["IoU"] for run in metrics["runs"]] == [seed + len(arm) for seed in (0, 1) for arm in plan["arms"]]


def test_arm_after_another(plan):
    plan["arms"] = {"as it is": None, "further": {"after": "longer", "max_steps": 5}, "longer": ARMS["longer"]}
    plan["seeds"], pretrain = [0], Pretraining()
    metrics = run(plan, pretrain)
    longer = Path(plan["output_dir"]) / "seed_0" / "longer"
    assert [config["output_dir"] for config in pretrain.configs][1:] == [str(longer), str(longer.with_name("further"))]
    further = {**BASE, "seed": 0, "max_steps": 5, "vision_model": str(longer / "backbone")}
    assert pretrain.configs[2] == {**further, "output_dir": str(longer.with_name("further"))}
    assert len(metrics["runs"]) == 3


def test_runs_of_another_experiment(plan, tmp_path):
    run(plan)
    plan |= {"runs_dir": plan["output_dir"], "output_dir": str(tmp_path / "another"), "control": "longer"}
    plan["arms"] = {
        "longer": ARMS["longer"],
        "three layers": {"from_scratch": {"text_config": {"num_hidden_layers": 3}}},
    }
    pretrain = Pretraining()
    metrics = run(plan, pretrain)
    assert len(metrics["runs"]) == 6 and len(pretrain.configs) == 3
    assert (tmp_path / "another" / "metrics.json").is_file()
    plan["arms"]["longer"] = {"max_steps": 21}
    with pytest.raises(ValueError, match="metrics.json belongs to another plan"):
        run(plan, pretrain)
    plan["output_dir"] = str(tmp_path / "a third")
    with pytest.raises(ValueError, match="longer.yaml has other settings than arm 'longer'"):
        run(plan, pretrain)


def test_equal_arms_share_a_run(plan, tmp_path):
    run(plan)
    plan |= {"runs_dir": plan["output_dir"], "output_dir": str(tmp_path / "another"), "control": "one layer"}
    plan["arms"] = {
        "one layer": {"from_scratch": {"text_config": {"num_hidden_layers": 1}}},
        "one layer, longer": {"max_steps": 20, "from_scratch": {"text_config": {"num_hidden_layers": 1}}},
        "fewer": {"label_share": 0.5},
    }
    Path(plan["base"]).write_text(yaml.safe_dump({**BASE, "dataset_name": "rows"}))
    with_rows, task = Pretraining(), Scores()
    run(plan, with_rows, task)
    assert len(with_rows.configs) == 9, "the base has other settings, so nothing is shared"
    Path(plan["base"]).write_text(yaml.safe_dump(BASE))
    plan |= {"output_dir": str(tmp_path / "a third"), "arms": {**plan["arms"]}}
    del plan["arms"]["fewer"]
    pretrain = Pretraining()
    plan["runs_dir"] = str(tmp_path / "out")
    for path in (tmp_path / "out").glob("seed_*/one_layer*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    metrics = run(plan, pretrain)
    assert not pretrain.configs
    rows = {row["arm"]: row for row in metrics["summary"]}
    assert rows["one layer"]["values"] == pytest.approx([11, 11.11, 11.42])
    assert rows["one layer, longer"]["values"] == pytest.approx([21, 21.11, 21.42])


def test_scores_stay_without_run_folders(plan, tmp_path):
    out = Path(plan["output_dir"])
    with pytest.raises(KeyboardInterrupt):
        run(plan, Pretraining(stops=(5,)))
    kept = json.loads((out / "metrics.json").read_text())
    assert len(kept["runs"]) == 5 and {tuple(row["seeds"]) for row in kept["summary"]} == {(0,)}
    for folder in out.glob("seed_*"):
        shutil.rmtree(folder)
    pretrain = Pretraining()
    metrics = run({**plan, "seeds": [1, 3]}, pretrain)
    assert [config["seed"] for config in pretrain.configs] == [1, 3, 3, 3]
    assert [row["seeds"] for row in metrics["summary"]] == [[0, 1, 3]] * 3
    expected = [[11, 11.11, 11.57 + 0.36], [12, 12.12, 12.96], [21, 21.11, 21.93]]
    assert [row["values"] for row in metrics["summary"]] == [pytest.approx(values) for values in expected]


def test_tuning_stays(plan):
    class Tuned(Scores):
        tunes = []

        def score(self, experiment, arm, seed, folder):
            def tune():
                self.tunes.append(arm)
                return {"chosen": len(arm), "tried": [1, 2]}

            return {"downstream": {"iou": experiment.tuning(arm, tune)["chosen"] + seed}}

    out, task = Path(plan["output_dir"]), Tuned()
    plan |= {"seeds": [0], "measures": {"IoU": "downstream.iou"}}
    metrics = run(plan, task=task)
    assert metrics["tuning"] == {arm: {"chosen": len(arm), "tried": [1, 2]} for arm in ARMS}
    for folder in out.glob("seed_*"):
        shutil.rmtree(folder)
    metrics = run({**plan, "seeds": [0, 3]}, task=task)
    assert task.tunes == list(ARMS) and list(metrics["tuning"]) == list(ARMS)
    assert [run["IoU"] for run in metrics["runs"]] == [len(arm) + seed for seed in (0, 3) for arm in ARMS]


def test_arm_without_runs(plan):
    experiment = Experiment(ExperimentArguments(**plan))
    metrics = experiment.save({(seed, "longer"): {"AUC": 7.0 + seed} for seed in (0, 1, 2)})
    assert metrics["summary"] == [] and len(metrics["runs"]) == 3
    metrics = experiment.save({(seed, "as it is"): {"AUC": 5.0} for seed in (1, 2)})
    rows = {row["arm"]: row for row in metrics["summary"]}
    assert list(rows) == ["as it is", "longer"] and rows["longer"]["seeds"] == [1, 2]
    assert rows["longer"]["difference"] == 3.5
    metrics = experiment.save({(2, "two layers"): {"AUC": 6.0}})
    assert {tuple(row["seeds"]) for row in metrics["summary"]} == {(2,)} and len(metrics["summary"]) == 3


def test_other_base_is_refused(plan):
    run(plan)
    Path(plan["base"]).write_text(yaml.safe_dump({**BASE, "max_steps": 11}))
    pretrain = Pretraining()
    with pytest.raises(ValueError, match="metrics.json belongs to another base"):
        run({**plan, "seeds": [0, 1, 2, 3]}, pretrain)
    assert not pretrain.configs


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"runs": 3}', '{"runs": [3]}', '{"runs": [{"arm": "longer"}]}']
)
def test_foreign_metrics_file_is_refused(plan, content):
    path = Path(plan["output_dir"]) / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} has no scores"):
        run(plan)
    assert path.read_text() == content


def test_busy_runs_come_last(plan, monkeypatch):
    pretrain, waited = Pretraining(), []
    folder, other = Path(plan["output_dir"]) / "seed_0" / "two_layers", ExitStack()

    def sleep(seconds):
        waited.append(len(pretrain.configs))
        other.close()

    monkeypatch.setattr("lab.experiments.variants.time.sleep", sleep)
    with other:
        other.enter_context(locked_elsewhere(folder / "_claim"))
        metrics = run(plan, pretrain)
    assert waited == [8]
    assert [run["arm"] for run in metrics["runs"]] == [*ARMS] * 3
    assert pretrain.configs[-1]["output_dir"] == str(folder)


def test_plan_is_independent_of_base_path(plan, tmp_path):
    there = tmp_path / "elsewhere" / "base.yaml"
    there.parent.mkdir()
    there.write_text(Path(plan["base"]).read_text())
    here, moved = (plan_of(ExperimentArguments(**{**plan, "base": base})) for base in (plan["base"], str(there)))
    assert here == moved
