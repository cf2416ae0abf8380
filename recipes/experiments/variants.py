"""An experiment on pretraining: arms that differ in the settings they are named after, over seeds, beside a control."""

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from modeling_vitp.cards.sections import table
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.command.paths import read_yaml
from modeling_vitp.evaluation.comparison import format_spread
from modeling_vitp.recipes.experiments.arguments import ExperimentArguments, slug
from modeling_vitp.training.checkpointing import FolderLock, write_whole

logger = logging.getLogger(__name__)
CONFIG = "config.yaml"
FINISHED = "scores.json"  # says of a run that its metrics.json is whole
WAIT = 20  # seconds, for other processes
# Of Student's t with 1, 2, … degrees of freedom: what 95% of the draws lie within, on both sides.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Task(Protocol):
    """What an experiment asks of the task of its pretraining, if its plan asks for more than pretrainings."""

    def control(self, argv: list[str]) -> int:
        """As the entry point of the pretraining, with an `objective` in place of instructions in its configuration."""

    def labelled(self, dataset_name: str, share: float, seed: int, folder: Path) -> None:
        """Makes a folder of the data set with a share of its training rows, as if only these were known."""

    def score(self, experiment: "Experiment", arm: str, seed: int, folder: Path) -> dict[str, Any]:
        """What is measured of the `backbone` in the folder of a run, beside its own `metrics.json`."""


