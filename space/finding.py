"""What a map shows of an image in which something is marked: how well it can be told from the rest, in numbers."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from uploading import CROWNS, EXAMPLES
from views import PCA, Seen

CHANCE, CLEARLY = 0.5, 0.05


def finding(path: str, kind: str, seen: Sequence[Seen]) -> str:
    """One sentence about the components in a map, of the image with marked tree crowns; of others an empty one."""
    if kind != PCA or Path(path).name != EXAMPLES[CROWNS].name or not seen:
        return ""
    scores = [best_component(one.values) for one in seen]
    text = (
        f"**What is seen:** one colour of {seen[0].name} alone tells patches of the marked tree crowns from all others "
        f"with an AUC of {scores[0]:.2f} ({CHANCE:g} is chance)"
    )
    if len(seen) > 1:
        text += f", one of {seen[1].name} with {scores[1]:.2f}"
        gain = scores[0] - scores[1]
        text += ": what a crown is " + (
            "can be seen in the first, and hardly in the second"
            if gain > CLEARLY
            else "is not seen better in the first"
        )
    return text + ". No label was used for the colours."


def best_component(scores: torch.Tensor) -> float:
    """The largest area under the ROC curve with which one of the components, in either direction, finds the crowns."""
    marked = crowns(*scores.shape[1:])
    areas = [area_under_curve(component.numpy(), marked) for component in scores]
    return max(max(area, 1 - area) for area in areas)


def crowns(rows: int, columns: int) -> np.ndarray:
    """bool, of shape `(rows, columns)`: whether the middle of a patch is in the box of a tree crown."""
    marked = json.loads(EXAMPLES[CROWNS].with_suffix(".json").read_text())
    height, width = marked["size"]
    y, x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    inside = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in marked["boxes"]:
        inside |= ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))
    return inside


def area_under_curve(values: np.ndarray, marked: np.ndarray) -> float:
    """The share of pairs of a marked and another place in which the marked one has the larger value; ties are half."""
    inside, outside = values[marked], np.sort(values[~marked])
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))
