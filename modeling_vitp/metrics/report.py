"""Metrics as they are written down: where they lie, one value a class, JSON without NaN."""

import math
from pathlib import Path
from typing import Any

METRICS_FOLDER = Path(__file__).parent


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
