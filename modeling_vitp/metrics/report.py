"""Paths of metrics by name, and the format of their results: one value per class, JSON without NaN."""

import math
from pathlib import Path
from typing import Any

METRICS_FOLDER = Path(__file__).parent


def metric_path(name: str) -> str:
    """Return the path of a metric for `evaluate.load`: a folder of this package by its name, or a file or folder.

    Raises:
        ValueError: if neither exists.
    """
    path = METRICS_FOLDER / name / f"{name}.py"
    if path.is_file():
        return str(path.parent)
    custom_path = Path(name).expanduser()
    if not custom_path.exists():
        metric_names = []
        for folder in sorted(METRICS_FOLDER.iterdir()):
            if (folder / f"{folder.name}.py").is_file():
                metric_names.append(folder.name)
        raise ValueError(
            f"Unknown metric {name!r}. Expected a path of a Python file or folder, or one of {', '.join(metric_names)}."
        )
    return str(custom_path.resolve())


def name_classes(metrics: dict, names: list[str]) -> dict[str, float]:
    """Return metrics with one value per class, such as `iou/building`, in place of lists such as `per_category_iou`."""
    flat_metrics = {}
    for key, value in metrics.items():
        if not isinstance(value, list):
            flat_metrics[key] = value
            continue
        score_name = key.removeprefix("per_category_")
        for class_name, class_score in zip(names, value):
            flat_metrics[f"{score_name}/{class_name}"] = class_score
    return flat_metrics


def without_nan(value: Any) -> Any:
    """Replace NaN, the score of a class that never occurs, by `None`, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
