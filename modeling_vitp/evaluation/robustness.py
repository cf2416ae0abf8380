"""Robustness of fine-tuned models: scores under the paper's corruptions, absolute and relative to clean images."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from matplotlib.figure import Figure
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..auto.registry import MODELS
from ..cards.sections import table
from ..images.corruptions import SEVERITIES, parameters
from ..metrics.report import without_nan
from ..training.checkpointing import FolderLock, check_no_model, write_whole
from .arguments import RobustnessArguments
from .comparison import Progress, check_same_settings, read_model_type, short_names
from .robustness_tasks import TASKS, RobustnessTask

CLEAN = "clean"


def open_robustness_task(name: str, args: RobustnessArguments) -> RobustnessTask:
    model_type = read_model_type(name)
    known = {name: entry.robustness_task for name, entry in MODELS.items() if entry.robustness_task is not None}
    if model_type not in known:
        raise ValueError(f"Expected a fine-tuned model ({', '.join(known)}), got {name} of type {model_type!r}.")
    return TASKS[known[model_type]](name, args)


def evaluate_robustness(args: RobustnessArguments) -> dict[str, Any]:
    """Score all models under all conditions and write `metrics.json`. Finished conditions are not run again.

    Returns:
        Metrics: one entry per model under `models`, see [`summarize_conditions`], whether a higher score is better, and
        a description of the data.

    Raises:
        ValueError: If a corruption is unknown, a model or its data are invalid, the models have different data, or the
            output folder belongs to another evaluation or to a model.
        RunStopped: If another process writes to the output folder.
    """
    if PartialState().num_processes > 1:
        raise ValueError("Robustness must be evaluated in one process. Start the command without a launcher.")
    check_no_model(args.output_dir)
    conditions = [(name, severity) for name in args.corruptions or SEVERITIES for severity in args.severities]
    for condition in conditions:
        parameters(*condition)
    tasks, about = open_robustness_tasks(args)
    lock = FolderLock(args.output_dir)
    lock.acquire()
    try:
        return score_models(tasks, about, conditions, Path(args.output_dir))
    finally:
        lock.release()


def score_models(
    tasks: dict[str, RobustnessTask], about: dict[str, Any], conditions: Sequence[tuple[str, int]], output_dir: Path
) -> dict[str, Any]:
    """Return the metrics of all models; write them after each model, which is then removed from `tasks`."""
    names, metrics = list(tasks), {**about, "models": []}
    same = {name: value for name, value in about.items() if name not in ("score", "images")}
    check_same_settings(output_dir / "settings.json", {**same, "parameters of corruptions": SEVERITIES})
    for name, label in zip(names, short_names(names)):
        task = tasks.pop(name)  # Only one model at a time is in memory.
        folder = output_dir / re.sub(r"[^\w.=-]+", "--", os.path.normpath(name)).strip("-")
        settings = task.settings
        metrics["greater_is_better"] = task.greater_is_better
        check_same_settings(folder / "settings.json", settings)
        scores = score_conditions(task, folder, label, [(CLEAN, 0), *conditions])
        metrics["models"].append({"model": label, "settings": settings, **summarize_conditions(scores, about["score"])})
        write_whole(output_dir / "metrics.json", json.dumps(without_nan(metrics), indent=2) + "\n")
    return metrics


def open_robustness_tasks(args: RobustnessArguments) -> tuple[dict[str, RobustnessTask], dict[str, Any]]:
    """Return the tasks by model name, and the settings that all of them share."""
    tasks = {name: open_robustness_task(name, args) for name in args.models}
    first, *others = tasks.values()
    for name, task in zip(args.models[1:], others):
        differ = [key for key, value in first.data.items() if task.data[key] != value]
        if differ:
            raise ValueError(f"{name} and {args.models[0]} differ in their {' and '.join(differ)}. Set --data.")
        if task.score != first.score:
            raise ValueError(f"{name} is scored by {task.score}, but {args.models[0]} by {first.score}. Set --metric.")
    return tasks, {"score": first.score, "images": len(first), **first.data, "seed": args.seed}


def score_conditions(
    task: RobustnessTask, folder: Path, label: str, conditions: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], dict[str, float]]:
    """Return the metrics under each condition; finished conditions are stored in `progress.json` of the folder."""
    parts = {f"{name}_{severity}" if severity else name: (name, severity) for name, severity in conditions}
    progress, scores = Progress(folder / "progress.json"), {}
    missing = parts.keys() - progress.parts.keys()
    with logging_redirect_tqdm(), tqdm(total=len(missing) * len(task), unit="image", disable=not missing) as bar:
        for part, (name, severity) in parts.items():

            def evaluate(name=name, severity=severity, part=part):
                bar.set_description(f"{label}: {part}")
                return without_nan(task.evaluate(None if name == CLEAN else name, severity, bar.update))

            found = progress.result(part, evaluate)
            if task.score not in found:
                known = ", ".join(key for key, value in found.items() if not isinstance(value, str))
                raise ValueError(f"Unknown score {task.score!r}. The metric has {known}.")
            scores[name, severity] = {key: math.nan if value is None else value for key, value in found.items()}
    return scores


def summarize_conditions(scores: dict[tuple[str, int], dict[str, float]], score: str) -> dict[str, Any]:
    """Summarize the metrics of all conditions.

    Returns:
        Score and all metrics under `clean` and for each of `conditions`; the mean score over the severities of each of
        `corruptions`, and `average`, the mean over the corruptions. `relative` is the ratio to the clean score, which
        is above 1 for a loss if a lower score is better.
    """
    clean = scores[CLEAN, 0][score]

    def with_relative(value: float) -> dict[str, float]:
        return {"score": value, "relative": value / clean if clean else math.nan}

    conditions = [
        {"corruption": name, "severity": severity, **with_relative(found[score]), "metrics": found}
        for (name, severity), found in scores.items()
        if name != CLEAN
    ]
    by_corruption = {}
    for item in conditions:
        by_corruption.setdefault(item["corruption"], []).append(item["score"])
    means = {name: sum(values) / len(values) for name, values in by_corruption.items()}
    return {
        "clean": {"score": clean, "metrics": scores[CLEAN, 0]},
        "average": with_relative(sum(means.values()) / len(means)),
        "corruptions": {name: with_relative(mean) for name, mean in means.items()},
        "conditions": conditions,
    }


def format_score(item: dict[str, float]) -> list[str]:
    """Return score and relative score as texts for a table, with a dash for NaN."""
    score, relative = item["score"], item.get("relative", 1.0)
    return ["–" if math.isnan(score) else f"{score:.3f}", "–" if math.isnan(relative) else f"{relative:.1%}"]


def robustness_table(metrics: dict[str, Any]) -> str:
    """Return a Markdown table of all models: clean, each corruption (mean over its severities) and the average."""
    models = metrics["models"]
    rows = [["clean", *[cell for model in models for cell in format_score(model["clean"])]]]
    for name in models[0]["corruptions"]:
        rows.append(
            [name.replace("_", " "), *[c for model in models for c in format_score(model["corruptions"][name])]]
        )
    rows.append(["average", *[cell for model in models for cell in format_score(model["average"])]])
    header = [title for model in models for title in (model["model"], "of clean")]
    return table([score_title(metrics), *header], rows)


def score_title(metrics: dict[str, Any]) -> str:
    """Return the name of the score, which says if a lower score is better."""
    title = metrics["score"].replace("_", " ")
    return title if metrics["greater_is_better"] else f"{title} (lower is better)"


def severity_table(model: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each corruption and a column for each severity."""
    severities = list(dict.fromkeys(item["severity"] for item in model["conditions"]))
    cells = {name: [] for name in model["corruptions"]}
    for item in model["conditions"]:
        cells[item["corruption"]].append("{} ({})".format(*format_score(item)))
    rows = [[name.replace("_", " "), *row] for name, row in cells.items()]
    return table([f"{model['model']}, at severity", *severities], rows)


def draw_robustness(metrics: dict[str, Any], path: Path) -> None:
    """Draw a plot for each corruption: score of each model by severity, where 0 is clean images."""
    names = list(metrics["models"][0]["corruptions"])
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(1 + 2.4 * columns, 0.8 + 2.0 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names):
        for model in metrics["models"]:
            points = [(item["severity"], item["score"]) for item in model["conditions"] if item["corruption"] == name]
            axis.plot(*zip((0, model["clean"]["score"]), *sorted(points)), marker="o", markersize=3)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(range(6))
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.legend([model["model"] for model in metrics["models"]], loc="outside upper center", ncols=4, fontsize=8)
    figure.supxlabel("severity (0: clean)", fontsize=9)
    figure.supylabel(score_title(metrics), fontsize=9)
    figure.savefig(path, dpi=120)