class Busy(Exception):
    """Another process is at it."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other processes of the experiment away from a part of it. Raises [`Busy`] if one has it."""
    lock = FolderLock(folder / "_claim")  # the runs in the folder have locks of their own
    try:
        lock.acquire(timeout=0)
    except RunStopped as error:
        raise Busy from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class Experiment:
    """
    Args:
        pretrain: the entry point; its exit status is not looked at, since an arm may well fail a gate.
        task: for arms with an `objective` or a `label_share`, and for scores beside those of the run itself.
    """

    args: ExperimentArguments
    pretrain: Callable[[list[str]], int]
    task: Task | None = None

    @property
    def folder(self) -> Path:
        return Path(self.args.runs_dir or self.args.output_dir)

    def run(self) -> dict:
        """Runs what is not there yet, seed after seed, and returns the scores of all of it.

        An arm that was interrupted goes on from its last checkpoint, and the scores of one that is finished stay in
        `metrics.json`, also without its folder. What another process is at comes last, and is waited for, so the same
        command can be started once for each core.
        """
        left = [(seed, arm) for seed in self.args.seeds for arm in self.args.arms]
        metrics = self.save({})
        while left := [key for key in left if key not in scores_of(metrics)]:
            busy = []
            for seed, arm in left:
                try:
                    metrics = self.save({(seed, arm): self.run_arm(arm, seed)})
                except Busy:
                    busy.append((seed, arm))
            if len(busy) == len(left):
                time.sleep(WAIT)
                metrics = self.save({})
        return metrics

    def save(self, scores: dict[tuple[int, str], dict[str, float]], tuning: dict[str, dict] | None = None) -> dict:
        """`metrics.json` with these scores, and what was chosen for arms, beside what is in it; the summary is of the
        arms that were run with a seed of the control, over the seeds that all of these have.

        Raises:
            ValueError: if the file that is there is no such file, or of another plan, or of a base with other settings.
        """
        args, path = self.args, Path(self.args.output_dir) / "metrics.json"
        plan, base = json.loads(json.dumps([plan_of(args), read_yaml(args.base)]))
        if path.is_file():
            try:
                there = json.loads(path.read_text())
                kept, tuned = scores_of(there), dict(there.get("tuning") or {})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} has no scores of an experiment: give another output_dir.") from error
            for name, value in (("plan", plan), ("base", base)):
                if there.get(name) != value:
                    raise ValueError(f"{path} is of another {name}: give another output_dir.")
            scores, tuning = kept | scores, tuned | (tuning or {})
        seeds = {arm: {seed for seed, of in scores if of == arm} for arm in args.arms}
        runs = [
            {"seed": seed, "arm": arm, **scores[seed, arm]}
            for seed in sorted(set().union(*seeds.values()))
            for arm in args.arms
            if seed in seeds[arm]
        ]
        arms = [arm for arm in args.arms if seeds[arm] & seeds[args.control]]
        shared = set.intersection(*(seeds[arm] for arm in arms)) if arms else set()
        whole = [run for run in runs if run["arm"] in arms and run["seed"] in shared]
        metrics = {"plan": plan, "base": base, "summary": paired_summary(whole, args.control), "runs": runs}
        metrics |= {"tuning": tuning} if tuning else {}
        write_whole(path, json.dumps(metrics, indent=2) + "\n")
        return metrics

    def tuning(self, arm: str, tune: Callable[[], dict]) -> dict:
        """What `tune` chose for an arm, which stays in `metrics.json`: with more seeds it is not chosen again."""
        tuned = self.save({}).get("tuning", {})
        return tuned[arm] if arm in tuned else self.save({}, {arm: tune()})["tuning"][arm]

    def run_arm(self, arm: str, seed: int) -> dict[str, float]:
        """The measures of one arm with one seed."""
        folder = self.run_folder(arm, seed)
        with claimed(folder):
            metrics = self.train(arm, seed, folder)
            if self.task is not None:
                metrics |= self.task.score(self, arm, seed, folder)
        scores = {title: look_up(metrics, path) for title, path in self.args.measures.items()}
        logger.info("%s, seed %d: %s (%s)", arm, seed, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), folder)
        return scores

    def run_folder(self, arm: str, seed: int) -> Path:
        """Where the run of an arm lies: under its name, or under that of another arm which has the same settings."""
        folder = self.folder / f"seed_{seed}" / slug(arm)
        if (folder / CONFIG).is_file():
            return folder
        config = self.config(arm, seed, folder)
        others = (path.parent for path in sorted(folder.parent.glob(f"*/{CONFIG}")))
        return next((other for other in others if recorded(other) == {**config, "output_dir": str(other)}), folder)

    def config(self, arm: str, seed: int, folder: Path, **changes: Any) -> dict[str, Any]:
        """The configuration of a pretraining."""
        settings = dict(self.args.arms[arm] or {})
        share, before = settings.pop("label_share", None), settings.pop("after", None)
        config = merge_settings(read_yaml(self.args.base), settings)
        config |= {"output_dir": str(folder), "seed": seed, **changes}
        if before is not None:
            config["vision_model"] = str(folder.with_name(slug(before)) / "backbone")
        if share is not None:
            config["dataset_name"] = str(folder / "labelled")
        return config

    def train(self, arm: str, seed: int, folder: Path, **changes: Any) -> dict[str, Any]:
        """The metrics of the pretraining of an arm, which is run if it has not been yet, after the one it starts from.

        Args:
            changes: of its configuration, beside those of the arm.

        Raises:
            ValueError: if the run that is there has other settings.
        """
        settings, base = self.args.arms[arm] or {}, read_yaml(self.args.base)
        if before := settings.get("after"):
            started = folder.with_name(slug(before))
            with claimed(started):
                self.train(before, seed, started, **changes)
        config = self.config(arm, seed, folder, **changes)
        path, finished = folder / CONFIG, folder / FINISHED
        if path.is_file() and recorded(folder) != config:
            raise ValueError(f"{path} has other settings than arm {arm!r}: give another output_dir.")
        if not finished.is_file():
            began = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            if share := settings.get("label_share"):
                self.task.labelled({**base, **settings, **changes}["dataset_name"], share, seed, folder / "labelled")
            write_whole(path, yaml.safe_dump(config, sort_keys=False))
            (self.task.control if "objective" in settings else self.pretrain)(["--config", str(path)])
            write_whole(finished, json.dumps({"seconds": time.monotonic() - began}) + "\n")
        return json.loads((folder / "metrics.json").read_text())


