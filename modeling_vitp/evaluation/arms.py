"""An experiment on pretraining: arms that differ in the settings they are named after, over seeds, beside a control."""

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from ..cards.sections import table
from ..training.outputs import write_whole
from .arguments import ExperimentArguments

logger = logging.getLogger(__name__)
SCORES = "scores.json"
# Of Student's t with 1, 2, … degrees of freedom: what 95% of the draws lie within, on both sides.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def run_experiment(args: ExperimentArguments, pretrain: Callable[[list[str]], int]) -> dict:
    """Runs what is not there yet, seed after seed, and returns the scores of all of it.

    An arm that was interrupted goes on from its last checkpoint.

    Args:
        pretrain: the entry point; its exit status is not looked at, since an arm may well fail a gate.
    """
    folder, runs = Path(args.output_dir), []
    for seed in args.seeds:
        for arm in args.arms:
            scores = run_arm(args, arm, seed, folder / f"seed_{seed}" / slug(arm), pretrain)
            runs.append({"seed": seed, "arm": arm, **scores})
        metrics = {"plan": plan_of(args), "summary": paired_summary(runs, args.control), "runs": runs}
        write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def run_arm(
    args: ExperimentArguments, arm: str, seed: int, folder: Path, pretrain: Callable[[list[str]], int]
) -> dict[str, float]:
    """The measures of one arm with one seed."""
    finished = folder / SCORES
    if not finished.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = merge(yaml.safe_load(Path(args.base).read_text()), args.arms[arm] or {})
        config |= {"output_dir": str(folder), "seed": seed}
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        pretrain(["--config", str(folder / "config.yaml")])
        metrics = json.loads((folder / "metrics.json").read_text())
        write_whole(finished, json.dumps({title: look_up(metrics, path) for title, path in args.measures.items()}))
    scores = json.loads(finished.read_text())
    logger.info("%s, seed %d: %s (%s)", arm, seed, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), folder)
    return scores


def plan_of(args: ExperimentArguments) -> dict[str, Any]:
    """What was to be found out, as it was written down before."""
    return {name: getattr(args, name) for name in ("claim", "against", "base", "arms", "control", "measures")}


def merge(base: Mapping, changes: Mapping) -> dict:
    """A configuration with changes; a mapping in it is changed where the changes say so, and kept elsewhere."""
    merged = copy.deepcopy(dict(base))
    for name, value in changes.items():
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if is_nested else value
    return merged


def look_up(metrics: Mapping, path: str) -> float:
    """A figure in nested metrics, by its keys with dots between them.

    Raises:
        ValueError: names the part of the path that is not there, and what is.
    """
    found, seen = metrics, []
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            there = sorted(found) if isinstance(found, Mapping) else found
            raise ValueError(
                f"measures: {path!r} is not in metrics.json: after {'.'.join(seen) or 'nothing'}: {there}."
            )
        found = found[name]
        seen.append(name)
    return float(found)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    quantile = QUANTILES[min(len(values) - 1, len(QUANTILES)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def paired_summary(runs: Sequence[Mapping], control: str) -> list[dict]:
    """For each arm and measure the mean with its interval, and the same of the difference to the control's run of the
    same seed."""
    measures = [name for name in runs[0] if name not in ("seed", "arm")]
    by_arm = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    summary = []
    for arm, of_seed in by_arm.items():
        for measure in measures:
            values = [run[measure] for run in of_seed.values()]
            differences = [run[measure] - by_arm[control][seed][measure] for seed, run in of_seed.items()]
            row = {"arm": arm, "measure": measure, "seeds": list(of_seed), "values": values}
            row["mean"], row["interval"] = interval(values)
            row["difference"], row["difference_interval"] = interval(differences)
            summary.append(row)
    return summary


def paired_table(summary: Sequence[Mapping], control: str) -> str:
    """The summary in Markdown: a row for each arm, and for each measure its mean and the difference to the control."""
    measures = list(dict.fromkeys(row["measure"] for row in summary))
    by_arm = {}
    for row in summary:
        by_arm.setdefault(row["arm"], {})[row["measure"]] = row
    lines = []
    for arm, of_measure in by_arm.items():
        lines.append([arm])
        for row in (of_measure[measure] for measure in measures):
            difference = f"{row['difference']:+.3f} ± {row['difference_interval']:.3f}"
            lines[-1] += [f"{row['mean']:.3f} ± {row['interval']:.3f}", "" if arm == control else difference]
    titles = [title for measure in measures for title in (measure, f"beside {control}")]
    return table(["arm", *titles], lines)


def draw_arms(summary: Sequence[Mapping], path: Path) -> None:
    """A panel for each measure: every seed as a point, the mean of each arm with its interval."""
    measures = list(dict.fromkeys(row["measure"] for row in summary))
    figure, axes = plt.subplots(1, len(measures), figsize=(4 * len(measures), 3.6), squeeze=False, layout="constrained")
    for axis, measure in zip(axes[0], measures):
        rows = [row for row in summary if row["measure"] == measure]
        for place, row in enumerate(rows):
            axis.plot([place] * len(row["values"]), row["values"], "o", color="0.7", markersize=4)
            error = row["interval"] if math.isfinite(row["interval"]) else 0
            axis.errorbar(place, row["mean"], error, fmt="s", color="C0", capsize=4)
        axis.set_xticks(range(len(rows)), [row["arm"] for row in rows], rotation=30, ha="right", fontsize=8)
        axis.set_title(measure, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
