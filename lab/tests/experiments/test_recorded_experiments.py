"""Recorded scores behind the tables of the experiments page."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from paths import PLANS, ROOT
from scipy import stats

from lab.experiments.arguments import ExperimentArguments
from lab.experiments.variants import paired_table, plan_of

RECORDS = sorted((ROOT / "lab" / "experiments").glob("*.json"))


def summaries_on_page(name: str, summary: list[dict], control: str) -> list[list[dict]]:
    """Return the rows of each table of an experiment: of the colors two, for VRL and none, without leads."""
    if name != "experiment_colors":
        return [summary]
    rows = [row for row in summary if ": lead over " not in row["measure"]]
    return [
        [row for row in rows if row["arm"] == control or row["arm"].endswith("no VRL") == is_without]
        for is_without in (False, True)
    ]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_record_matches_plan_and_page(record):
    metrics = json.loads(record.read_text())
    args = ExperimentArguments(**yaml.safe_load((PLANS / f"{record.stem}.yaml").read_text()))
    assert metrics["plan"] == json.loads(json.dumps(plan_of(args)))
    base = yaml.safe_load(Path(args.base).read_text())
    if "dataset_name" in base:
        base["dataset_name"] = "recipes/data/aerial_trees"  # The path of the rows when the scores were recorded.
    assert metrics["base"] == base
    page = (ROOT / "lab" / "experiments" / "experiment.md").read_text()
    for summary in summaries_on_page(record.stem, metrics["summary"], args.control):
        assert paired_table(summary, args.control) in page


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_summary_is_over_shared_seeds(record):
    metrics = json.loads(record.read_text())
    scores = {(run["seed"], run["arm"]): run for run in metrics["runs"]}
    arms, control = list(metrics["plan"]["arms"]), metrics["plan"]["control"]
    arms = [arm for arm in arms if any(one == arm for _, one in scores)]
    whole = [seed for seed in sorted({seed for seed, _ in scores}) if all((seed, arm) in scores for arm in arms)]
    assert len(whole) >= 3 and control in arms and len(arms) >= 2
    assert {(row["arm"], row["measure"]) for row in metrics["summary"]} == {
        (arm, measure) for arm in arms for measure in metrics["plan"]["measures"]
    }
    for row in metrics["summary"]:
        assert row["seeds"] == whole
        values = np.array([scores[seed, row["arm"]][row["measure"]] for seed in whole])
        differences = values - [scores[seed, control][row["measure"]] for seed in whole]
        assert np.isfinite(values).all()
        for numbers, name in ((values, ""), (differences, "difference")):
            mean, half = row[name or "mean"], row["_".join(filter(None, [name, "interval"]))]
            assert mean == pytest.approx(numbers.mean())
            assert half == pytest.approx(stats.t.ppf(0.975, len(whole) - 1) * stats.sem(numbers), rel=1e-3)
