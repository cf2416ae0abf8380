"""Images with a table of their classes."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...images.reading import check_file, image_files, stored_size
from ..annotations import AnnotatedImage
from ..files import ANY_FOLDERS, CASES, FileSample
from ..folders import UNSPLIT, split_in, split_of_path
from ..tables import Label, LabelTable, read_first_rows, table_files
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
LABEL_COLUMNS = ("class_name", "classname", "label", "class", "category")
SPLIT_COLUMNS = ("split",)
# A table with one of these columns has a row for each object, not for each image.
OBJECT_COLUMNS = ("xmin", "x_min", "x1", "left", "bbox", "box", "geometry", "encodedpixels")


@dataclass(frozen=True)
class TableFile:
    """Table of classes, and the columns that are found in it.

    Args:
        path: path of the table.
        name, label: columns of the image and of its class.
        split: column of the split, if the table has it.
    """

    path: Path
    name: str
    label: str
    split: str | None

    @classmethod
    def recognize(cls, path: Path) -> "TableFile | None":
        """Return a table, or `None` if it is not a table of classes. Only its first rows are read."""
        try:
            columns = read_first_rows(path).columns
        except ValueError:
            return None
        name = find_column(columns, NAME_COLUMNS)
        label = find_column(columns, LABEL_COLUMNS)
        if name is None or label is None or find_column(columns, OBJECT_COLUMNS) is not None:
            return None
        return cls(path, name, label, find_column(columns, SPLIT_COLUMNS))

    def settings(self, root: Path) -> dict[str, str]:
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
    """Image file with its class, and its patient or case if the table has such a column."""

    path: Path
    label: str
    case: str | None


@register_layout("table")
class ClassTable(ClassLayout):
    """Images, also in subfolders, and a table of their classes: a CSV, TSV or Parquet file at the root.

    A column such as `file_name` has the path of an image below the root, or its file name with or without suffix. A
    column such as `label` has its class. The split is the column `split`, or else that in the name of the table
    (`train.csv`, `test.csv`), or else that in the folders of the image (`train/`, `test/`).
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
                    labels[file.path.parent].add(file.label)
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
                f"({', '.join(NAME_COLUMNS)}) and a column of its class ({', '.join(LABEL_COLUMNS)})."
            )
        return tables

    @cached_property
    def _files(self) -> dict[str, list[LabeledFile]]:
        """Images of each split with their classes.

        Raises:
            ValueError: If a row has no image or no single class, or an image has no row; the message names it.
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
        return LabelTable(str(table.path.absolute()), table.name, table.label)

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
        known_labels = set()
        for labels_of_image in labels:
            known_labels.update(labels_of_image)
        files = []
        for sample, labels_of_image in zip(labeled_samples, labels):
            (path,) = sample.images
            label = only_label(labels_of_image, known_labels, f"table: {table.path}: {path}")
            case = None
            for field in CASES:
                if field in sample.fields:
                    case = f"{field} {sample.fields[field]}"
                    break
            files.append(LabeledFile(path, label, case))
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
        label = self.phrase(self._file_of[path].label)
        return [AnnotatedImage(image_id, paths, size, label=label)]

    def case(self, path):
        return self._file_of[path].case or super().case(path)

    def data_settings(self):
        first_table = self._tables[0].settings(self.root)
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
        return {"table": first_table, "splits": splits}

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


def only_label(labels: Sequence[Label], known_labels: set[Label], where: str) -> str:
    """Return the class of an image. Raise a `ValueError` if it has none or several.

    Args:
        labels: classes in the row of the image.
        known_labels: classes in all rows. A text with commas is several classes if one of them is a class of another
            row.
        where: table and image in the error.
    """
    if len(labels) == 1 and not is_list_of_labels(labels[0], known_labels):
        return str(labels[0])
    names = ", ".join(str(label) for label in labels)
    number = f"several classes, {names!r}" if labels else "no class"
    raise ValueError(
        f"{where} has {number}. Expected one. Several are read by vitp finetune_classification with `multi_label` and "
        "a `table` with a `separator` in its configuration."
    )


def is_list_of_labels(label: Label, known_labels: set[Label]) -> bool:
    """Return whether a class is a text with several classes, see [`only_label`]."""
    if not isinstance(label, str):
        return False
    if "|" in label or ";" in label:
        return True
    other_labels = known_labels - {label}
    return any(name.strip() in other_labels for name in label.split(","))
