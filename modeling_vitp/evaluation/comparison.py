"""Comparisons over seeds: finished parts, mean and standard deviation, tables."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ..cards.sections import table
from ..training.checkpointing import write_whole


class Progress:
    """Results of finished parts in `progress.json`, which are not computed again.

    Args:
        path: file of the results.
    """

    def __init__(self, path: Path):
        self.path = path
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def result(self, part: str, run: Callable[[], Any]) -> Any:
        """Return the result of a part, which is JSON. Run the part if it is not finished.

        Args:
            part: name of the part; the text before the first slash is its stage.
            run: function that returns the result.
        """
        if part not in self.parts:
            began = time.monotonic()
            result = json.loads(json.dumps(run()))
            self.parts[part] = {"seconds": time.monotonic() - began, "result": result}
            self.write()
        return self.parts[part]["result"]

    def forget(self, part: str) -> None:
        """Remove the result of a part, so that the part runs again."""
        del self.parts[part]
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.parts, indent=1) + "\n")

    def seconds(self, stage: str) -> float:
        """Return the seconds that the finished parts of a stage took."""
        return sum(entry["seconds"] for part, entry in self.parts.items() if part.split("/")[0] == stage)


def check_same_settings(record: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a comparison, or check that they equal the recorded ones.

    Raises:
        ValueError: If settings differ from those in `record`; the message names them.
    """
    settings = json.loads(json.dumps(settings))
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(settings, indent=2) + "\n")
        return
    recorded = json.loads(record.read_text())
    changed = sorted(name for name in settings | recorded if settings.get(name) != recorded.get(name))
    if changed:
        raise ValueError(f"{record} belongs to a run with different {', '.join(changed)}. Set another output_dir.")


def read_model_type(name: str) -> str | None:
    """Return the model type of a folder or Hub id.

    Raises:
        ValueError: If the configuration cannot be read.
    """
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"The model {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each model's name, or the whole name if the last part is not unique."""
    short = [Path(os.path.abspath(name)).name for name in names]
    return [name if short.count(last) > 1 else last for name, last in zip(names, short)]


def format_spread(mean: float, spread: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def summarize_draws(scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Return mean, sample standard deviation (`None` for a single value) and values of each score."""
    summary = {}
    for name in scores[0]:
        values = [float(score[name]) for score in scores]
        spread = np.std(values, ddof=1).item() if len(values) > 1 else None
        summary[name] = {"mean": np.mean(values).item(), "spread": spread, "values": values}
    return summary


def probe_table(results: Sequence[dict], control: dict[str, float], score: str, control_name: str) -> str:
    """Return a Markdown table with a row for each backbone and the control, and a column for each probe and labels."""
    columns = list(dict.fromkeys(f"{item['probe']}, {item['labels']}" for item in results))
    cells = {}
    for item in results:
        of_score = item["scores"][score]
        cell = format_spread(of_score["mean"], of_score["spread"])
        cells.setdefault(item["backbone"], {})[f"{item['probe']}, {item['labels']}"] = cell
    rows = [[name, *(row[column] for column in columns)] for name, row in cells.items()]
    rows.append([control_name, *[f"{control[score]:.3f}"] * len(columns)])
    return table([score.replace("_", " "), *columns], rows)
