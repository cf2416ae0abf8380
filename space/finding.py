"""Separation of marked objects from the background by the principal components, as AUC."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from uploading import CROWNS, EXAMPLES
from views import PCA, Seen

CHANCE, CLEARLY = 0.5, 0.05


def finding(path: str, kind: str, seen: Sequence[Seen]) -> str:
    """Describe in one sentence how well a PCA map separates the marked tree crowns; empty for other images."""
    if kind != PCA or Path(path).name != EXAMPLES[CROWNS].name or not seen:
        return ""
    scores = [best_component(one.values) for one in seen]
    text = (
        f"**Finding:** a single principal component of {seen[0].name} separates patches of tree crowns from all others "
        f"with an AUC of {scores[0]:.2f} ({CHANCE:g} is chance)"
    )
    if len(seen) > 1:
        text += f", a component of {seen[1].name} with {scores[1]:.2f}"
        gain = scores[0] - scores[1]
        text += ": the first " + ("separates crowns better" if gain > CLEARLY else "does not separate crowns better")
    return text + ". The components were computed without labels."


def best_component(scores: torch.Tensor) -> float:
    """Return the largest area under the ROC curve of a component, in either direction, for the crowns."""
    marked = crowns(*scores.shape[1:])
    areas = [area_under_curve(component.numpy(), marked) for component in scores]
    return max(max(area, 1 - area) for area in areas)


def crowns(rows: int, columns: int) -> np.ndarray:
    """Return a bool mask of shape `(rows, columns)` of the patches whose center is in the box of a tree crown."""
    marked = json.loads(EXAMPLES[CROWNS].with_suffix(".json").read_text())
    height, width = marked["size"]
    y, x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    inside = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in marked["boxes"]:
        inside |= ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))
    return inside


def area_under_curve(values: np.ndarray, marked: np.ndarray) -> float:
    """Return the share of (marked, other) pairs in which the marked value is larger; ties count half."""
    inside, outside = values[marked], np.sort(values[~marked])
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))
