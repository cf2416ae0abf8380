"""Files of a split that match patterns, such as `train/images/{name}.png`."""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command.settings import NonNegativeInt, PositiveInt, Probability, check_value, from_mapping

CASES = ("patient", "case")  # fields whose files must be in one split
FIELD = re.compile(r"\{(?P<field>\w+)(?::(?P<form>[^{}]+))?\}")
ANY_FOLDERS = "**/"  # in a pattern, or at the beginning of the regular expression of a field
TRAINED_PART = 0.9  # part of the images that is trained on if a folder has no other split


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """Settings that select the files of a split.

    Args:
        list: file with the names of the images of the split, relative to the root of the data set.
        cases: JSON file with the case (such as a scene) of each image by its path below the root.
        part: range in [0, 1] that selects images by a hash of their name, or of their patient or case.
        part_seed: seed of the hash.
    """

    list: str | None = None
    cases: str | None = None
    part: tuple[Probability, Probability] | None = None
    part_seed: int | None = None

    def __post_init__(self):
        if self.part is not None and self.part[0] >= self.part[1]:
            raise ValueError(f"Expected part to be the two ends of a range, got {self.part}.")

    def has_case(self, case: str) -> bool:
        """Return whether an image of a case is in `part`."""
        if self.part is None:
            return True
        position = hashed_position(case if self.part_seed is None else f"{self.part_seed}/{case}")
        return self.part[0] <= position < self.part[1]

    def read_cases(self, root: Path, images: Sequence[Path]) -> Sequence[dict[str, str]]:
        """Return the field `case` of images as `cases` says, or no field without such a file.

        Raises:
            ValueError: if the file cannot be read, or lacks an image.
        """
        if self.cases is None:
            return [{} for _ in images]
        path = root / self.cases
        try:
            cases = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"The cases {path} cannot be read as JSON: {error}") from error
        check_value(f"cases in {path}", cases, Mapping[str, str])
        names = [image.relative_to(root).as_posix() for image in images]
        missing = next((name for name in names if name not in cases), None)
        if missing is not None:
            raise ValueError(f"No case for {missing!r} in {path}. Add it.")
        return [{"case": cases[name]} for name in names]


@dataclass(frozen=True)
class TileSettings:
    """Square windows that images are cut into.

    Args:
        size: side in pixels.
        overlap: overlap in pixels.
    """

    size: PositiveInt
    overlap: NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class PatternSplit(SplitFiles):
    """Settings of a split of files that match patterns, see [`find_samples`]."""

    image: str | Sequence[str] | None = None
    before: str | None = None
    after: str | None = None
    mask: str | None = None
    tile: TileSettings | None = None
    foreground_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        is_pair = self.before is not None and self.after is not None
        has_one = self.before is not None or self.after is not None
        if (self.image is None) != is_pair or (self.image is not None and has_one):
            raise ValueError("Expected either `image`, or `before` and `after`.")

    @property
    def images(self) -> dict[str, str]:
        """Patterns of the images by role, in the order of the images of a sample."""
        if self.image is None:
            return {"before": self.before, "after": self.after}
        if isinstance(self.image, str):
            return {"image": self.image}
        return {f"image {index}": pattern for index, pattern in enumerate(self.image)}


@dataclass(frozen=True)
class FileSample:
    """Files of a sample.

    Args:
        id: values of the pattern's fields, joined by slashes.
        fields: values by field name.
        images: one file, the two files of a pair (before, after), or one file per channel of a volume.
        mask: file of the mask, or `None` in splits without masks.
    """

    id: str
    fields: Mapping[str, str]
    images: tuple[Path, ...]
    mask: Path | None

    @property
    def case(self) -> str:
        """Patient or case of the sample, which must be in one split only; the id without such a field."""
        return next((self.fields[name] for name in CASES if name in self.fields), self.id)


