"""Tables with the classes of image files: CSV, TSV and Parquet."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..images.reading import read_errors
from .files import CASES, FileSample

Label = str | int  # Name or index of a class.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
FIRST_ROWS = 20  # rows by which a table is recognized


class Unknown(str):
    """Name of a class that an image may or may not have."""


def divided(value: object, separator: str | None = None) -> list[Label]:
    """Return the list of classes in a value of a label column. An empty value gives an empty list."""
    if isinstance(value, str):
        names = [value] if separator is None else value.split(separator)
        return [name.strip() for name in names if name.strip()]
    if hasattr(value, "__len__"):
        return list(value)
    if value is None or value != value:  # NaN marks an empty field.
        return []
    if int(value) != value:
        raise ValueError(f"Expected an integer or a name as class, got {value}.")
    return [int(value)]


def cell_key(value: object) -> float | str:
    """Return a cell of a label column as a number or a text. A missing value gives an empty text."""
    if hasattr(value, "__len__") and not isinstance(value, str):  # a list, which Parquet files may have
        return str(value)
    is_missing = value is None or value != value
    if is_missing:
        return ""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def labels_of_columns(
    columns: pd.DataFrame, label_values: Mapping | None, where: Callable[[Any], str]
) -> list[list[Label]]:
    """Return the classes of images from a table with one column per class.

    Args:
        columns: the columns of the classes, named after them.
        label_values: what cells other than 1 and 0 mean, see
            [`~modeling_vitp.tasks.classification.data.ClassificationData`].
        where: function from the index of a row to its name in errors.

    Raises:
        ValueError: if the meaning of a cell is not known.
    """
    meanings = {1.0: 1, 0.0: 0}
    for cell, meaning in (label_values or {}).items():
        meanings[cell_key(cell)] = meaning
    states = np.empty(columns.shape, dtype=object)
    for number, column in enumerate(columns):
        codes, cells = pd.factorize(columns[column], use_na_sentinel=False)
        for code, cell in enumerate(cells):
            key = cell_key(cell)
            has_code = codes == code
            if key not in meanings:
                raise ValueError(
                    f"{where(columns.index[has_code.argmax()])}: expected 1 or 0 in the column {column!r}, got {cell}. "
                    "Fill it in, remove the row and its images, or give its meaning in `label_values`."
                )
            states[has_code, number] = meanings[key]
    labels = []
    for states_of_image in states:
        labels_of_image = []
        for name, state in zip(columns, states_of_image):
            if state is None:
                labels_of_image.append(Unknown(name))
            elif state != 0:
                labels_of_image.append(name)
        labels.append(labels_of_image)
    return labels


def table_files(where: Path) -> list[Path]:
    """Return the tables directly in a folder, by suffix and without hidden files; or the file itself."""
    paths = [where] if where.is_file() else sorted(where.iterdir())
    tables = []
    for path in paths:
        has_suffix = path.suffix.lower() in (*SEPARATORS, PARQUET)
        if has_suffix and path.is_file() and not path.name.startswith("."):
            tables.append(path)
    return tables


def read_first_rows(path: Path) -> pd.DataFrame:
    """Return the first rows of a table. Columns with encoded images are left out.

    Raises:
        ValueError: if the file cannot be read.
    """
    with read_errors(path, "a table"):
        if path.suffix.lower() == PARQUET:
            columns = []
            for field in pq.read_schema(path):
                if not pa.types.is_struct(field.type):
                    columns.append(field.name)
            batches = pq.ParquetFile(path).iter_batches(batch_size=FIRST_ROWS, columns=columns)
            for first_batch in batches:
                return first_batch.to_pandas()
            return pd.DataFrame(columns=columns)
        return pd.read_csv(
            path,
            sep=SEPARATORS[path.suffix.lower()],
            nrows=FIRST_ROWS,
            dtype=str,
            keep_default_na=False,
        )


def case_fields(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Return the patient and the case of each row, as far as the table has them."""
    fields_of_rows = [{} for _ in range(len(rows))]
    for field in CASES:
        if field not in rows.columns:
            continue
        for fields, case in zip(fields_of_rows, rows[field]):
            if not pd.isna(case):
                fields[field] = str(case)
    return fields_of_rows


