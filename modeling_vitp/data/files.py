"""Files of a split that match patterns, such as `train/images/{name}.png`."""

import glob
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..command.settings import NonNegativeInt, PositiveInt, Probability, check_value, from_mapping
from .annotation_files import read_annotation, read_text
from .folders import check_folder

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
        start, end = self.part
        seeded_case = case if self.part_seed is None else f"{self.part_seed}/{case}"
        return start <= hashed_position(seeded_case) < end

    def read_cases(self, root: Path, images: Sequence[Path]) -> Sequence[dict[str, str]]:
        """Return the field `case` of images as `cases` says, or no field without such a file.

        Raises:
            ValueError: if the file cannot be read, or lacks an image.
        """
        if self.cases is None:
            return [{} for _ in images]
        path = root / self.cases
        cases = read_annotation(path)
        check_value(f"cases in {path}", cases, Mapping[str, str])
        fields_of_images = []
        for image in images:
            name = image.relative_to(root).as_posix()
            if name not in cases:
                raise ValueError(f"No case for {name!r} in {path}. Add it.")
            fields_of_images.append({"case": cases[name]})
        return fields_of_images


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
        has_image = bool(self.image)
        has_before = self.before is not None
        has_after = self.after is not None
        if (has_image, has_before, has_after) not in ((True, False, False), (False, True, True)):
            raise ValueError("Expected a pattern of the images: either `image`, or `before` and `after`.")

    @property
    def images(self) -> dict[str, str]:
        """Patterns of the images by role, in the order of the images of a sample."""
        if not self.image:
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
        for name in CASES:
            if name in self.fields:
                return self.fields[name]
        return self.id


def find_samples(
    root: str | Path,
    settings: Mapping,
    name: str,
    use_part: bool = True,
) -> list[FileSample]:
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
    check_folder(root)
    first_role = next(iter(patterns))
    field_names = list(dict.fromkeys(fields_of(patterns[first_role])))
    for role, pattern in patterns.items():
        if not field_names or set(fields_of(pattern)) != set(field_names):
            raise ValueError(
                f"Split {name!r}: pattern {pattern!r} of {role} needs the fields {field_names or ['name']}."
            )
    files_of_roles = {}
    all_keys = set()
    for role, pattern in patterns.items():
        files = match_files(root, pattern, field_names)
        if not files:
            short_pattern = FIELD.sub(r"{\g<field>}", pattern)
            entries = sorted(path.name for path in root.iterdir())
            found = ", ".join(entries[:5]) + (" …" if len(entries) > 5 else "")
            raise ValueError(
                f"Split {name!r} has no {role}: no file matches {root / short_pattern}. Found in {root}: "
                f"{found or 'nothing'}."
            )
        files_of_roles[role] = files
        all_keys.update(files)
    keys = sorted(all_keys)
    if split.list is not None:
        keys = select_listed(keys, root, root / split.list, files_of_roles[first_role])
    samples = complete_samples(keys, field_names, patterns, files_of_roles, root)
    cases = split.read_cases(root, [sample.images[0] for sample in samples])
    selected_samples = []
    for sample, case in zip(samples, cases):
        sample = replace(sample, fields={**sample.fields, **case})
        if not use_part or split.has_case(sample.case):
            selected_samples.append(sample)
    if not selected_samples:
        raise ValueError(f"Split {name!r} has no sample left after `list` and `part`.")
    return selected_samples


def complete_samples(
    keys: Sequence[tuple[str, ...]],
    field_names: Sequence[str],
    patterns: Mapping[str, str],
    files_of_roles: Mapping[str, Mapping[tuple[str, ...], Path]],
    root: Path,
) -> list[FileSample]:
    """Return the sample of each key. Raise a `ValueError` if a sample lacks a file of a role."""
    samples = []
    for key in keys:
        fields = dict(zip(field_names, key))
        paths = {}
        missing_role = None
        for role, files in files_of_roles.items():
            if key in files:
                paths[role] = files[key]
            elif missing_role is None:
                missing_role = role
        if missing_role is not None:
            present_file = next(iter(paths.values()))
            missing_file = root / fill(patterns[missing_role], fields)
            raise ValueError(f"{present_file} has no {missing_role}: {missing_file} not found.")
        mask = paths.pop("mask", None)
        samples.append(FileSample("/".join(key), fields, tuple(paths.values()), mask))
    return samples


