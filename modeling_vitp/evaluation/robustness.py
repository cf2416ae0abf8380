"""Robustness of fine-tuned models: scores under the paper's corruptions, absolute and relative to clean images."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
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
from ..tasks import TASKS
from ..tasks.robustness import RobustnessScorer
from ..tasks.robustness_arguments import RobustnessArguments
from ..training.checkpointing import FolderLock, check_no_model, write_whole
from .comparison import Progress, check_same_settings, read_model_type, short_names

CLEAN = "clean"


def open_scorer(name: str, args: RobustnessArguments) -> RobustnessScorer:
    """Return the scorer of a fine-tuned model, which the task of its model type names."""
    model_type = read_model_type(name)
    fine_tuned_types = []
    for registered_type, entry in MODELS.items():
        if entry.task is not None:
            fine_tuned_types.append(registered_type)
    if model_type not in fine_tuned_types:
        expected = ", ".join(fine_tuned_types)
        raise ValueError(f"Expected a fine-tuned model ({expected}), got {name} of type {model_type!r}.")
    task = TASKS[MODELS[model_type].task]
    return task.scorer_class(name, args)


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
    conditions = []
    for corruption in args.corruptions or SEVERITIES:
        for severity in args.severities:
            parameters(corruption, severity)  # It raises an error if the corruption is unknown.
            conditions.append((corruption, severity))
    scorers, about = open_scorers(args)
    lock = FolderLock(args.output_dir)
    lock.acquire()
    try:
        return score_models(scorers, about, conditions, Path(args.output_dir))
    finally:
        lock.release()


def score_models(
    scorers: dict[str, RobustnessScorer],
    about: dict[str, Any],
    conditions: Sequence[tuple[str, int]],
    output_dir: Path,
) -> dict[str, Any]:
    """Return the metrics of all models; write them after each model, which is then removed from `scorers`."""
    settings_of_all = {}
    for name, setting in about.items():
        if name not in ("score", "images"):
            settings_of_all[name] = setting
    settings_of_all["parameters of corruptions"] = SEVERITIES
    check_same_settings(output_dir / "settings.json", settings_of_all)
    metrics = {**about, "models": []}
    names = list(scorers)
    for name, label in zip(names, short_names(names)):
        scorer = scorers.pop(name)  # Only one model at a time is in memory.
        settings = scorer.settings
        metrics["greater_is_better"] = scorer.greater_is_better
        folder_name = re.sub(r"[^\w.=-]+", "--", os.path.normpath(name)).strip("-")
        folder = output_dir / folder_name
        check_same_settings(folder / "settings.json", settings)
        all_conditions = [(CLEAN, 0), *conditions]
        scores = score_conditions(scorer, folder, label, all_conditions)
        summary = summarize_conditions(scores, about["score"])
        model_metrics = {"model": label, "settings": settings, **summary}
        metrics["models"].append(model_metrics)
        write_whole(output_dir / "metrics.json", json.dumps(without_nan(metrics), indent=2) + "\n")
    return metrics


def open_scorers(args: RobustnessArguments) -> tuple[dict[str, RobustnessScorer], dict[str, Any]]:
    """Return the scorers by model name, and the settings that all of them share."""
    scorers = {name: open_scorer(name, args) for name in args.models}
    first_name = args.models[0]
    first_scorer = scorers[first_name]
    for name, scorer in scorers.items():
        different_keys = []
        for key, value in first_scorer.data.items():
            if scorer.data[key] != value:
                different_keys.append(key)
        if different_keys:
            keys = " and ".join(different_keys)
            raise ValueError(f"{name} and {first_name} differ in their {keys}. Set --data.")
        if scorer.score != first_scorer.score:
            raise ValueError(
                f"{name} is scored by {scorer.score}, but {first_name} by {first_scorer.score}. Set --metric."
            )
    about = {
        "score": first_scorer.score,
        "images": len(first_scorer),
        **first_scorer.data,
        "seed": args.seed,
        "jpeg_quality": args.jpeg_quality,
    }
    return scorers, about


def score_conditions(
    scorer: RobustnessScorer,
    folder: Path,
    label: str,
    conditions: Sequence[tuple[str, int]],
) -> dict[tuple[str, int], dict[str, float]]:
    """Return the metrics under each condition; finished conditions are stored in `progress.json` of the folder."""
    progress = Progress(folder / "progress.json")
    condition_names = {}
    for corruption, severity in conditions:
        condition_names[corruption, severity] = f"{corruption}_{severity}" if severity else corruption
    missing_names = set(condition_names.values()) - progress.parts.keys()
    num_images = len(missing_names) * len(scorer)
    scores = {}
    with (
        logging_redirect_tqdm(),
        tqdm(total=num_images, unit="image", disable=not missing_names) as bar,
    ):

        def evaluate(corruption: str, severity: int) -> dict[str, float | None]:
            bar.set_description(f"{label}: {condition_names[corruption, severity]}")
            applied_corruption = None if corruption == CLEAN else corruption
            metrics = scorer.evaluate(applied_corruption, severity, bar.update)
            return without_nan(metrics)

        for (corruption, severity), condition_name in condition_names.items():
            evaluate_condition = partial(evaluate, corruption, severity)
            stored_metrics = progress.result(condition_name, evaluate_condition)
            metrics = {}
            for name, value in stored_metrics.items():
                metrics[name] = math.nan if value is None else value
            check_has_score(scorer.score, metrics)
            scores[corruption, severity] = metrics
    return scores


def check_has_score(score: str, metrics: dict[str, Any]) -> None:
    if score in metrics:
        return
    names = []
    for name, value in metrics.items():
        if not isinstance(value, str):
            names.append(name)
    known_names = ", ".join(names)
    raise ValueError(f"Unknown score {score!r}. The metric has {known_names}.")


def summarize_conditions(scores: dict[tuple[str, int], dict[str, float]], score: str) -> dict[str, Any]:
    """Summarize the metrics of all conditions.

    Returns:
        Score and all metrics under `clean` and for each of `conditions`; the mean score over the severities of each of
        `corruptions`, and `average`, the mean over the corruptions. `relative` is the ratio to the clean score, which
        is above 1 for a loss if a lower score is better.
    """
    clean = scores[CLEAN, 0][score]

    def with_relative(value: float) -> dict[str, float]:
        relative = value / clean if clean else math.nan
        return {"score": value, "relative": relative}

    conditions = []
    scores_by_corruption = defaultdict(list)
    for (corruption, severity), metrics in scores.items():
        if corruption == CLEAN:
            continue
        condition = {
            "corruption": corruption,
            "severity": severity,
            **with_relative(metrics[score]),
            "metrics": metrics,
        }
        conditions.append(condition)
        scores_by_corruption[corruption].append(metrics[score])
    means = []
    corruptions = {}
    for corruption, scores_of_severities in scores_by_corruption.items():
        mean = sum(scores_of_severities) / len(scores_of_severities)
        means.append(mean)
        corruptions[corruption] = with_relative(mean)
    average = sum(means) / len(means)
    return {
        "clean": {"score": clean, "metrics": scores[CLEAN, 0]},
        "average": with_relative(average),
        "corruptions": corruptions,
        "conditions": conditions,
    }


def format_score(item: dict[str, float]) -> list[str]:
    """Return score and relative score as texts for a table, with a dash for NaN."""
    score = item["score"]
    relative = item.get("relative", 1.0)
    score_text = "–" if math.isnan(score) else f"{score:.3f}"
    relative_text = "–" if math.isnan(relative) else f"{relative:.1%}"
    return [score_text, relative_text]


def robustness_table(metrics: dict[str, Any]) -> str:
    """Return a Markdown table of all models: clean, each corruption (mean over its severities) and the average."""
    header = [score_title(metrics)]
    clean_row = ["clean"]
    average_row = ["average"]
    corruption_rows = {}
    for model in metrics["models"]:
        header += [model["model"], "of clean"]
        clean_row += format_score(model["clean"])
        average_row += format_score(model["average"])
        for corruption, mean in model["corruptions"].items():
            row = corruption_rows.setdefault(corruption, [corruption.replace("_", " ")])
            row += format_score(mean)
    return table(header, [clean_row, *corruption_rows.values(), average_row])


def score_title(metrics: dict[str, Any]) -> str:
    """Return the name of the score, which says if a lower score is better."""
    title = metrics["score"].replace("_", " ")
    if metrics["greater_is_better"]:
        return title
    return f"{title} (lower is better)"


def severity_table(model: dict[str, Any]) -> str:
    """Return a Markdown table with a row for each corruption and a column for each severity."""
    header = [f"{model['model']}, at severity"]
    rows = {}
    for condition in model["conditions"]:
        if condition["severity"] not in header:
            header.append(condition["severity"])
        corruption = condition["corruption"]
        row = rows.setdefault(corruption, [corruption.replace("_", " ")])
        score, relative = format_score(condition)
        row.append(f"{score} ({relative})")
    return table(header, list(rows.values()))


def draw_robustness(metrics: dict[str, Any], path: Path) -> None:
    """Draw a plot for each corruption: score of each model by severity, where 0 is clean images."""
    models = metrics["models"]
    corruptions = list(models[0]["corruptions"])
    num_columns = min(4, len(corruptions))
    num_rows = math.ceil(len(corruptions) / num_columns)
    width = 1 + 2.4 * num_columns
    height = 0.8 + 2.0 * num_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axis, corruption in zip(axes.flat, corruptions):
        for model in models:
            points = []
            for condition in model["conditions"]:
                if condition["corruption"] == corruption:
                    points.append((condition["severity"], condition["score"]))
            points = [(0, model["clean"]["score"]), *sorted(points)]
            severities, scores = zip(*points)
            axis.plot(severities, scores, marker="o", markersize=3)
        axis.set_title(corruption.replace("_", " "), fontsize=9)
        axis.set_xticks(range(6))
    for unused_axis in axes.flat[len(corruptions) :]:
        unused_axis.axis("off")
    labels = [model["model"] for model in models]
    figure.legend(labels, loc="outside upper center", ncols=4, fontsize=8)
    figure.supxlabel("severity (0: clean)", fontsize=9)
    figure.supylabel(score_title(metrics), fontsize=9)
    figure.savefig(path, dpi=120)
