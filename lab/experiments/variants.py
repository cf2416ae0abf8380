"""Experiments on pretraining: arms that differ in some settings, over several seeds, compared with a control."""

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from matplotlib.figure import Figure

from lab.command import config_of, run_module
from lab.experiments.arguments import ROWS, ExperimentArguments, FinetuningPlan, slug
from lab.experiments.site_probes import score_sites
from modeling_vitp.adaptation.comparison import Comparison, fine_tuning_settings
from modeling_vitp.adaptation.labels import labels_of_config, read_labels
from modeling_vitp.cards.sections import table
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.command.paths import read_yaml
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.metrics.resampling import half_width
from modeling_vitp.modeling_vitp_backbone import open_vit_config
from modeling_vitp.tasks.probing import format_spread
from modeling_vitp.training.checkpointing import FolderLock, write_whole

logger = logging.getLogger(__name__)
WAIT = 20  # seconds to wait for other processes


class Busy(Exception):
    """Error for a run that another process is working on."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder of the experiment. Raise [`Busy`] if another process holds the lock."""
    lock = FolderLock(folder / "_claim")  # The run itself locks the folder too, under another name.
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
    """Experiment with its plan.

    Args:
        args: plan of the experiment.
        task: `Downstream` of the pretraining task, for arms with a part of the training rows and for further scores.
    """

    args: ExperimentArguments
    task: Any = None

    def __post_init__(self):
        plan, self.labels = self.args.finetuning, None
        if isinstance(plan, FinetuningPlan):
            read = read_labels if plan.config is None else labels_of_config
            self.labels = read(plan.config or plan.data, Path(self.args.output_dir) / "splits")

    @property
    def folder(self) -> Path:
        return Path(self.args.runs_dir or self.args.output_dir)

    def run(self) -> dict:
        """Run all missing arms, seed by seed, and return the metrics of the experiment.

        An interrupted run is resumed from its last checkpoint. Scores of finished runs are kept in `metrics.json`, even
        if the folder of the run is deleted. Runs of other processes are waited for at the end, so the same command can
        be started once for each core.
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
        """Add scores and chosen learning rates to `metrics.json`, and return its content.

        The summary covers the arms that share a seed with the control, over the seeds that all these arms have.

        Raises:
            ValueError: if the existing file has no scores of an experiment, or another plan or base.
        """
        args, path = self.args, Path(self.args.output_dir) / "metrics.json"
        plan, base = json.loads(json.dumps([plan_of(args), read_yaml(args.base)]))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".metrics.lock")):  # Other processes add their scores to the same file.
            if path.is_file():
                try:
                    there = json.loads(path.read_text())
                    kept, tuned = scores_of(there), dict(there.get("tuning") or {})
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ValueError(f"{path} has no scores of an experiment. Set another output_dir.") from error
                for name, value in (("plan", plan), ("base", base)):
                    if there.get(name) != value:
                        raise ValueError(f"{path} belongs to another {name}. Set another output_dir.")
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
        """Return the result of `tune` for an arm, which is stored in `metrics.json` and not computed again."""
        tuned = self.save({}).get("tuning", {})
        return tuned[arm] if arm in tuned else self.save({}, {arm: tune()})["tuning"][arm]

    def run_arm(self, arm: str, seed: int) -> dict[str, float]:
        """Run one arm with one seed and return its measures."""
        folder = self.run_folder(arm, seed)
        with claimed(folder):
            metrics = self.train(arm, seed, folder)
            if self.labels is not None:
                metrics["finetuning"] = self.fine_tune(arm, seed, folder / "backbone")
            if self.args.site_probes is not None:
                config = self.config(arm, seed, folder)
                start = config["vision_model"]
                if config.get("objective") == "random":  # Between the start and random weights lies nothing to choose.
                    start = str(folder / "backbone")
                output = folder.with_name(f"{folder.name}_sites")
                metrics["sites"] = score_sites(self.args.site_probes, start, folder / "backbone", output)
            if self.task is not None:
                metrics |= self.task.score(self, arm, seed, folder)
        scores = {title: look_up(metrics, path) for title, path in self.args.measures.items()}
        logger.info("%s, seed %d: %s (%s)", arm, seed, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), folder)
        return scores

    def run_folder(self, arm: str, seed: int) -> Path:
        """Return the folder of a run: that of the arm, or that of another arm with the same settings."""
        folder = self.folder / f"seed_{seed}" / slug(arm)
        if config_of(folder).is_file():
            return folder
        config = self.config(arm, seed, folder)
        others = (path.with_suffix("") for path in sorted(folder.parent.glob("*.yaml")))
        return next((other for other in others if recorded(other) == {**config, "output_dir": str(other)}), folder)

    def config(self, arm: str, seed: int, folder: Path, **changes: Any) -> dict[str, Any]:
        """Return the configuration of a pretraining."""
        settings = dict(self.args.arms[arm] or {})
        before, left_out = settings.pop("after", None), settings.pop("without_sources", ())
        rows = [settings.pop(name) for name in ROWS if name in settings]
        config = merge_settings(read_yaml(self.args.base), settings)
        if left_out:
            sources = config["mixture"]["sources"]
            config["mixture"]["sources"] = [source for source in sources if source["name"] not in left_out]
        config |= {"output_dir": str(folder), "seed": seed, **changes}
        if before is not None:
            config["vision_model"] = str(folder.with_name(slug(before)) / "backbone")
        if rows:
            config["dataset_name"] = str(folder / "labeled")
        return config

    def train(self, arm: str, seed: int, folder: Path, **changes: Any) -> dict[str, Any]:
        """Pretrain an arm unless it is finished, after the arm that it starts from, and return its metrics.

        Args:
            changes: changes of the configuration, in addition to those of the arm.

        Raises:
            ValueError: if the existing run has other settings.
        """
        settings, base = self.args.arms[arm] or {}, read_yaml(self.args.base)
        if before := settings.get("after"):
            started = folder.with_name(slug(before))
            with claimed(started):
                self.train(before, seed, started, **changes)
        config = self.config(arm, seed, folder, **changes)
        if config_of(folder).is_file() and recorded(folder) != config:
            raise ValueError(f"{config_of(folder)} has other settings than arm {arm!r}. Set another output_dir.")

        def run() -> dict[str, Any]:
            if rows := {name: settings[name] for name in ROWS if name in settings}:
                dataset = {**base, **settings, **changes}["dataset_name"]
                self.task.write_labeled(dataset, seed, folder / "labeled", **rows)
            if "objective" in settings:
                module = "lab.experiments.controls" if self.args.needs_task else "lab.experiments.objectives"
            elif "task" in config:
                module = "lab.trees.pretrain"
            else:
                module = "modeling_vitp.recipes.pretrain"
            return run_module(module, config, folder, check=False)  # An arm may fail a gate.

        return progress_of(folder).result("pretraining", run)

    def fine_tune(self, arm: str, seed: int, backbone: Path) -> dict[str, float]:
        """Return the `learning_rate` of an arm, which the first seed chooses, and the test score by share of labels."""
        plan, output = self.args.finetuning, Path(self.args.output_dir) / "fine_tuning"
        if plan.config is None:
            settings = fine_tuning_settings(self.labels, open_vit_config(str(backbone)), plan.settings)
        else:
            settings = {**self.labels.settings, **(plan.settings or {}), "data": self.labels.data}
        progress = progress_of(output / slug(arm) / f"seed_{seed}")
        comparison = Comparison(self.labels, settings, plan.steps, plan.learning_rates, output, progress)
        of_run = slug(arm), str(backbone)

        def tune() -> dict[str, float]:
            if seed != self.args.seeds[0]:
                raise Busy  # Another process runs the first seed.
            return {"chosen": comparison.choose_rate(*of_run, seed)}

        rate = self.tuning(arm, tune)["chosen"]
        shares = {1.0, *plan.label_shares}
        scores = {share: comparison.score(*of_run, rate, seed, share)["score"] for share in shares}
        return {"learning_rate": rate, **{key("labels", share): score for share, score in scores.items()}}


def progress_of(folder: Path) -> Progress:
    return Progress(folder / "progress.json")


def key(name: str, share: float) -> str:
    """Return a key with the share in percent, such as `labels_10`."""
    return f"{name}_{round(100 * share)}"


def recorded(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run in a folder, with that folder as `output_dir`."""
    return read_yaml(config_of(folder)) | {"output_dir": str(folder)}


