"""Robustness evaluation with a dummy task: conditions that are run, finished conditions, and summaries of scores."""

import fcntl
import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from launching import locked_elsewhere

from modeling_vitp.auto.registry import MODELS, ModelEntry
from modeling_vitp.command.errors import RunStopped, WrongArguments
from modeling_vitp.evaluation import robustness
from modeling_vitp.evaluation.comparison import short_names
from modeling_vitp.evaluation.robustness import draw_robustness, evaluate_robustness, robustness_table, severity_table
from modeling_vitp.images.corruptions import SEVERITIES
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.robustness_arguments import RobustnessArguments
from modeling_vitp.training.command_line import parse


class Counted:
    """Dummy task with three images, scores by a hash of the condition, and a list of the evaluated conditions."""

    asked: list[tuple] = []
    stops_after = math.inf
    score = "ap50"
    greater_is_better = True

    def __init__(self, name, args):
        self.name = name
        self.data = {"data": "boxes", "limit": args.limit}
        self.settings = {"weights": f"of {name}"}

    def __len__(self):
        return 3

    def evaluate(self, corruption, severity, update):
        if len(self.asked) >= self.stops_after:
            raise KeyboardInterrupt
        self.asked.append((self.name, corruption, severity))
        for _ in range(3):
            update()
        key = f"{self.name} {corruption} {severity}"
        value = 0.3 + int(hashlib.sha256(key.encode()).hexdigest()[:6], 16) / 2**25
        return {"ap50": value, "ap75": value / 3, "ap/ship": math.nan}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function that evaluates models `a` and `b`, and returns metrics and evaluated conditions."""
    monkeypatch.setitem(TASKS, "counted", SimpleNamespace(scorer_class=Counted))
    monkeypatch.setitem(MODELS, "counted", ModelEntry("counted", "AutoModel", "other", "", task="counted"))
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "counted"}')

    def evaluate(stops_after=math.inf, names="ab", **settings):
        monkeypatch.setattr(Counted, "asked", [])
        monkeypatch.setattr(Counted, "stops_after", stops_after)
        settings = {"output_dir": str(tmp_path / "out"), "severities": [2, 4]} | settings
        args = RobustnessArguments(models=[str(tmp_path / name) for name in names], **settings)
        return evaluate_robustness(args), [(name[-1], *how) for name, *how in Counted.asked]

    return evaluate


def test_models_are_scored_clean_and_corrupted(ask, tmp_path):
    metrics, asked = ask()
    expected = [(None, 0), *((name, severity) for name in SEVERITIES for severity in (2, 4))]
    assert asked == [(model, *condition) for model in "ab" for condition in expected]
    assert [model["model"] for model in metrics["models"]] == ["a", "b"]
    assert metrics["images"] == 3 and metrics["score"] == "ap50" and metrics["greater_is_better"]
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()


def test_relative_scores_and_averages(ask, tmp_path):
    ask()
    for model in json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]:
        clean = model["clean"]["metrics"]["ap50"]
        assert model["clean"]["score"] == clean
        scores = np.array([item["metrics"]["ap50"] for item in model["conditions"]]).reshape(12, 2)
        assert [item["score"] for item in model["conditions"]] == scores.flatten().tolist()
        assert [item["relative"] for item in model["conditions"]] == pytest.approx(scores.flatten() / clean)
        assert [item["score"] for item in model["corruptions"].values()] == pytest.approx(scores.mean(1))
        assert [item["relative"] for item in model["corruptions"].values()] == pytest.approx(scores.mean(1) / clean)
        average = {"score": scores.mean(), "relative": scores.mean() / clean}
        assert model["average"] == pytest.approx(average)
        assert model["clean"]["metrics"]["ap/ship"] is None


@pytest.mark.parametrize("stops_after", [0, 7, 49])
def test_stopped_evaluation_resumes(ask, tmp_path, stops_after):
    whole, asked = ask(output_dir=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        ask(stops_after)
    metrics, rest = ask()
    assert rest == asked[stops_after:]
    assert (tmp_path / "out/metrics.json").read_text() == (tmp_path / "whole/metrics.json").read_text()
    assert json.dumps(metrics) == json.dumps(whole)
    assert ask()[1] == []


def test_conditions_can_be_added(ask):
    _, asked = ask(names="a", corruptions=["haze"], severities=[3])
    assert asked == [("a", None, 0), ("a", "haze", 3)]
    _, asked = ask(corruptions=["haze", "rotation"], severities=[3, 5])
    added = [("haze", 5), ("rotation", 3), ("rotation", 5)]
    assert asked == [("a", *how) for how in added] + [("b", None, 0), ("b", "haze", 3), *(("b", *how) for how in added)]


def test_changed_images_or_weights_raise_error(ask, monkeypatch):
    ask(corruptions=["haze"])
    with pytest.raises(ValueError, match="settings.json .*different seed"):
        ask(corruptions=["haze"], seed=1)
    with pytest.raises(ValueError, match="different limit"):
        ask(corruptions=["haze"], limit=2)
    monkeypatch.setattr(Counted, "settings", property(lambda self: {"weights": "others"}, lambda *_: None), False)
    with pytest.raises(ValueError, match=r"a/settings.json .*different weights"):
        ask(corruptions=["haze"])


def test_output_folder_is_locked(ask, tmp_path, monkeypatch):
    evaluate = Counted.evaluate

    def beside(self, *how):
        with pytest.raises(BlockingIOError), open(tmp_path / "out" / ".run.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return evaluate(self, *how)

    monkeypatch.setattr(Counted, "evaluate", beside)
    monkeypatch.setattr("modeling_vitp.command.locks.LOCK_TIMEOUT", 0)
    ask(corruptions=["haze"])
    with locked_elsewhere(tmp_path / "out"), pytest.raises(RunStopped, match="out"):
        ask(corruptions=["haze"])


def test_score_can_be_any_metric_value(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "score", "ap75")
    metrics, _ = ask(corruptions=["haze"])
    assert metrics["models"][0]["clean"]["score"] == metrics["models"][0]["clean"]["metrics"]["ap75"]
    monkeypatch.setattr(Counted, "score", "ap/ship")  # The class does not occur, so that the score is NaN.
    metrics, asked = ask(corruptions=["haze"])
    assert asked == [] and math.isnan(metrics["models"][0]["average"]["score"])
    assert robustness_table(metrics).splitlines()[-1] == "| average | – | – | – | – |"
    draw_robustness(metrics, tmp_path / "plot.png")
    monkeypatch.setattr(Counted, "score", "iou")
    with pytest.raises(ValueError, match="'iou'.* ap50, ap75, ap/ship"):
        ask(corruptions=["haze"])


def of_model(name: str, clean: float, scores: dict[tuple[str, int], float]) -> dict:
    found = {("clean", 0): {"mean_iou": clean}} | {key: {"mean_iou": value} for key, value in scores.items()}
    return {"model": name, **robustness.summarize_conditions(found, "mean_iou")}


def test_robustness_tables():
    conditions = [("haze", 1), ("haze", 5), ("data_gaps", 1), ("data_gaps", 5)]
    first = of_model("r = 0", 0.5, dict(zip(conditions, (0.4, 0.2, 0.5, 0.3))))
    second = of_model("r = 0.75", 0.0, dict(zip(conditions, (0.0, 0.1, 0.0, 0.0))))
    metrics = {"score": "mean_iou", "greater_is_better": True, "models": [first, second]}
    assert robustness_table(metrics).splitlines() == [
        "| mean iou | r = 0 | of clean | r = 0.75 | of clean |",
        "| --- | --- | --- | --- | --- |",
        "| clean | 0.500 | 100.0% | 0.000 | 100.0% |",
        "| haze | 0.300 | 60.0% | 0.050 | – |",
        "| data gaps | 0.400 | 80.0% | 0.000 | – |",
        "| average | 0.350 | 70.0% | 0.025 | – |",
    ]
    title, *_ = robustness_table(metrics | {"greater_is_better": False}).splitlines()
    assert title == "| mean iou (lower is better) | r = 0 | of clean | r = 0.75 | of clean |"
    assert severity_table(first).splitlines() == [
        "| r = 0, at severity | 1 | 5 |",
        "| --- | --- | --- |",
        "| haze | 0.400 (80.0%) | 0.200 (40.0%) |",
        "| data gaps | 0.500 (100.0%) | 0.300 (60.0%) |",
    ]


def test_short_names_are_unique():
    assert short_names(["runs/a", "org/b", "c/"]) == ["a", "b", "c"]
    assert short_names(["runs/1/model", "runs/2/model", "c"]) == ["runs/1/model", "runs/2/model", "c"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "m", "m"], r"models .*\['m', 'm'\]"),
        (["--models", "m", "--severities", "1", "1"], "severities .*duplicates"),
        (["--models", "m", "--data", "lovda"], "'lovda'.*loveda"),
        (["--models", "m", "--data", "quickstart"], "data='quickstart'"),
    ],
)
def test_invalid_arguments_are_named(words, says):
    with pytest.raises(WrongArguments, match=says):
        parse(words, "", (RobustnessArguments,))