def recorded(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder, wherever that is."""
    return read_yaml(folder / CONFIG) | {"output_dir": str(folder)}


def scores_of(metrics: Mapping) -> dict[tuple[int, str], dict[str, float]]:
    """By seed and arm, the measures in an experiment's `metrics.json`."""
    runs = [dict(run) for run in metrics["runs"]]
    return {(run.pop("seed"), run.pop("arm")): run for run in runs}


def plan_of(args: ExperimentArguments) -> dict[str, Any]:
    """What was to be found out, as it was written down before."""
    names = "claim against base arms control measures finetuning probe_label_shares corruption_severities"
    plan = {name: getattr(args, name) for name in names.split()}
    plan["base"] = Path(args.base).stem  # wherever it lies; that its settings are the same is asked of each run
    plan = {name: vars(value) if is_dataclass(value) else value for name, value in plan.items()}
    return {name: value for name, value in plan.items() if value}


def merge_settings(base: Mapping, changes: Mapping) -> dict:
    """A configuration with changes; a mapping in it is changed where the changes say so, and kept elsewhere."""
    merged = copy.deepcopy(dict(base))
    for name, value in changes.items():
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge_settings(merged[name], value) if is_nested else value
    return merged


def look_up(metrics: Mapping, path: str) -> float:
    """A figure in nested metrics, by its keys with dots between them.

    Raises:
        ValueError: names the part of the path that is not there, and what is; or what is there, if it is no number.
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
    if not isinstance(found, (int, float)):
        raise ValueError(f"measures: {path!r} is {found!r} in metrics.json, which is no number.")
    return float(found)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval by Student's t; `None` of a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    quantile = QUANTILES[min(len(values) - 1, len(QUANTILES)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def paired_summary(runs: Sequence[Mapping], control: str) -> list[dict]:
    """For each arm and measure the mean with its interval, and the same of the difference to the control's run of the
    same seed."""
    measures = [name for run in runs[:1] for name in run if name not in ("seed", "arm")]
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
    """The summary in Markdown, a row for each measure: of the control its mean, of the other arms also the difference,
    in bold where 0 is not in its interval."""
    arms = list(dict.fromkeys(row["arm"] for row in summary))
    arms = [control, *(arm for arm in arms if arm != control)]
    by_measure = {}
    for row in summary:
        by_measure.setdefault(row["measure"], {})[row["arm"]] = row
    lines = []
    for measure, of_arm in by_measure.items():
        lines.append([measure])
        for arm in arms:
            row = of_arm[arm]
            cell, half = format_spread(row["mean"], row["interval"]), row["difference_interval"]
            if arm != control:
                difference = format_spread(row["difference"], half, "+")
                is_clear = half is not None and abs(row["difference"]) > half
                cell += f" (**{difference}**)" if is_clear else f" ({difference})"
            lines[-1].append(cell)
    return table(["", *arms], lines)


def draw_arms(summary: Sequence[Mapping], path: Path) -> None:
    """A panel for each measure: every seed as a point, the mean of each arm with its interval."""
    measures = list(dict.fromkeys(row["measure"] for row in summary))
    figure, axes = plt.subplots(1, len(measures), figsize=(4 * len(measures), 3.6), squeeze=False, layout="constrained")
    for axis, measure in zip(axes[0], measures):
        rows = [row for row in summary if row["measure"] == measure]
        for place, row in enumerate(rows):
            axis.plot([place] * len(row["values"]), row["values"], "o", color="0.7", markersize=4)
            axis.errorbar(place, row["mean"], row["interval"] or 0, fmt="s", color="C0", capsize=4)
        axis.set_xticks(range(len(rows)), [row["arm"] for row in rows], rotation=30, ha="right", fontsize=8)
        axis.set_title(measure, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