def scores_of(metrics: Mapping) -> dict[tuple[int, str], dict[str, float]]:
    """Return the measures in an experiment's `metrics.json`, by seed and arm."""
    runs = [dict(run) for run in metrics["runs"]]
    return {(run.pop("seed"), run.pop("arm")): run for run in runs}


def plan_of(args: ExperimentArguments) -> dict[str, Any]:
    """Return the plan of an experiment for its `plan.json`."""
    probes = "probe_label_shares", "corruption_severities", "probe_color_jitter"
    names = "claim", "against", "base", "arms", "control", "measures", "finetuning", "site_probes", *probes
    plan = {name: getattr(args, name) for name in names}
    plan["base"] = Path(args.base).stem  # The path may differ; the settings are compared for each run.
    plan = {name: vars(value) if is_dataclass(value) else value for name, value in plan.items()}
    return {name: value for name, value in plan.items() if value}


def merge_settings(base: Mapping, changes: Mapping) -> dict:
    """Return a configuration with changes, which are merged into nested mappings."""
    merged = copy.deepcopy(dict(base))
    for name, value in changes.items():
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge_settings(merged[name], value) if is_nested else value
    return merged


def look_up(metrics: Mapping, path: str) -> float:
    """Return a number of nested metrics by its dotted keys.

    Raises:
        ValueError: if a key is not found or the value is not a number.
    """
    found = metrics
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            there = sorted(found) if isinstance(found, Mapping) else found
            raise ValueError(f"measures: {path!r} not found in metrics.json. Found instead of {name!r}: {there}.")
        found = found[name]
    if not isinstance(found, (int, float)):
        raise ValueError(f"measures: {path!r} must be a number in metrics.json, got {found!r}.")
    return float(found)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% interval by Student's t, or `None` for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), half_width(np.var(values, ddof=1) / len(values), len(values) - 1)


def paired_summary(runs: Sequence[Mapping], control: str) -> list[dict]:
    """Return mean and interval of each arm and measure, and of the difference to the control with the same seed."""
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
    """Return the summary as a Markdown table with a row for each measure.

    The cells of other arms than the control include the difference, in bold if its interval excludes 0.
    """
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
    """Draw a panel for each measure, with a point for every seed and the mean of each arm with its interval."""
    measures = list(dict.fromkeys(row["measure"] for row in summary))
    figure = Figure(figsize=(4 * len(measures), 3.6), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        rows = [row for row in summary if row["measure"] == measure]
        for place, row in enumerate(rows):
            axis.plot([place] * len(row["values"]), row["values"], "o", color="0.7", markersize=4)
            axis.errorbar(place, row["mean"], row["interval"] or 0, fmt="s", color="C0", capsize=4)
        axis.set_xticks(range(len(rows)), [row["arm"] for row in rows], rotation=30, ha="right", fontsize=8)
        axis.set_title(measure, fontsize=9)
    figure.savefig(path, dpi=110)
