"""Files of a split that match patterns, such as `train/images/{name}.png`."""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command.settings import check_type
from ..configuration_vitp import check_keys

CASES = ("patient", "case")  # fields whose files must be in one split
FIELD = re.compile(r"\{(?P<field>\w+)(?::(?P<form>[^{}]+))?\}")
TRAINED_PART = 0.9  # part of the images that is trained on if a folder has no other split
# Settings of a split of files and their types.
SETTINGS = {
    "image": str | Sequence[str],
    **dict.fromkeys(("before", "after", "mask", "list", "cases"), str),
    "part": Sequence[float],
    "part_seed": int,
    "tile": Mapping[str, int],
    "foreground_only": bool,
}
# Keys of the mappings in `data`, of all tasks.
KEYS = {
    "columns": ("image", "before", "after", "mask", "label", "id", "boxes", "corners", "labels", "crowd", "difficult")
    + ("area", "masks"),
    "tile": ("size", "overlap"),
    "volumes": ("plane", "window", "percentiles", "num_proc"),
    "classes": ("name", "value", "color", "as"),
}


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
            a regular expression; `**/` matches any folders. Files with equal fields belong to the same sample. `image`
            may be a list of patterns, one per channel. `list` is a file relative to `root` with a sample in each line,
            given by its id, a field, a file name, or the path of its first image below `root`. `part` is a range in
            [0, 1) that selects samples (patients or cases, if the pattern has such a field) by a hash of their name,
            and `part_seed` selects others. `cases` is a JSON file relative to `root` with the case (such as a scene) of
            each sample by the path of its first image below `root`.
        name: name of the split, for errors.
        use_part: whether to apply `part`. If not, the caller does, when it knows the cases.

    Raises:
        ValueError: if files are missing; the message names them.
    """
    root = Path(root)
    patterns = image_patterns(settings, name)
    if "mask" in settings:
        patterns["mask"] = settings["mask"]
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
    if "list" in settings:
        keys = select_listed(keys, root, root / settings["list"], next(iter(found.values())))
    for key in keys:
        for role, files in found.items():
            if key not in files:
                other = next(files[key] for files in found.values() if key in files)
                expected = fill(patterns[role], dict(zip(order, key)))
                raise ValueError(f"{other} has no {role}: {root / expected} not found.")
    roles = [role for role in patterns if role != "mask"]
    cases = read_cases(root, settings, [found[roles[0]][key] for key in keys])
    samples = [
        FileSample(
            "/".join(key),
            dict(zip(order, key)) | case,
            tuple(found[role][key] for role in roles),
            found["mask"][key] if "mask" in found else None,
        )
        for key, case in zip(keys, cases)
    ]
    if use_part and "part" in settings:
        samples = [sample for sample in samples if in_part(sample.case, settings)]
    if not samples:
        raise ValueError(f"Split {name!r} has no sample left after `list` and `part`.")
    return samples


def image_patterns(settings: Mapping, name: str) -> dict[str, str]:
    """Return the patterns of a split's images by role, in the order of the images of a sample."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"Split {name!r}: expected a mapping with `image` and `mask`, got {str(settings)[:80]!r}.")
    unknown = sorted(map(str, set(settings) - SETTINGS.keys()))
    if unknown:
        raise ValueError(f"Split {name!r} has unknown settings {unknown}. Expected: {sorted(SETTINGS)}.")
    for key, value in settings.items():
        check_type(f"Split {name!r}: {key}", value, SETTINGS[key])
    check_keys(f"Split {name!r}: tile", settings.get("tile"), KEYS["tile"], "tiles")
    if "tile" in settings and len(settings["tile"]) < len(KEYS["tile"]):
        raise ValueError(f"Split {name!r}: expected `tile` with size and overlap, got {settings['tile']}.")
    if "image" in settings and not {"before", "after"} & set(settings):
        images = settings["image"]
        if isinstance(images, str):
            return {"image": images}
        return {f"image {index}": pattern for index, pattern in enumerate(images)}
    if "image" not in settings and {"before", "after"} <= set(settings):
        return {"before": settings["before"], "after": settings["after"]}
    raise ValueError(f"Split {name!r} needs either `image`, or `before` and `after`.")


def match_files(root: Path, pattern: str, fields: list[str]) -> dict[tuple[str, ...], Path]:
    """Return the files that match a pattern, by the values of `fields`."""
    expression, seen, end = "", set(), 0
    for match in FIELD.finditer(pattern):
        name, form = match["field"], match["form"] or "[^/]+?"
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
    for file in sorted(glob.glob(FIELD.sub("*", pattern), root_dir=root, recursive=True)):
        match = expression.fullmatch(Path(file).as_posix())
        if match and not file.endswith(".aux.xml"):  # GDAL writes such files beside images
            key = tuple(match[field] for field in fields)
            if key in files:
                raise ValueError(f"{files[key]} and {root / file} match {pattern} with the same fields.")
            files[key] = root / file
    return files


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


def read_cases(root: Path, settings: Mapping, images: Sequence[Path]) -> list[dict[str, str]]:
    """Return the field `case` of images as the file `cases` of a split says, or no field without such a file."""
    if "cases" not in settings:
        return [{} for _ in images]
    path = root / settings["cases"]
    try:
        cases = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"The cases {path} cannot be read as JSON: {error}") from error
    check_type(f"cases in {path}", cases, Mapping[str, str])
    names = [image.relative_to(root).as_posix() for image in images]
    missing = next((name for name in names if name not in cases), None)
    if missing is not None:
        raise ValueError(f"No case for {missing!r} in {path}. Add it.")
    return [{"case": cases[name]} for name in names]


def in_part(case: str, settings: Mapping) -> bool:
    """Return whether a hash of a case's name and the `part_seed` of a split, scaled to [0, 1), is in its `part`."""
    part, seed = settings["part"], settings.get("part_seed")
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"Expected `part` to be the two ends of a range in [0, 1], got {list(part)}.")
    return part[0] <= hashed_position(case if seed is None else f"{seed}/{case}") < part[1]


def hashed_position(case: str) -> float:
    """Return a hash of a case's name, scaled to [0, 1)."""
    return int.from_bytes(hashlib.sha256(case.encode()).digest()[:6], "big") / 2**48


def hold_out(settings: Mapping[str, Any], cases: Iterable[str]) -> dict[str, dict]:
    """Return the splits `train` and `test` of data without splits: a tenth of the cases, or at least one, is `test`."""
    positions = sorted(map(hashed_position, cases))
    start = TRAINED_PART if positions[0] < TRAINED_PART <= positions[-1] else positions[-1]
    return {"train": {**settings, "part": [0.0, start]}, "test": {**settings, "part": [start, 1.0]}}
