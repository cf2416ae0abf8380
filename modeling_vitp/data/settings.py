"""Setting `data` of fine-tuning and probes: a data set, its splits and classes."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, load_dataset
from torch.utils.data import ConcatDataset

from ..cards.record import public_name
from ..command.settings import check_keys, check_value, from_mapping
from ..hub.failures import retry
from .files import FileSample
from .folders import check_folder
from .leaks import (
    check_disjoint,
    check_no_shared_images,
    check_patients,
    check_shared_rows,
    images_of_files,
    images_of_rows,
)
from .rows import folder_cache

logger = logging.getLogger(__name__)


def parts_of(samples: torch.utils.data.Dataset) -> list[torch.utils.data.Dataset]:
    """Return the data sets that samples are concatenated from."""
    return list(samples.datasets) if isinstance(samples, ConcatDataset) else [samples]


@dataclass(kw_only=True)
class DataSettings(ABC):
    """Base of the setting `data` in fine-tuning configurations.

    A subclass implements `_open` and `check_disjoint`.

    Args:
        root: folder of files.
        dataset_name: Hub id or folder that `datasets.load_dataset` opens, instead of `root`.
        dataset_config: name of its configuration.
        splits: settings of each split by name.
        columns: names of the columns of rows.
        input_spec: input spec of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        allow_shared_images: whether shared images and shared DICOM patients of two splits are a warning instead of an
            error.

    Attributes:
        infer_options: settings that [`infer`] takes.
    """

    infer_options: ClassVar[tuple[str, ...]] = ()
    template: ClassVar[str] = ""  # shortest configuration, for errors
    roles: ClassVar[tuple[str, ...]] = ()  # keys of `columns`

    root: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    splits: Mapping[str, Mapping | str] = field(default_factory=dict)
    columns: Mapping[str, str | Sequence[str]] | None = None
    input_spec: dict | None = None
    allow_shared_images: bool = False

    def __post_init__(self):
        if (self.root is None) == (self.dataset_name is None):
            raise ValueError("Expected either `root`, a folder of files, or `dataset_name`.")
        check_keys("columns", self.columns or {}, self.roles)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Create the settings from the `data` of a configuration.

        Raises:
            ValueError: if a setting is missing, unknown, or of the wrong type.
        """
        return from_mapping(cls, settings, "data")

    @classmethod
    def from_arguments(cls, args: Any, output_dir: str) -> Self:
        """Create the settings from the arguments of a recipe.

        If `data` has a root without splits, they are inferred from the folder, see [`infer`], and the configuration is
        saved as `data.yaml` in the output folder. `val` and `test` are then scored by default.

        Raises:
            ValueError: if the folder is not recognized, or `data.yaml` exists with other content.
        """
        if "root" in args.data and "splits" not in args.data:
            args.data = cls.complete(args.data)
            if args.has_default_splits:
                labeled_splits = set()
                for name, split_settings in args.data["splits"].items():
                    if "mask" in split_settings or "annotations" in split_settings:
                        labeled_splits.add(name)
                unused_splits = labeled_splits - set(args.train_splits)
                args.eval_split = "val" if "val" in unused_splits else None
                args.test_split = "test" if "test" in unused_splits else None
            if PartialState().is_main_process and not args.dry_run:
                configuration = {"data": args.data}
                if args.eval_split:
                    configuration["eval_split"] = args.eval_split
                if args.test_split:
                    configuration["test_split"] = args.test_split
                save_inferred(configuration, Path(output_dir) / "data.yaml")
        return cls.from_dict(args.data)

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings; if they have a root without splits, with those that are inferred from the folder.

        Raises:
            ValueError: if the folder is not found or not recognized.
        """
        if "root" not in settings or "splits" in settings:
            return dict(settings)
        check_value("data: root", settings["root"], str)
        root = Path(settings["root"])
        check_folder(root)
        options = {}
        for name in cls.infer_options:
            if name in settings:
                options[name] = settings[name]
        inferred_settings = cls.infer(root, **options)
        return {**inferred_settings, **settings}

    @classmethod
    @abstractmethod
    def infer(cls, root: Path) -> dict[str, Any]:
        """Return the settings of a folder in a standard layout.

        Raises:
            ValueError: if the layout is not recognized, or has invalid annotations.
        """

    @classmethod
    def unknown_layout(cls, root: Path, expected: str) -> ValueError:
        """Return the error for a folder whose layout is not recognized."""
        return ValueError(
            f"Classes and splits cannot be inferred from {root}: expected {expected}. Describe the data in a YAML "
            f"file, and pass it as --config: {cls.template}"
        )

    def open(self, names: Sequence[str], *args: Any) -> torch.utils.data.Dataset:
        """Return the samples of one or several splits.

        Raises:
            ValueError: if `names` is empty, a split does not exist, or its data are invalid.
        """
        if not names:
            raise ValueError(f"Expected names of splits, got none. Found in the configuration: {sorted(self.splits)}.")
        samples_of_splits = [self.open_split(name, *args) for name in names]
        if len(samples_of_splits) == 1:
            return samples_of_splits[0]
        return self._join(samples_of_splits)

    def open_split(self, name: str, *args: Any) -> torch.utils.data.Dataset:
        try:
            return self._open(name, *args)
        except OSError as error:
            raise ValueError(f"Split {name!r} cannot be opened: {error}.") from error

    @abstractmethod
    def _open(self, name: str, *args: Any) -> torch.utils.data.Dataset:
        """Return the samples of a split."""

    def _join(self, parts: list[torch.utils.data.Dataset]) -> torch.utils.data.Dataset:
        return ConcatDataset(parts)

    def load_rows(self, split: str) -> Dataset:
        """Return a split of `dataset_name`; if that is a folder, as its files are now, see [`folder_cache`]."""
        load_split = partial(
            load_dataset,
            self.dataset_name,
            self.dataset_config,
            cache_dir=folder_cache(self.dataset_name),
            split=split,
        )
        return retry(load_split)

    def split_settings(self, name: str) -> Mapping | str:
        if name not in self.splits:
            raise ValueError(f"No split {name!r} in the configuration. Found: {sorted(self.splits)}.")
        return self.splits[name]

    def describe(
        self,
        train_splits: Sequence[str],
        eval_split: str | None,
        test_split: str | None,
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Return descriptions of the training data and of the scored data for the record of the run.

        The field `data` of the second description can be passed to [`from_dict`].
        """
        name = public_name(self.dataset_name or self.root)
        hub_reference = {}
        if self.dataset_name is not None and not Path(self.dataset_name).exists():
            hub_reference["dataset"] = self.dataset_name
        training_data = [{"name": name, "split": split, **hub_reference} for split in train_splits]
        settings = {}
        for setting in fields(self):
            if not setting.init:
                continue
            value = getattr(self, setting.name)
            if value not in (None, {}):
                settings[setting.name] = value
        scored_data = {
            "name": name,
            "eval": eval_split,
            "test": test_split,
            **hub_reference,
            "data": settings,
        }
        return training_data, scored_data

    def check_files(self, samples: Mapping[str, list[FileSample]]) -> None:
        """Raise a `ValueError` if two splits share a file, a patient, a case or an image with identical bytes."""
        check_disjoint(samples)
        self.check_shared(check_patients, samples)
        self.check_shared(check_no_shared_images, images_of_files(samples))

    def check_rows(self, rows: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
        """Raise a `ValueError` if two splits share an image, see [`images_of_rows`]."""
        self.check_shared(check_no_shared_images, images_of_rows(rows))

    def check_splits(self, rows: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
        """Raise a `ValueError` if two splits share rows, a patient, a case or an image, see [`check_rows`]."""
        rows_of_splits = {}
        for name, (rows_of_split, _) in rows.items():
            rows_of_splits[name] = rows_of_split
        check_shared_rows(rows_of_splits)
        self.check_rows(rows)

    def check_shared(self, check: Callable[[Any], None], images: Any) -> None:
        """Run a check of shared images; with `allow_shared_images`, log its error as a warning."""
        if not self.allow_shared_images:
            check(images)
            return
        try:
            check(images)
        except ValueError as error:
            logger.warning("%s", error)


def save_inferred(configuration: dict[str, Any], path: Path) -> None:
    """Save an inferred configuration and log a summary. Raise a `ValueError` if the file was edited."""
    text = yaml.safe_dump(
        configuration,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=120,
    )
    if path.is_file() and path.read_text() != text:
        raise ValueError(f"{path} differs from what the data folder gives. Use it with --config, or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    data = configuration["data"]
    class_names = []
    for class_settings in data["classes"]:
        has_settings = isinstance(class_settings, Mapping)
        class_names.append(class_settings["name"] if has_settings else class_settings)
    first_names = ", ".join(class_names[:10])
    if len(class_names) > 10:
        first_names += ", …"
    description = [f"splits {', '.join(data['splits'])}", f"{len(class_names)} classes: {first_names}"]
    if "format" in data:
        description.insert(0, data["format"])
    logger.info("Found in %s: %s.", data["root"], "; ".join(description))
    scored_splits = []
    for key in ("eval_split", "test_split"):
        if key in configuration:
            scored_splits.append(f"{key} {configuration[key]}")
    logger.info("Scored: %s.", ", ".join(scored_splits) or "no split")
    for name, settings in data["splits"].items():
        if "part" in settings:
            start, end = settings["part"]
            share = end - start
            logger.info("Split %s has %.0f%% of the images, by a hash of their names.", name, 100 * share)
    logger.info("The configuration of the data is saved as %s. To change it, pass an edited copy as --config.", path)