def read_split(settings: Mapping, name: str) -> PatternSplit:
    """Return the settings of a split of files; `name` is the name of the split in errors."""
    return from_mapping(PatternSplit, settings, f"Split {name!r}")


def match_files(root: Path, pattern: str, fields: list[str]) -> dict[tuple[str, ...], Path]:
    """Return the files that match a pattern, by the values of `fields`."""
    expression = expression_of(pattern)
    glob_pattern = FIELD.sub(glob_of, pattern)
    files = {}
    for name in sorted(glob.glob(glob_pattern, root_dir=root, recursive=True)):
        match = expression.fullmatch(Path(name).as_posix())
        # GDAL writes files .aux.xml beside images.
        if match is None or name.endswith(".aux.xml"):
            continue
        key = tuple(match[field] for field in fields)
        if key in files:
            raise ValueError(f"{files[key]} and {root / name} match {pattern} with the same fields.")
        files[key] = root / name
    return files


def expression_of(pattern: str) -> re.Pattern:
    """Return the regular expression of a pattern, with a group for each field."""
    expression = ""
    field_names = set()
    end = 0
    for match in FIELD.finditer(pattern):
        name = match["field"]
        form = match["form"] or "[^/]+?"
        if form.startswith(ANY_FOLDERS):
            form = literal(ANY_FOLDERS) + form.removeprefix(ANY_FOLDERS)
        expression += literal(pattern[end : match.start()])
        if name in field_names:  # A field that is repeated has the same value everywhere.
            expression += f"(?P={name})"
        else:
            expression += f"(?P<{name}>{form})"
        field_names.add(name)
        end = match.end()
    expression += literal(pattern[end:])
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"Pattern {pattern!r} has an invalid regular expression: {error}.") from error


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


def select_listed(
    keys: list[tuple],
    root: Path,
    path: Path,
    files: Mapping[tuple, Path],
) -> list[tuple]:
    """Return the samples listed in a file: by the path of their first file below the root, id, a field or its name."""
    names = read_list_of_names(path)
    keys_of_paths = {}
    for key, file in files.items():
        keys_of_paths[file.relative_to(root).as_posix()] = [key]
    keys_of_names = defaultdict(list)
    keys_of_stems = defaultdict(list)
    for key in keys:
        for name in {"/".join(key), *key}:
            keys_of_names[name].append(key)
        if key in files:
            keys_of_stems[files[key].stem].append(key)
    selected_keys = set()
    for name in names:
        stem = Path(name).stem
        matching_keys = (
            keys_of_paths.get(name) or keys_of_names.get(name) or keys_of_names.get(stem) or keys_of_stems.get(stem, [])
        )
        if len(matching_keys) != 1:
            raise ValueError(f"{path}: {name!r} must match 1 sample, but matches {len(matching_keys)}.")
        selected_keys.update(matching_keys)
    return sorted(selected_keys)


def read_list_of_names(path: Path) -> list[str]:
    """Return the nonempty lines of a list, without space around them."""
    names = []
    for line in read_text(path).splitlines():
        name = line.strip()
        if name:
            names.append(name)
    return names


def hashed_position(case: str) -> float:
    """Return a hash of a case's name, scaled to [0, 1)."""
    digest = hashlib.sha256(case.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hold_out(settings: Mapping[str, Any], cases: Iterable[str]) -> dict[str, dict]:
    """Return the splits `train` and `test` of data without splits: a tenth of the cases, or at least one, is `test`."""
    positions = sorted(hashed_position(case) for case in cases)
    first_position = positions[0]
    last_position = positions[-1]
    has_both_splits = first_position < TRAINED_PART <= last_position
    start = TRAINED_PART if has_both_splits else last_position
    return {
        "train": {**settings, "part": [0.0, start]},
        "test": {**settings, "part": [start, 1.0]},
    }
