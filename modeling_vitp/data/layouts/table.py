"""Images with a table of their classes."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ...images.reading import check_file, image_files, stored_size
from ..annotations import AnnotatedImage
from ..files import ANY_FOLDERS, CASES, FileSample
from ..folders import UNSPLIT, split_in, split_of_path
from ..tables import LabelTable, cell_key, read_first_rows, table_files
from .base import ClassLayout, register_layout
from .class_folders import ClassFolders
from .masks import Masks

# Usual names of the columns, in the order in which they are searched. Case, spaces and hyphens are ignored.
NAME_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "file_path",
    "filepath",
    "image_path",
    "image_name",
    "image_file",
    "image",
    "path",
    "image_id",
    "name",
)
LABEL_COLUMNS = (
    "class_name",
    "classname",
    "label",
    "class",
    "category",
    "labels",
    "classes",
    "categories",
    "tags",
)
SPLIT_COLUMNS = ("split",)
SEPARATORS = ("|", ";")  # between the classes of an image
# A table with one of these columns has a row for each object, not for each image.
OBJECT_COLUMNS = ("xmin", "x_min", "x1", "left", "bbox", "box", "geometry", "encodedpixels")


@dataclass(frozen=True)
class TableFile:
    """Table of classes, and the columns that are found in it.

    Args:
        path: path of the table.
        name: column of the image.
        label: column of the class or the classes, or a list with one column per class, 1 or 0.
        split: column of the split, if the table has it.
    """

    path: Path
    name: str
    label: str | list[str]
    split: str | None

    @classmethod
    def recognize(cls, path: Path) -> "TableFile | None":
        """Return a table, or `None` if it is not a table of classes. Only its first rows are read."""
        try:
            rows = read_first_rows(path)
        except ValueError:
            return None
        columns = rows.columns
        name = find_column(columns, NAME_COLUMNS)
        split = find_column(columns, SPLIT_COLUMNS)
        label = find_column(columns, LABEL_COLUMNS)
        if label is None:
            label = find_class_columns(rows.drop(columns=[name, split, *CASES], errors="ignore"))
        if name is None or not label or find_column(columns, OBJECT_COLUMNS) is not None:
            return None
        return cls(path, name, label, split)

    def settings(self, root: Path) -> dict[str, Any]:
        """Return the setting `table` of the classification."""
        return {"file": self.path.relative_to(root).as_posix(), "name": self.name, "label": self.label}

    def names_images(self, root: Path) -> bool:
        """Return whether one of the first rows names an image."""
        image_names = set()
        for path in image_files(root):
            relative_path = path.relative_to(root)
            image_names.add(relative_path.as_posix())
            image_names.add(relative_path.with_suffix("").as_posix())
            image_names.add(path.name)
            image_names.add(path.stem)
        first_names = read_first_rows(self.path)[self.name]
        return any(str(name) in image_names for name in first_names)


@dataclass(frozen=True)
class LabeledFile:
    """Image file with its classes, and its patient or case if the table has such a column."""

    path: Path
    labels: tuple[str, ...]
    case: str | None


@register_layout("table")
class ClassTable(ClassLayout):
    """Images, also in subfolders, and a table of their classes: a CSV, TSV or Parquet file at the root.

    A column such as `file_name` has the path of an image below the root, or its file name with or without suffix. A
    column such as `label` has its class, or its classes as a list or with a separator; or each class has a column of 1
    and 0. The split is the column `split`, or else that in the name of the table (`train.csv`, `test.csv`), or else
    that in the folders of the image (`train/`, `test/`).
    """

    case_source = "column of the table, or tags of DICOM"

    @classmethod
    def matches(cls, root):
        tables = recognize_tables(root)
        if not any(table.names_images(root) for table in tables) or Masks.matches(root):
            return False
        # If each folder has images of one class, the table is an index of folders of classes.
        return not ClassFolders.matches(root) or cls(root).has_folders_of_several_classes()

    def has_folders_of_several_classes(self) -> bool:
        """Return whether the table is valid, and a folder has images of several classes."""
        labels = defaultdict(set)
        try:
            for files in self._files.values():
                for file in files:
                    labels[file.path.parent].add(file.labels)
        except ValueError:
            return False
        return any(len(labels_of_folder) > 1 for labels_of_folder in labels.values())

    @cached_property
    def _tables(self) -> list[TableFile]:
        location = self.annotations or self.root
        tables = recognize_tables(location)
        splits = {split_in(table.path.stem) for table in tables}
        has_table_for_each_split = None not in splits and len(splits) == len(tables)
        if len(tables) != 1 and not (tables and has_table_for_each_split):
            paths = ", ".join(str(table.path) for table in tables) or "none"
            raise ValueError(
                f"Expected one table of classes in {location}, or one for each split such as train.csv and test.csv, "
                f"found {paths}. A table is a CSV, TSV or Parquet file with a column of the image "
                f"({', '.join(NAME_COLUMNS)}) and a column of its class ({', '.join(LABEL_COLUMNS)}), or a column of 1 "
                "and 0 for each class."
            )
        return tables

    @property
    def _has_class_columns(self) -> bool:
        return any(isinstance(table.label, list) for table in self._tables)

    @cached_property
    def _separator(self) -> str | None:
        """Separator of the classes of an image in a text, `None` if no image has several."""
        texts = set()
        for table in self._tables:
            if isinstance(table.label, str):
                rows = LabelTable(str(table.path.absolute()), table.name, table.label).read(self.root)
                texts.update(value for value in rows[table.label] if isinstance(value, str))
        return find_separator(texts)

    @cached_property
    def is_multi_label(self) -> bool:
        """Whether an image has several classes, or none."""
        for files in self._files.values():
            if any(len(file.labels) != 1 for file in files):
                return True
        return False

    @cached_property
    def _files(self) -> dict[str, list[LabeledFile]]:
        """Images of each split with their classes.

        Raises:
            ValueError: If a row has no image, an image has no row, or an image has no class although no other one has
                several; the message names it.
        """
        samples = []
        for path in image_files(self.root):
            image_id = path.relative_to(self.root).with_suffix("").as_posix()
            samples.append(FileSample(image_id, {}, (path,), None))
        files = defaultdict(list)
        split_of_file: dict[Path, str] = {}
        for table in self._tables:
            for split, selection in self._rows_of_splits(table).items():
                for file in self._read_rows(table, selection, split, samples):
                    file_split = split_of_path(file.path.relative_to(self.root)) if split is None else split
                    files[file_split].append(file)
                    first_split = split_of_file.setdefault(file.path, file_split)
                    if first_split != file_split:
                        raise ValueError(
                            f"table: {table.path}: {file.path} has rows in both splits {first_split!r} and "
                            f"{file_split!r}. Keep one."
                        )
        for sample in samples:
            (path,) = sample.images
            if path not in split_of_file:
                tables = ", ".join(str(table.path) for table in self._tables)
                raise ValueError(f"{path} has no row in {tables}. Add a row, or remove the file.")
        all_files = [file for split_files in files.values() for file in split_files]
        if not self._has_class_columns and all(len(file.labels) < 2 for file in all_files):
            for file in all_files:
                if not file.labels:
                    tables = ", ".join(str(table.path) for table in self._tables)
                    raise ValueError(f"table: {tables}: {file.path} has no class. Add its class, or remove the image.")
        return dict(files)

    def _rows_of_splits(self, table: TableFile) -> dict[str | None, dict[str, Any]]:
        """Return the column values that select the rows of each split, `{}` for all rows.

        The split is `None` if the folders of the images name it.
        """
        if len(self._tables) > 1 or table.split is None:
            return {split_in(table.path.stem): {}}
        value_of_split: dict[str, str] = {}
        rows = self._label_table(table).read(self.root)
        for index, value in rows[table.split].drop_duplicates().items():
            split = split_in(value) if isinstance(value, str) else None
            if split is None or split in value_of_split:
                raise ValueError(
                    f"table: {table.path}, row {index}: expected a split such as train, val or test, each with one "
                    f"name, in the column {table.split!r}, got {value!r} after {list(value_of_split.values())}."
                )
            value_of_split[split] = value
        return {split: {table.split: value} for split, value in value_of_split.items()}

    def _label_table(self, table: TableFile) -> LabelTable:
        return LabelTable(str(table.path.absolute()), table.name, table.label, self._separator)

    def _read_rows(
        self,
        table: TableFile,
        selection: dict[str, Any],
        split: str | None,
        samples: Sequence[FileSample],
    ) -> list[LabeledFile]:
        """Return the images of the selected rows of a table."""
        if split is not None and not selection:
            samples = in_split_folders(samples, split, self.root)
        labeled_samples, labels = self._label_table(table).labels_of(
            samples,
            self.root,
            selection,
            split or UNSPLIT,
            {},
        )
        files = []
        for sample, labels_of_image in zip(labeled_samples, labels):
            (path,) = sample.images
            case = None
            for field in CASES:
                if field in sample.fields:
                    case = f"{field} {sample.fields[field]}"
                    break
            files.append(LabeledFile(path, tuple(str(label) for label in labels_of_image), case))
        return files

    @cached_property
    def _file_of(self) -> dict[Path, LabeledFile]:
        file_of_path = {}
        for files in self._files.values():
            for file in files:
                file_of_path[file.path] = file
        return file_of_path

    def splits(self):
        splits = {}
        for split, files in self._files.items():
            splits[split] = {file.path.relative_to(self.root).as_posix(): (file.path,) for file in files}
        return splits

    def annotate(self, image_id, paths):
        (path,) = paths
        size = stored_size(path)  # Of any orientation, which the class does not depend on.
        check_file(path)
        return [AnnotatedImage(image_id, paths, size, labels=self.phrases(self._file_of[path].labels))]

    def case(self, path):
        return self._file_of[path].case or super().case(path)

    def data_settings(self):
        first_table = self._tables[0].settings(self.root)
        if self._separator is not None:
            first_table["separator"] = self._separator
        settings_of_splits = {}
        for table in self._tables:
            table_settings = table.settings(self.root)
            different_settings = {}
            for name in sorted(table_settings):
                if table_settings[name] != first_table[name]:
                    different_settings[name] = table_settings[name]
            for split, selection in self._rows_of_splits(table).items():
                split_settings = {} if split is None else {"where": selection}
                if different_settings:
                    split_settings["table"] = different_settings
                settings_of_splits[split] = split_settings
        is_split_by_folder = None in settings_of_splits
        splits = {}
        for split, files in self._files.items():
            pattern = self._pattern([file.path for file in files], split if is_split_by_folder else None)
            split_settings = settings_of_splits[None if is_split_by_folder else split]
            splits[split] = {"image": pattern, **split_settings}
        settings = {"table": first_table, "splits": splits}
        if self.is_multi_label:
            settings["multi_label"] = True
        return settings

    def _pattern(self, paths: Sequence[Path], split: str | None) -> str:
        """Return the pattern of the images of a split. If `split` is given, the pattern must match no other images."""
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        if split is not None:
            for path in sorted(set(self._file_of) - set(paths)):
                if path.is_relative_to(folder):
                    raise ValueError(
                        f"The images of split {split!r} in {folder} are not in a folder of their own, which has "
                        f"{path} too. Add a column `split` to the table."
                    )
        prefix = "" if folder == self.root else f"{folder.relative_to(self.root).as_posix()}/"
        suffixes = sorted({path.suffix for path in paths})
        if len(suffixes) == 1:
            return f"{prefix}{{path:{ANY_FOLDERS}.+}}{suffixes[0]}"
        alternatives = "|".join(suffix.removeprefix(".") for suffix in suffixes)
        return rf"{prefix}{{path:{ANY_FOLDERS}.+\.(?:{alternatives})}}"


def recognize_tables(location: Path) -> list[TableFile]:
    """Return the tables of classes directly in a folder, or a table."""
    tables = []
    for path in table_files(location):
        table = TableFile.recognize(path)
        if table is not None:
            tables.append(table)
    return tables


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column with the first of several names, or `None`."""
    columns_by_name = {}
    for column in columns:
        usual_form = str(column).strip().lower().replace(" ", "_").replace("-", "_")
        columns_by_name.setdefault(usual_form, column)
    for name in names:
        if name in columns_by_name:
            return columns_by_name[name]
    return None


def in_split_folders(samples: Sequence[FileSample], split: str, root: Path) -> Sequence[FileSample]:
    """Return the images in folders of a split or of no split, or all images if the split has no folder."""
    has_folder = False
    samples_of_split = []
    for sample in samples:
        folder_split = split_of_path(sample.images[0].relative_to(root))
        if folder_split == split:
            has_folder = True
        if folder_split in (split, UNSPLIT):
            samples_of_split.append(sample)
    return samples_of_split if has_folder else samples


def find_class_columns(rows: pd.DataFrame) -> list[str]:
    """Return the columns of which all cells are 1 or 0; none unless there are two."""
    class_columns = []
    for column in rows.columns:
        if len(rows) and all(cell_key(cell) in (0, 1) for cell in rows[column]):
            class_columns.append(column)
    return class_columns if len(class_columns) > 1 else []


def find_separator(labels: set[str]) -> str | None:
    """Return the separator of several classes in a text, `None` if no text has several.

    A text with commas has several classes only if one of them is the class of another row, since names may have commas.
    """
    for separator in SEPARATORS:
        if any(separator in label for label in labels):
            return separator
    for label in labels:
        names = {name.strip() for name in label.split(",")}
        if "," in label and not names.isdisjoint(labels):
            return ","
    return None
