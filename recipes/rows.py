"""The data set that a recipe names: a Hub id or a local folder."""

import hashlib
from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from trl import ScriptArguments


def load_rows(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """All splits of the data set.

    Raises:
        ValueError: if no data set is named, or it lacks the split to train on.
    """
    name = script_args.dataset_name
    if name is None:
        raise ValueError("dataset_name is missing from the configuration: the Hub id or folder of the training data.")
    splits = load_dataset(
        name,
        script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        cache_dir=folder_cache(Path(name)) if Path(name).is_dir() else None,
    )
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: give dataset_train_split."
        )
    return splits


def folder_cache(folder: Path) -> str:
    """A cache for this state of a folder: `datasets` would go on using an older one if the folder has a card."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        state.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])
