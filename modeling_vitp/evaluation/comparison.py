"""Comparisons over seeds: finished parts, mean and standard deviation, tables."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..training.checkpointing import write_whole


class Progress:
    """Results of finished parts in `progress.json`, which are not computed again.

    Args:
        path: file of the results.
    """

    def __init__(self, path: Path):
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.parts = json.loads(path.read_text())

    def result(self, part: str, run: Callable[[], Any]) -> Any:
        """Return the result of a part, which is JSON. Run the part if it is not finished.

        Args:
            part: name of the part; the text before the first slash is its stage.
            run: function that returns the result.
        """
        if part not in self.parts:
            start = time.monotonic()
            # A result has the same types when it is read from the file, such as lists in the place of tuples.
            result = json.loads(json.dumps(run()))
            seconds = time.monotonic() - start
            self.parts[part] = {"seconds": seconds, "result": result}
            self.write()
        return self.parts[part]["result"]

    def forget(self, part: str) -> None:
        """Remove the result of a part, so that the part runs again."""
        del self.parts[part]
        self.write()

    def write(self) -> None:
        text = json.dumps(self.parts, indent=1)
        write_whole(self.path, text + "\n")

    def seconds(self, stage: str) -> float:
        """Return the seconds that the finished parts of a stage took."""
        seconds = 0
        for part, record in self.parts.items():
            stage_of_part, *_ = part.split("/")
            if stage_of_part == stage:
                seconds += record["seconds"]
        return seconds


def check_same_settings(record: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a comparison, or check that they equal the recorded ones.

    Raises:
        ValueError: If settings differ from those in `record`; the message names them.
    """
    settings = json.loads(json.dumps(settings))
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2)
        write_whole(record, text + "\n")
        return
    recorded = json.loads(record.read_text())
    changed_names = []
    for name in sorted({*settings, *recorded}):
        if settings.get(name) != recorded.get(name):
            changed_names.append(name)
    if changed_names:
        names = ", ".join(changed_names)
        raise ValueError(f"{record} belongs to a run with different {names}. Set another output_dir.")


def read_model_type(name: str) -> str | None:
    """Return the model type of a folder or Hub id.

    Raises:
        ValueError: If the configuration cannot be read.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"The model {name} cannot be loaded: {cause}") from error
    return config.get("model_type")


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each model's name, or the whole name if the last part is not unique."""
    last_parts = []
    for name in names:
        path = Path(os.path.abspath(name))
        last_parts.append(path.name)
    labels = []
    for name, last_part in zip(names, last_parts):
        is_unique = last_parts.count(last_part) == 1
        labels.append(last_part if is_unique else name)
    return labels
