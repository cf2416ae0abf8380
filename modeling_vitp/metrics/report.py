"""Metrics by name, and how they are written down: one value a class, JSON without NaN."""

import math
from pathlib import Path
from typing import Any

METRICS_FOLDER = Path(__file__).parent


def metric_path(name: str) -> str:
    """Return what `evaluate.load` takes for a metric: a folder of this package by its name, or a file or folder.

    Raises:
        ValueError: if there is neither.
    """
    path = METRICS_FOLDER / name / f"{name}.py"
    if path.is_file():
        return str(path.parent)
    if not Path(name).expanduser().exists():
        known = ", ".join(
            sorted(folder.name for folder in METRICS_FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())
        )
        raise ValueError(f"Unknown metric {name!r}. Expected a path of a Python file or folder, or one of {known}.")
    return str(Path(name).expanduser().resolve())


def name_classes(metrics: dict, names: list[str]) -> dict[str, float]:
    """Lists by class, `per_category_iou`, as one value for each: `iou/building`."""
    named = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            named |= {f"{key.removeprefix('per_category_')}/{name}": item for name, item in zip(names, value)}
        else:
            named[key] = value
    return named


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be scored, a class that never occurs, is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