def find_samples(root: str | Path, settings: Mapping, name: str, use_part: bool = True) -> list[FileSample]:
    """Find the samples of a split, in the order of their ids.

    Args:
        root: folder of the data set.
        settings: `image` (or `before` and `after`) and optionally `mask` are patterns relative to `root`, like
            `Train/{area}/images_png/{name}.png`. A field matches a part of a name; `{patient:0[0-4].*}` is a field with
            a regular expression; `**/` matches any folders, and `{path:**/.+}` is a field with the folders and the
            name. Files with equal fields belong to the same sample. `image` may be a list of patterns, one per channel.
            `list` is a file relative to `root` with a sample in each line, given by its id, a field, a file name, or
            the path of its first image below `root`. `part` is a range in [0, 1) that selects samples (patients or
            cases, if the pattern has such a field) by a hash of their name, and `part_seed` selects others. `cases` is
            a JSON file relative to `root` with the case (such as a scene) of each sample by the path of its first image
            below `root`.
        name: name of the split, for errors.
        use_part: whether to apply `part`. If not, the caller does, when it knows the cases.

    Raises:
        ValueError: if files are missing; the message names them.
    """
    root = Path(root)
    split = read_split(settings, name)
    patterns = split.images
    if split.mask is not None:
        patterns["mask"] = split.mask
    if not root.is_dir():
        raise ValueError(f"Folder {root} of the data set not found.")
    order = list(dict.fromkeys(fields_of(next(iter(patterns.values())))))
    for role, pattern in patterns.items():
        if not order or set(fields_of(pattern)) != set(order):
            raise ValueError(f"Split {name!r}: pattern {pattern!r} of {role} needs the fields {order or ['name']}.")
    found = {role: match_files(root, pattern, order) for role, pattern in patterns.items()}
    for role, files in found.items():
        if not files:
            pattern = FIELD.sub(r"{\g<field>}", patterns[role])
            raise ValueError(f"Split {name!r} has no {role}: no file matches {root / pattern}.")
    keys = sorted(set().union(*found.values()))
    if split.list is not None:
        keys = select_listed(keys, root, root / split.list, next(iter(found.values())))
    for key in keys:
        for role, files in found.items():
            if key not in files:
                other = next(files[key] for files in found.values() if key in files)
                expected = fill(patterns[role], dict(zip(order, key)))
                raise ValueError(f"{other} has no {role}: {root / expected} not found.")
    roles = [role for role in patterns if role != "mask"]
    cases = split.read_cases(root, [found[roles[0]][key] for key in keys])
    samples = [
        FileSample(
            "/".join(key),
            dict(zip(order, key)) | case,
            tuple(found[role][key] for role in roles),
            found["mask"][key] if "mask" in found else None,
        )
        for key, case in zip(keys, cases)
    ]
    if use_part:
        samples = [sample for sample in samples if split.has_case(sample.case)]
    if not samples:
        raise ValueError(f"Split {name!r} has no sample left after `list` and `part`.")
    return samples


def read_split(settings: Mapping, name: str) -> PatternSplit:
    """Return the settings of a split of files; `name` is the name of the split in errors."""
    return from_mapping(PatternSplit, settings, f"Split {name!r}")


def match_files(root: Path, pattern: str, fields: list[str]) -> dict[tuple[str, ...], Path]:
    """Return the files that match a pattern, by the values of `fields`."""
    expression, seen, end = "", set(), 0
    for match in FIELD.finditer(pattern):
        name, form = match["field"], match["form"] or "[^/]+?"
        if form.startswith(ANY_FOLDERS):
            form = literal(ANY_FOLDERS) + form.removeprefix(ANY_FOLDERS)
        expression += literal(pattern[end : match.start()]) + (
            f"(?P={name})" if name in seen else f"(?P<{name}>{form})"
        )
        seen.add(name)
        end = match.end()
    expression += literal(pattern[end:])
    try:
        expression = re.compile(expression)
    except re.error as error:
        raise ValueError(f"Pattern {pattern!r} has an invalid regular expression: {error}.") from error
    files = {}
    for file in sorted(glob.glob(FIELD.sub(glob_of, pattern), root_dir=root, recursive=True)):
        match = expression.fullmatch(Path(file).as_posix())
        if match and not file.endswith(".aux.xml"):  # GDAL writes such files beside images
            key = tuple(match[field] for field in fields)
            if key in files:
                raise ValueError(f"{files[key]} and {root / file} match {pattern} with the same fields.")
            files[key] = root / file
    return files


def glob_of(field: re.Match) -> str:
    """Return the glob pattern of a field."""
    has_folders = (field["form"] or "").startswith(ANY_FOLDERS)
    return f"{ANY_FOLDERS}*" if has_folders else "*"


def literal(text: str) -> str:
    """Return the text between the fields of a pattern as a regular expression."""
    return re.escape(text).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")


def fields_of(pattern: str) -> list[str]:
    return [match["field"] for match in FIELD.finditer(pattern)]


def fill(pattern: str, fields: Mapping[str, str]) -> str:
    """Return the file name of a pattern with the given field values."""
    return FIELD.sub(lambda match: fields[match["field"]], pattern)


def select_listed(keys: list[tuple], root: Path, path: Path, files: Mapping[tuple, Path]) -> list[tuple]:
    """Return the samples listed in a file: by the path of their first file below the root, id, a field or its name."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"The list {path} cannot be read: {error}") from error
    by_path = {file.relative_to(root).as_posix(): [key] for key, file in files.items()}
    by_name, by_file = {}, {}
    for key in keys:
        for name in {"/".join(key), *key}:
            by_name.setdefault(name, []).append(key)
        if key in files:
            by_file.setdefault(files[key].stem, []).append(key)
    chosen = []
    for name in names:
        stem = Path(name).stem
        matches = by_path.get(name) or by_name.get(name) or by_name.get(stem) or by_file.get(stem) or []
        if len(matches) != 1:
            raise ValueError(f"{path}: {name!r} must match 1 sample, but matches {len(matches)}.")
        chosen += matches
    return sorted(set(chosen))


def hashed_position(case: str) -> float:
    """Return a hash of a case's name, scaled to [0, 1)."""
    return int.from_bytes(hashlib.sha256(case.encode()).digest()[:6], "big") / 2**48


def hold_out(settings: Mapping[str, Any], cases: Iterable[str]) -> dict[str, dict]:
    """Return the splits `train` and `test` of data without splits: a tenth of the cases, or at least one, is `test`."""
    positions = sorted(map(hashed_position, cases))
    start = TRAINED_PART if positions[0] < TRAINED_PART <= positions[-1] else positions[-1]
    return {"train": {**settings, "part": [0.0, start]}, "test": {**settings, "part": [start, 1.0]}}
