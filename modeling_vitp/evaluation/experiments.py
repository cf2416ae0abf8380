"""Experiments over seeds: spread, tables, and parts that are not run again."""

from collections.abc import Sequence

import numpy as np


def summarise(scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Of each score the mean over the draws, its spread (the sample standard deviation), and the values."""
    summary = {}
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        spread = values.std(ddof=1) if len(values) > 1 else None
        summary[name] = {"mean": values.mean(), "spread": spread, "values": values.tolist()}
    return summary


def table(results: Sequence[dict], control: dict[str, float], score: str) -> str:
    """Markdown with a row for each backbone, a column for each probe and number of labels."""
    columns = list(dict.fromkeys(f"{item['probe']}, {item['labels']}" for item in results))
    cells = {}
    for item in results:
        mean, spread = item["scores"][score]["mean"], item["scores"][score]["spread"]
        cell = f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
        cells.setdefault(item["backbone"], {})[f"{item['probe']}, {item['labels']}"] = cell
    rows = [[name, *(row[column] for column in columns)] for name, row in cells.items()]
    rows.append(["largest class, whatever the image", *[f"{control[score]:.3f}"] * len(columns)])
    lines = [[score.replace("_", " "), *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
