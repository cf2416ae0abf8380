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
NAME_COLUMNS = ("file_name", "filename", "file", "file_path", "filepath", "image_path", "image_name", "image_file")
NAME_COLUMNS += ("image", "path", "image_id", "name")
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
        names = set()
        for path in image_files(root):
            relative = path.relative_to(root)
            names |= {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem}
        return any(str(name) in names for name in read_first_rows(self.path)[self.name])


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
        where = self.annotations or self.root
        tables = recognize_tables(where)
        if not tables:
            raise ValueError(
                f"No table of classes found in {where}. Expected a CSV, TSV or Parquet file with a column of the image "
                f"({', '.join(NAME_COLUMNS)}) and a column of its class ({', '.join(LABEL_COLUMNS)})."
            )
        owners: dict[str | None, Path] = {}
        for table in tables:
            split = split_in(table.path.stem)
            if len(tables) > 1 and (split is None or split in owners):
                other = owners[split] if split in owners else next(one.path for one in tables if one is not table)
                raise ValueError(
                    f"Expected one table of classes, or one for each split such as train.csv and test.csv, found "
                    f"{other} and {table.path}. Remove or rename one of them."
                )
            owners[split] = table.path
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
            for split, rows in self._rows_of_splits(table).items():
                for file in self._read_rows(table, rows, split, samples):
                    file_split = split_of_path(file.path.relative_to(self.root)) if split is None else split
                    files[file_split].append(file)
                    other_split = split_of_file.setdefault(file.path, file_split)
                    if other_split != file_split:
                        raise ValueError(
                            f"table: {table.path}: {file.path} has rows in both splits {other_split!r} and "
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
        selected = {}
        rows = self._label_table(table).read(self.root)
        for index, value in rows[table.split].drop_duplicates().items():
            split = split_in(value) if isinstance(value, str) else None
            if split is None:
                raise ValueError(
                    f"table: {table.path}, row {index}: expected a split such as train, val or test in the column "
                    f"{table.split!r}, got {value!r}."
                )
            if split in selected:
                other = selected[split][table.split]
                raise ValueError(
                    f"table: {table.path}, row {index}: {value!r} and {other!r} in the column {table.split!r} are the "
                    "same split. Use one of them."
                )
            selected[split] = {table.split: value}
        return selected

    def _label_table(self, table: TableFile) -> LabelTable:
        return LabelTable(str(table.path.absolute()), table.name, table.label)

    def _read_rows(
        self, table: TableFile, rows: dict[str, Any], split: str | None, samples: Sequence[FileSample]
    ) -> list[LabeledFile]:
        """Return the images of the selected rows of a table."""
        if split is not None and not rows:
            samples = in_split_folders(samples, split, self.root)
        label_table = self._label_table(table)
        matched, labels = label_table.labels_of(samples, self.root, rows, split or UNSPLIT, {})
        known = {label for labels_of_image in labels for label in labels_of_image}
        files = []
        for sample, labels_of_image in zip(matched, labels):
            (path,) = sample.images
            label = only_label(labels_of_image, known, f"table: {table.path}: {path}")
            case = next((f"{field} {sample.fields[field]}" for field in CASES if field in sample.fields), None)
            files.append(LabeledFile(path, label, case))
        return files

    @cached_property
    def _file_of(self) -> dict[Path, LabeledFile]:
        return {file.path: file for files in self._files.values() for file in files}

    def splits(self):
        splits = {}
        for split, files in self._files.items():
            splits[split] = {file.path.relative_to(self.root).as_posix(): (file.path,) for file in files}
        return splits

    def annotate(self, image_id, paths):
        (path,) = paths
        size = stored_size(path)  # of any orientation, which the class does not depend on
        check_file(path)
        return [AnnotatedImage(image_id, paths, size, label=self.phrase(self._file_of[path].label))]

    def case(self, path):
        return self._file_of[path].case or super().case(path)

    def data_settings(self):
        first_table = self._tables[0].settings(self.root)
        rows_of_splits = {}
        for table in self._tables:
            for split, rows in self._rows_of_splits(table).items():
                settings = {} if split is None else {"where": rows}
                changes = table.settings(self.root).items() - first_table.items()
                if changes:
                    settings["table"] = dict(sorted(changes))
                rows_of_splits[split] = settings
        splits = {}
        for split, files in self._files.items():
            by_folder = None in rows_of_splits
            pattern = self._pattern([file.path for file in files], split if by_folder else None)
            splits[split] = {"image": pattern, **rows_of_splits[None if by_folder else split]}
        return {"table": first_table, "splits": splits}

    def _pattern(self, paths: Sequence[Path], split: str | None) -> str:
        """Return the pattern of the images of a split. If `split` is given, the pattern must match no other images."""
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        others = set(self._file_of) - set(paths)
        if split is not None:
            for path in sorted(others):
                if path.is_relative_to(folder):
                    raise ValueError(
                        f"The images of split {split!r} in {folder} are not in a folder of their own, which has "
                        f"{path} too. Add a column `split` to the table."
                    )
        prefix = "" if folder == self.root else f"{folder.relative_to(self.root).as_posix()}/"
        suffixes = sorted({path.suffix for path in paths})
        if len(suffixes) == 1:
            return f"{prefix}{{path:{ANY_FOLDERS}.+}}{suffixes[0]}"
        ends = "|".join(suffix.removeprefix(".") for suffix in suffixes)
        return rf"{prefix}{{path:{ANY_FOLDERS}.+\.(?:{ends})}}"


def recognize_tables(where: Path) -> list[TableFile]:
    """Return the tables of classes directly in a folder, or a table."""
    tables = []
    for path in table_files(where):
        table = TableFile.recognize(path)
        if table is not None:
            tables.append(table)
    return tables


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column with the first of several names, or `None`."""
    known = {}
    for column in columns:
        known.setdefault(str(column).strip().lower().replace(" ", "_").replace("-", "_"), column)
    return next((known[name] for name in names if name in known), None)


def in_split_folders(samples: Sequence[FileSample], split: str, root: Path) -> Sequence[FileSample]:
    """Return the images in folders of a split or of no split, or all images if the split has no folder."""
    splits = [split_of_path(sample.images[0].relative_to(root)) for sample in samples]
    if split not in splits:
        return samples
    return [sample for sample, path_split in zip(samples, splits) if path_split in (split, UNSPLIT)]


def only_label(labels: Sequence[Label], known: set[Label], where: str) -> str:
    """Return the class of an image. Raise a `ValueError` if it has none or several.

    Args:
        labels: classes in the row of the image.
        known: classes in all rows. A text with commas is several classes if one of them is a class of another row.
        where: table and image in the error.
    """
    if not labels:
        raise ValueError(f"{where} has no class. Enter it, or remove the row and the file.")
    several = [str(label) for label in labels]
    if len(labels) == 1 and isinstance(labels[0], str):
        parts = [part.strip() for part in labels[0].split(",")]
        is_list = "|" in labels[0] or ";" in labels[0] or any(part in known - {labels[0]} for part in parts)
        if not is_list:
            return labels[0]
    elif len(labels) == 1:
        return str(labels[0])
    raise ValueError(
        f"{where} has several classes, {', '.join(several)!r}. Expected one. Several are read by vitp "
        "finetune_classification with `multi_label` and a `table` with a `separator` in its configuration."
    )
