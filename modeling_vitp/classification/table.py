"""The classes of image files in a table: CSV, TSV or Parquet, a row an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..training.files import CASES, FileSample
from .classes import Label

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class LabelTable:
    """The `table` of a configuration's data.

    Args:
        file: below the root of the data set.
        name: the column that says which image a row is of: the path of its file below the root, the file's name, with
            or without its ending, or the value of a field of the pattern, which several files may share.
        label: the column of its class, or of its classes, in a list or as text with `separator` between them; or the
            columns of all classes, with 1 for those that it has and 0 for the others.
        separator: between the classes of a text.
        no_class: what the text is where an image has none of the classes; nothing may be empty then.
    """

    file: str
    name: str = "file_name"
    label: str | Sequence[str] = "label"
    separator: str | None = None
    no_class: str | None = None

    def read(self, root: Path) -> pd.DataFrame:
        """All rows.

        Raises:
            ValueError: if the file cannot be read, or has no such column.
        """
        path = root / self.file
        suffix = path.suffix.lower()
        if suffix not in (*SEPARATORS, ".parquet"):
            raise ValueError(f"table: {path} is none of {', '.join(SEPARATORS)}, .parquet.")
        try:
            if suffix == ".parquet":
                rows = pd.read_parquet(path)
            else:  # names may be numbers with zeros before them, and a class be called None
                as_they_are = {"dtype": {self.name: str}, "keep_default_na": False, "na_values": [""]}
                rows = pd.read_csv(path, sep=SEPARATORS[suffix], **as_they_are)
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise ValueError(f"table: {path} cannot be read: {error}") from error
        for column in (self.name, *([self.label] if isinstance(self.label, str) else self.label)):
            if column not in rows.columns:
                only = ", ".join(map(str, rows.columns))
                hint = " Save it with commas between its columns." if len(rows.columns) == 1 and ";" in only else ""
                raise ValueError(f"table: {path} has no column {column!r}, only {only}.{hint}")
        return rows

    def labels_of(
        self,
        samples: Sequence[FileSample],
        root: Path,
        where: Mapping | None,
        split: str,
        taken: dict[int, tuple[str | None, Path]],
    ) -> tuple[list[FileSample], list[list[Label]]]:
        """Samples with a row, and the classes of each.

        Args:
            where: values of columns by name, if only rows that have them are of the split; samples without such a row
                are not of it then.
            taken: the first file of each row, and the field that names it, if any; those of `samples` come to those of
                other splits.

        Raises:
            ValueError: names what has no row, or no file, and a row of which it cannot be told what file it names.
        """
        rows = self.read(root)
        for column, value in (where or {}).items():
            if column not in rows.columns:
                raise ValueError(f"Split {split!r}: where: {root / self.file} has no column {column!r}.")
            values = rows[column].astype(str)
            if pd.api.types.is_float_dtype(rows[column]):  # whole numbers too, where some are missing
                values = values.str.removesuffix(".0")
            known, rows = values.drop_duplicates().tolist(), rows[values == str(value)]
            if rows.empty:
                raise ValueError(
                    f"Split {split!r}: where: no row of {root / self.file} has {value!r} in {column!r}, but "
                    f"{', '.join(map(repr, known[:10]))}."
                )
        names = rows[self.name].astype(str)
        if names.duplicated().any():
            raise ValueError(f"table: {root / self.file} has {names[names.duplicated()].iloc[0]!r} in several rows.")
        stored = dict(zip(names, zip(rows.index, self._labels(rows, root))))
        kept, labels, used = [], [], set()
        for sample in samples:
            path = sample.images[0]
            names = path.relative_to(root).as_posix(), path.name, path.stem, sample.id
            cases = [(field, sample.fields[field]) for field in CASES if field in sample.fields]
            keys = (*cases, *((None, name) for name in names), *sample.fields.items())
            field, key = next((item for item in keys if item[1] in stored), (None, None))
            if key is not None:
                row, classes = stored[key]
                kept.append(sample)
                labels.append(classes)
                used.add(key)
                first_field, first = taken.setdefault(row, (field, path))
                if first != path and (field is None or field != first_field):
                    raise ValueError(
                        f"table: {root / self.file}, row {row}: {key!r} could be {first} or {path}: give "
                        "paths of files, or call the field that files of one row share `patient` or `case`."
                    )
            elif where is None:
                raise ValueError(f"{path} has no row in {root / self.file}: add one, or take the file out.")
        if where is not None and len(used) < len(stored):
            name, (row, _) = next(item for item in stored.items() if item[0] not in used)
            raise ValueError(f"table: {root / self.file}, row {row}: no file of split {split!r} is called {name!r}.")
        return kept, labels

    def _labels(self, rows: pd.DataFrame, root: Path) -> list[list[Label]]:
        if isinstance(self.label, str):
            stored = []
            for row, value in zip(rows.index, rows[self.label].tolist()):
                try:
                    stored.append(divided(value, self.separator))
                except ValueError as error:
                    raise ValueError(f"table: {root / self.file}, row {row}: {error}") from error
                if self.no_class is not None and not stored[-1]:
                    raise ValueError(
                        f"table: {root / self.file}, row {row}: {self.label!r} is empty: give {self.no_class!r} if it "
                        "has none of the classes, or take the row out."
                    )
            return [[label for label in labels if label != self.no_class] for labels in stored]
        values = rows[list(self.label)]
        odd = ~values.isin([0, 1]).all(axis=1)
        if odd.any():
            raise ValueError(f"table: {root / self.file}, row {odd.idxmax()}: a class is told by 0 or 1.")
        return [[name for name, value in zip(self.label, row) if value] for row in values.to_numpy()]


def divided(value: object, separator: str | None = None) -> list[Label]:
    """What a column has for an image as the list of its classes; of nothing, an empty one."""
    if isinstance(value, str):
        parts = [value] if separator is None else value.split(separator)
        return [part.strip() for part in parts if part.strip()]
    if hasattr(value, "__len__"):
        return list(value)
    if value is None or value != value:  # NaN stands for an empty field
        return []
    if int(value) != value:
        raise ValueError(f"{value} is no class: give whole numbers, or names.")
    return [int(value)]
