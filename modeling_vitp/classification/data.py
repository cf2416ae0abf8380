"""A data set as a configuration describes it: splits, classes, and how files or rows are read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from ..hub.failures import tried
from ..images.reading import image_files
from ..instructions.sources import folder_cache
from ..training.data_settings import DataSettings, check_cases
from ..training.files import CASES, FIELD, FileSample, check_disjoint, check_patients, find_samples
from ..training.shared_images import check_no_shared_images, images_of_files, images_of_rows
from ..training.values import check_type
from .classes import names_of
from .samples import ClassifiedImages, FileImages, RowImages
from .table import LabelTable

logger = logging.getLogger(__name__)
CLASS = "class"  # the field of a pattern that is the class
MOST_SHOWN = 3


@dataclass
class ClassificationData(DataSettings):
    """The `data` of a configuration.

    Args:
        root: the folder of files.
        dataset_name: instead of it, a data set of the Hub, or a folder, that `datasets.load_dataset` opens.
        dataset_config: its configuration.
        splits: by name. Of files, what [`~modeling_vitp.training.files.find_samples`] takes, with the class as the
            field `{class}`, or `where` with values of columns of the `table`; a split that is not here is
            `NAME/{class}/{name}.*`, where a name may have dots. Of `dataset_name`, what `datasets` calls the split, by
            default the same.
        classes: their names, in the order of the model. If not given, what the data set knows, or else what the images
            to train on have, in the order of their names.
        multi_label: whether an image may have any number of classes.
        columns: see [`~modeling_vitp.classification.samples.RowImages`].
        table: the classes of files, see [`~modeling_vitp.classification.table.LabelTable`].
        input_spec: how images that are not 8-bit RGB are read, see [`~modeling_vitp.InputSpec`].
        bad_images: `"raise"`, a file that is no image, or of JPEG or PNG is cut off, is an error; `"skip"`, it is left
            out, and how many are is said. Rows are looked at only to skip them.
        allow_shared_images: whether splits may hold the same image under different names, with a warning.
    """

    root: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    splits: Mapping[str, Mapping | str] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    multi_label: bool = False
    columns: Mapping[str, str | Sequence[str]] | None = None
    table: Mapping | None = None
    input_spec: dict | None = None
    bad_images: str = "raise"
    allow_shared_images: bool = False

    def __post_init__(self):
        if (self.root is None) == (self.dataset_name is None):
            raise ValueError("data: give either `root`, a folder of files, or `dataset_name`.")
        if self.bad_images not in ("raise", "skip"):
            raise ValueError(f"data: bad_images={self.bad_images!r} is neither 'raise' nor 'skip'.")
        if self.classes is not None and len(set(self.classes)) < max(len(self.classes), 2):
            raise ValueError(f"data: classes={list(self.classes)}: give two or more, each once.")
        self.is_listed = self.classes is not None
        self._opened: dict[str, ClassifiedImages] = {}
        self._taken: dict[int, tuple[str | None, Path]] = {}  # rows of the table

    def find_classes(self, train_splits: Sequence[str], of_model: Sequence[str] | None = None) -> list[str]:
        """The names of the classes, which are then those of this data set.

        Args:
            train_splits: what is trained on, if anything is.
            of_model: the classes of a fine-tuned model, which apply where nothing is listed and trained on.

        Raises:
            ValueError: if there are fewer than two, or none are known.
        """
        if self.classes is None and not train_splits:
            if of_model is None:
                raise ValueError("do_train is false, and neither the model nor `classes` in `data` names classes.")
            self.classes = list(of_model)
        if self.classes is None:
            parts = [self._stored(name) for name in train_splits]
            known = next((part.known for part in parts if part.known is not None), None)
            names = known or names_of([labels for part in parts for labels in part.stored])
            if len(names) < (1 if self.multi_label else 2):
                raise ValueError(f"Split {train_splits[0]!r} has images of too few classes, {names}: two are needed.")
            self.classes = names
        return list(self.classes)

    def open(self, names: Sequence[str]) -> Dataset:
        """The samples of one or several splits, see [`~modeling_vitp.classification.samples.ClassifiedImages`]; all
        labels are read, and so checked. Needs the classes, see [`find_classes`].

        Raises:
            ValueError: if none is named, there is no such split, or something in it is not as it should be.
        """
        if not names:
            raise ValueError(f"No split is named, of {sorted(self.splits)}.")
        parts = [self._stored(name).set_classes(self.classes, self.multi_label) for name in names]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)

    def _stored(self, name: str) -> ClassifiedImages:
        if name not in self._opened:
            try:
                samples = self._read_files(name) if self.root is not None else self._read_rows(name)
            except OSError as error:
                raise ValueError(f"Split {name!r} cannot be opened: {error}.") from error
            self._opened[name] = self._without_bad(samples, name)
        return self._opened[name]

    def _read_rows(self, name: str) -> RowImages:
        folder = Path(self.dataset_name)
        cache = folder_cache(folder) if folder.is_dir() else None
        split = self.splits.get(name, name)
        open_rows = partial(datasets.load_dataset, self.dataset_name, self.dataset_config, cache_dir=cache, split=split)
        return RowImages(tried(open_rows), self.input_spec, self.columns, name)

    def _read_files(self, name: str) -> FileImages:
        root = Path(self.root)
        settings = self.splits.get(name, {"image": f"{name}/{{{CLASS}}}/{{name:[^/]+}}.*"})
        settings = dict(settings) if isinstance(settings, Mapping) else settings
        where = settings.pop("where", None) if isinstance(settings, dict) else None
        samples = find_samples(root, settings, name)
        if self.table is not None:
            check_type("data: table", self.table, Mapping[str, str | Sequence[str]])
            unknown = sorted(set(self.table) - set(LabelTable.__dataclass_fields__))
            if unknown or "file" not in self.table:
                raise ValueError(f"data: table: unknown {unknown}; it has {sorted(LabelTable.__dataclass_fields__)}.")
            samples, stored = LabelTable(**self.table).labels_of(samples, root, where, name, self._taken)
            return FileImages(samples, stored, self.input_spec)
        if CLASS not in samples[0].fields:
            raise ValueError(f"Split {name!r}: nothing says the class: give the field {{{CLASS}}}, or a `table`.")
        check_folders(root, settings["image"], samples)
        return FileImages(samples, [[sample.fields[CLASS]] for sample in samples], self.input_spec)

    def _without_bad(self, samples: ClassifiedImages, name: str) -> ClassifiedImages:
        if self.root is None and self.bad_images == "raise":
            return samples
        wrong = {}
        for index in tqdm(range(len(samples)), desc=f"files of {name}", disable=None):
            try:
                samples.check_whole(index)
            except Exception as error:  # Pillow raises many kinds
                wrong[index] = f"{samples.where(index)} is no image that can be read: {error}."
                if self.bad_images == "raise":
                    raise ValueError(
                        f"{wrong[index]} Mend it or take it out, or leave such files out: `bad_images: skip` in `data`."
                    ) from error
        if not wrong:
            return samples
        logger.warning("%s: %d file(s) are left out: %s", name, len(wrong), " ".join([*wrong.values()][:MOST_SHOWN]))
        return samples.subset([index for index in range(len(samples)) if index not in wrong])

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raises a `ValueError` if two of the splits share an image, under whatever name, a patient or a case."""
        if len(names) < 2:
            return
        parts = {name: self._stored(name) for name in names}
        if self.root is not None:
            samples = {name: part.samples for name, part in parts.items()}
            check_disjoint(samples)
            self.check_shared(check_patients, samples)
            images = images_of_files(samples)
        else:
            if len({self.splits.get(name, name) for name in names}) < len(names):
                raise ValueError(f"Two of the splits {list(names)} are the same.")
            known = {name: [case for case in CASES if case in part.rows.column_names] for name, part in parts.items()}
            check_cases({name: parts[name].rows[columns[0]] for name, columns in known.items() if columns})
            images = images_of_rows({name: (part.rows, [part.column]) for name, part in parts.items()})
        self.check_shared(check_no_shared_images, images)


def check_folders(root: Path, pattern: str | Sequence[str], samples: Sequence[FileSample]) -> None:
    """Raises a `ValueError` that names a folder of a class without an image."""
    before, found, after = (pattern if isinstance(pattern, str) else pattern[0]).partition(f"{{{CLASS}}}")
    if not found or not after.startswith("/") or FIELD.search(before) or "*" in before:
        return
    classes = {sample.fields[CLASS] for sample in samples}
    for folder in sorted((root / before).iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in classes:
            if not image_files(folder):
                raise ValueError(f"The folder of the class {folder.name!r} has no image: {folder}. Fill or remove it.")
