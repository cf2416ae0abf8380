"""Data of pretraining: a mixture, a data set, or rows that a task converts to instructions."""

import importlib
import inspect
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset

from ..cards.record import public_name
from ..command.paths import find_task
from ..instructions.from_annotations.layouts import make_instructions_command
from ..instructions.mixture import Mixture, describe_schemas, open_mixture
from ..instructions.rows import SourceSettings, images_of
from ..instructions.sources import LOOKED_AT, base_of, load_rows, open_splits, take
from .arguments import PretrainArguments


@dataclass
class PretrainData:
    """Data sets of a pretraining.

    Args:
        train: training rows.
        eval: rows for evaluation during training.
        settings: encoding settings of each source of a mixture.
        splits: stored splits of the data set, for a task. Its `train` has the rows selected by `dataset_train_split`.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None = None
    settings: dict[str, SourceSettings] | None = None
    splits: DatasetDict | None = None


def load_task(args: PretrainArguments) -> ModuleType | None:
    """Return the module of the task, or `None` if there is none or `dataset_name` is other data than the task reads.

    In the second case the task is removed from the arguments, and a line says so.

    Raises:
        ValueError: if `task_options` has an unknown key, or settings of the rows are given to a task, which does not
            read them.
    """
    if args.task is None:
        return None
    task = importlib.import_module(find_task(args.task))
    known = list(inspect.signature(task.transform).parameters)[1:]
    for name in args.task_options or {}:
        if name not in known:
            raise ValueError(f"task_options: unknown key {name!r}. Known: {', '.join(known)}.")
    try:
        splits = load_rows(args)
        is_read = task.SPLITS <= splits.keys() and task.COLUMNS <= {*splits["train"].column_names}
    except ValueError:
        is_read = False
    if not is_read:
        if PartialState().is_main_process:
            print(f"{args.dataset_name} is not data of the task {args.task!r}: training on it without the task.")
        args.task = args.task_options = None
        return None
    for name in ("image_root", "columns", "prompt"):
        if getattr(args, name) is not None:
            raise ValueError(f"Expected no {name} with the task {args.task!r}, which reads its own columns. Remove it.")
    return task


def open_data(
    args: PretrainArguments, mixture: Mixture | None, task: ModuleType | None, seed: int, evaluates: bool = False
) -> PretrainData:
    """Open the data sets of a pretraining, which evaluates on some rows during training if `evaluates` is true.

    Raises:
        ValueError: if the evaluation split is missing, or if a mixture or a task does not allow one.
    """
    name = args.dataset_test_split
    if mixture is not None:
        if evaluates:
            raise ValueError(
                "A mixture has no rows to evaluate on during training. Set eval_strategy: no, or train on a "
                "dataset_name with a dataset_test_split."
            )
        settings = {source.name: source for source in mixture.sources}
        return print_schemas(PretrainData(open_mixture(mixture, seed), settings=settings))
    if task is not None:
        if name != PretrainArguments.dataset_test_split:
            raise ValueError(f"dataset_test_split={name!r}: a task is scored on its own splits. Remove the option.")
        splits = load_rows(args)
        splits["train"] = take(splits[base_of(args.dataset_train_split)], args.dataset_train_split)
        return PretrainData(*task.prepare(splits), splits=splits)
    command = make_instructions_command(args.dataset_name)
    try:
        opened, names = open_splits(args, args.image_root, args.columns, args.prompt)
        first = itertools.islice(opened[args.dataset_train_split], LOOKED_AT)
        if command and not any(map(images_of, first)):
            raise ValueError(f"{args.dataset_name} has no conversations with images.")
    except ValueError as error:
        if command is None:
            raise
        raise ValueError(
            f"Expected conversations in {args.dataset_name}, found annotations. Make instructions from them: {command}"
        ) from error
    if name not in opened and (evaluates or name != PretrainArguments.dataset_test_split):
        raise ValueError(
            f"No split {name!r} in {args.dataset_name}. Found: {', '.join(names)}. Set dataset_test_split, or "
            "eval_strategy: no."
        )
    return print_schemas(PretrainData(opened[args.dataset_train_split], opened.get(name)))


def print_schemas(data: PretrainData) -> PretrainData:
    """Print the format of the training rows in the main process, and return the data."""
    if PartialState().is_main_process:
        print(*describe_schemas(data.train), sep="\n")
    return data


def describe_data(
    args: PretrainArguments, mixture: Mixture | None, dataset: Dataset | IterableDataset
) -> list[dict[str, object]]:
    """Return a description of the training data for the record of the run; `dataset` is a Hub id or `None`."""
    if mixture is None:
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        on_hub = {"dataset": None if Path(args.dataset_name).exists() else args.dataset_name}
        return [{"name": public_name(args.dataset_name), **on_hub, "split": args.dataset_train_split, "rows": rows}]
    return [
        {
            "name": source.name,
            "dataset": source.dataset if source.is_on_hub else None,
            "rows": source.rows,
            "rate": source.rate,
            "modality": source.modality,
            "tasks": source.tasks,
        }
        for source in mixture.sources
    ]


def describe_evaluation(args: PretrainArguments) -> dict[str, str] | None:
    """Return a description of the evaluation data for the record of the run."""
    if args.dataset_name is None:
        return None
    on_hub = {} if Path(args.dataset_name).exists() else {"dataset": args.dataset_name}
    return {"name": public_name(args.dataset_name), "eval": args.dataset_test_split, **on_hub}