@dataclass(frozen=True)
class LabelTable:
    """Table of labels for image files: the `table` setting in `data`.

    Args:
        file: path of the table, relative to the root of the data set. `ClassificationData` replaces `{split}` in it
            by the name of the split.
        name: column that identifies the image of a row: the path relative to the root, the file name with or without
            extension, or the value of a field of the pattern, which several files may share.
        label: column of the class or classes of an image, as a list or as text split at `separator`; or a list with one
            column per class, 1 for the classes of an image and 0 for the others.
        separator: separator between the classes in a text.
        no_class: text for an image without any class. If set, empty labels are an error.
    """

    file: str
    name: str = "file_name"
    label: str | Sequence[str] = "label"
    separator: str | None = None
    no_class: str | None = None

    def read(self, root: Path) -> pd.DataFrame:
        """Return all rows of the table.

        Raises:
            ValueError: if the file cannot be read, or a column is missing.
        """
        path = root / self.file
        suffix = path.suffix.lower()
        if suffix not in (*SEPARATORS, PARQUET):
            raise ValueError(f"table: expected a file with suffix {', '.join(SEPARATORS)} or .parquet, got {path}.")
        with read_errors(path, "a table"):
            if suffix == PARQUET:
                rows = pd.read_parquet(path)
            else:
                # Names may have leading zeros, and a class may be called "None", so pandas must not convert them. Of
                # classes with a separator, it would convert those of rows with a single number.
                text_columns = [self.name, *CASES]
                if self.separator is not None and isinstance(self.label, str):
                    text_columns.append(self.label)
                rows = pd.read_csv(
                    path,
                    sep=SEPARATORS[suffix],
                    dtype=dict.fromkeys(text_columns, str),
                    keep_default_na=False,
                    na_values=[""],
                )
        label_columns = [self.label] if isinstance(self.label, str) else self.label
        for column in (self.name, *label_columns):
            if column not in rows.columns:
                known_columns = ", ".join(str(known_column) for known_column in rows.columns)
                hint = ""
                if len(rows.columns) == 1 and ";" in known_columns:
                    hint = " Save the file with commas as separators."
                raise ValueError(f"table: no column {column!r} in {path}. Found: {known_columns}.{hint}")
        return rows

    def labels_of(
        self,
        samples: Sequence[FileSample],
        root: Path,
        where: Mapping | None,
        split: str,
        taken: dict[int, tuple[str | None, Path]],
        label_values: Mapping | None = None,
        is_partial: bool = False,
    ) -> tuple[list[FileSample], list[list[Label]]]:
        """Return the samples that have a row in the table, and the classes of each.

        A column `patient` or `case` of the table is a field of the samples, unless the pattern has this field.

        Args:
            samples: image files of the split.
            root: root of the data set.
            where: column values that select the rows of the split. If given, samples without a selected row are not
                part of the split.
            split: name of the split in errors.
            taken: first file of each row and the field that identifies it, if any, over all splits so far. Extended in
                place with the files of `samples`.
            label_values: see [`~modeling_vitp.tasks.classification.data.ClassificationData`].
            is_partial: whether `samples` are a part of the split, so that selected rows may have no file.

        Raises:
            ValueError: if a file has no row, a row has no file, or a row matches several files.
        """
        rows = self._select_rows(self.read(root), where or {}, root, split)
        row_of_name = self._rows_by_name(rows, root)
        labels_of_name = dict(zip(row_of_name, self._labels(rows, root, label_values)))
        fields_of_name = dict(zip(row_of_name, case_fields(rows)))
        labeled_samples = []
        labels = []
        used_names = set()
        for sample in samples:
            path = sample.images[0]
            field, name = self._find_name(sample, root, row_of_name)
            if name is None:
                if where is None:
                    raise ValueError(f"{path} has no row in {root / self.file}. Add a row, or remove the file.")
                continue
            used_names.add(name)
            row = row_of_name[name]
            labels.append(labels_of_name[name])
            fields = {**fields_of_name[name], **sample.fields}
            labeled_samples.append(replace(sample, fields=fields))
            first_field, first_path = taken.setdefault(row, (field, path))
            if first_path != path and (field is None or field != first_field):
                raise ValueError(
                    f"table: {root / self.file}, row {row}: {name!r} matches both {first_path} and {path}. Use paths "
                    "in the table, or name the field that the files of one row share `patient` or `case`."
                )
        if where is not None and not is_partial:
            for name, row in row_of_name.items():
                if name not in used_names:
                    raise ValueError(
                        f"table: {root / self.file}, row {row}: no file of split {split!r} matches {name!r}."
                    )
        return labeled_samples, labels

    def _rows_by_name(self, rows: pd.DataFrame, root: Path) -> dict[str, Any]:
        """Return the index of the row of each name. Raise a `ValueError` if a name has several rows."""
        row_of_name = {}
        for row, name in rows[self.name].astype(str).items():
            if name in row_of_name:
                raise ValueError(f"table: {root / self.file} has several rows for {name!r}. Keep one.")
            row_of_name[name] = row
        return row_of_name

    def _select_rows(
        self,
        rows: pd.DataFrame,
        where: Mapping,
        root: Path,
        split: str,
    ) -> pd.DataFrame:
        """Return the rows of a split, which have the column values `where`."""
        for column, value in where.items():
            cells = pd.Series(index=rows.index, dtype=str)
            if column in rows.columns:
                cells = rows[column].astype(str)
                if pd.api.types.is_float_dtype(rows[column]):  # pandas reads integers as floats if values are missing.
                    cells = cells.str.removesuffix(".0")
            has_value = cells == str(value)
            if not has_value.any():
                known_values = cells.dropna().drop_duplicates().tolist()[:10]
                raise ValueError(
                    f"Split {split!r}: where: no row of {root / self.file} has {value!r} in column {column!r}. "
                    f"Found: {known_values or 'no such column'}."
                )
            rows = rows[has_value]
        return rows

    def _find_name(
        self, sample: FileSample, root: Path, names: Container[str]
    ) -> tuple[str | None, str] | tuple[None, None]:
        """Return the name in the table that a sample matches, and the field that has it as value, if any."""
        path = sample.images[0]
        candidates: list[tuple[str | None, str]] = []
        for field in CASES:
            if field in sample.fields:
                candidates.append((field, sample.fields[field]))
        for name in (path.relative_to(root).as_posix(), path.name, path.stem, sample.id):
            candidates.append((None, name))
        candidates += sample.fields.items()
        for field, name in candidates:
            if name in names:
                return field, name
        return None, None

    def _labels(self, rows: pd.DataFrame, root: Path, label_values: Mapping | None) -> list[list[Label]]:
        """Return the classes of each row."""

        def name_of_row(row: Any) -> str:
            return f"table: {root / self.file}, row {row}"

        if not isinstance(self.label, str):
            return labels_of_columns(rows[list(self.label)], label_values, name_of_row)
        labels = []
        for row, value in zip(rows.index, rows[self.label].tolist()):
            try:
                labels_of_row = divided(value, self.separator)
            except ValueError as error:
                raise ValueError(f"{name_of_row(row)}: {error}") from error
            if self.no_class is not None and not labels_of_row:
                raise ValueError(
                    f"{name_of_row(row)}: {self.label!r} is empty. Enter {self.no_class!r} if the image has no class, "
                    "or remove the row."
                )
            labels.append([label for label in labels_of_row if label != self.no_class])
        return labels
