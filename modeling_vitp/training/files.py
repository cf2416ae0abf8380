"""Which files make a sample: patterns with named fields, matched over the images, masks and pairs of a data set."""

import glob
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..images.reading import identity, patient_of
from .values import check_type

CASES = ("patient", "case")  # fields by which files belong together
FIELD = re.compile(r"\{(?P<field>\w+)(?::(?P<form>[^{}]+))?\}")
# Settings of a split of files, and their types.
SETTINGS = {
    "image": str | Sequence[str],
    **dict.fromkeys(("before", "after", "mask", "list"), str),
    "part": Sequence[float],
    "tile": Mapping[str, int],
    "foreground_only": bool,
}


@dataclass(frozen=True)
class FileSample:
    """The files of a sample.

    Args:
        id: the values of the pattern's fields, joined by slashes.
        fields: the values by name.
        images: one file, the two of a pair (before, after), or one for each channel of a volume.
        mask: `None` where there is none, as in a test split.
    """

    id: str
    fields: Mapping[str, str]
    images: tuple[Path, ...]
    mask: Path | None

    @property
    def case(self) -> str:
        """What belongs together and may not be divided between splits: the patient or the case, if that is a field."""
        return next((self.fields[name] for name in CASES if name in self.fields), self.id)


def find_samples(root: str | Path, settings: Mapping, name: str) -> list[FileSample]:
    """The samples of a split, in the order of their ids.

    Args:
        root: folder of the data set.
        settings: `image` (or `before` and `after`), and `mask` unless there is none: patterns below `root`, like
            `Train/{area}/images_png/{name}.png`. A field stands for a part of a name, or as `{patient:0[0-4].*}` for
            one that a regular expression describes; `**/` for any folders. Files with the same fields belong together.
            `image` may be a list of patterns, one for each channel. `list` is a file below `root` that names a sample
            in each line, by its id, by a field or by a file's name; `part` a range in [0, 1) of the samples (of the
            patients or cases if there is a field of that name), by a hash of their name.
        name: of the split, for errors.

    Raises:
        ValueError: if files are missing, by name.
    """
    root = Path(root)
    patterns = image_patterns(settings, name)
    if "mask" in settings:
        patterns["mask"] = settings["mask"]
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}, where the data set is expected.")
    order = list(dict.fromkeys(fields_of(next(iter(patterns.values())))))
    for role, pattern in patterns.items():
        if not order or set(fields_of(pattern)) != set(order):
            raise ValueError(f"Split {name!r}: the pattern {pattern!r} of {role} needs the fields {order or ['name']}.")
    found = {role: match_files(root, pattern, order) for role, pattern in patterns.items()}
    for role, files in found.items():
        if not files:
            pattern = FIELD.sub(r"{\g<field>}", patterns[role])
            raise ValueError(f"Split {name!r} has no {role}: no file is like {root / pattern}.")
    keys = sorted(set().union(*found.values()))
    if "list" in settings:
        keys = listed(keys, root / settings["list"], next(iter(found.values())))
    for key in keys:
        for role, files in found.items():
            if key not in files:
                other = next(files[key] for files in found.values() if key in files)
                expected = fill(patterns[role], dict(zip(order, key)))
                raise ValueError(f"{other} has no {role}: there is no {root / expected}.")
    roles = [role for role in patterns if role != "mask"]
    samples = [
        FileSample(
            "/".join(key),
            dict(zip(order, key)),
            tuple(found[role][key] for role in roles),
            found["mask"][key] if "mask" in found else None,
        )
        for key in keys
    ]
    if "part" in settings:
        samples = [sample for sample in samples if in_part(sample.case, *settings["part"])]
    if not samples:
        raise ValueError(f"Split {name!r} has no sample left after `list` and `part`.")
    return samples


def image_patterns(settings: Mapping, name: str) -> dict[str, str]:
    """The patterns of a split's images by role, in the order of a sample's images."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"Split {name!r} is {str(settings)[:80]!r}: of files it is a mapping with `image` and `mask`.")
    unknown = sorted(map(str, set(settings) - SETTINGS.keys()))
    if unknown:
        raise ValueError(f"Split {name!r} has unknown settings {unknown}; there are {sorted(SETTINGS)}.")
    for key, value in settings.items():
        check_type(f"Split {name!r}: {key}", value, SETTINGS[key])
    if "image" in settings and not {"before", "after"} & set(settings):
        images = settings["image"]
        if isinstance(images, str):
            return {"image": images}
        return {f"image {index}": pattern for index, pattern in enumerate(images)}
    if "image" not in settings and {"before", "after"} <= set(settings):
        return {"before": settings["before"], "after": settings["after"]}
    raise ValueError(f"Split {name!r} needs either `image`, or `before` and `after`.")


def match_files(root: Path, pattern: str, fields: list[str]) -> dict[tuple[str, ...], Path]:
    """The values of a pattern's fields, in the order given -> the file that has them."""
    expression, seen, end = "", set(), 0
    for match in FIELD.finditer(pattern):
        name, form = match["field"], match["form"] or "[^/]+?"
        expression += literal(pattern[end : match.start()]) + (
            f"(?P={name})" if name in seen else f"(?P<{name}>{form})"
        )
        seen.add(name)
        end = match.end()
    expression += literal(pattern[end:])
    files = {}
    for file in sorted(glob.glob(FIELD.sub("*", pattern), root_dir=root, recursive=True)):
        match = re.fullmatch(expression, Path(file).as_posix())
        if match and not file.endswith(".aux.xml"):  # which GDAL writes beside an image
            key = tuple(match[field] for field in fields)
            if key in files:
                raise ValueError(f"{files[key]} and {root / file} are both {pattern} with the same fields.")
            files[key] = root / file
    return files


def literal(text: str) -> str:
    """What a pattern has between its fields, as a regular expression."""
    return re.escape(text).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")


def fields_of(pattern: str) -> list[str]:
    return [match["field"] for match in FIELD.finditer(pattern)]


def fill(pattern: str, fields: Mapping[str, str]) -> str:
    """The file that a pattern stands for."""
    return FIELD.sub(lambda match: fields[match["field"]], pattern)


def listed(keys: list[tuple], path: Path, files: Mapping[tuple, Path]) -> list[tuple]:
    """The samples that a file lists, by id, by the value of a field, or by the name of their first file."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"The list {path} cannot be read: {error}") from error
    by_name, by_file = {}, {}
    for key in keys:
        for name in {"/".join(key), *key}:
            by_name.setdefault(name, []).append(key)
        if key in files:
            by_file.setdefault(files[key].stem, []).append(key)
    chosen = []
    for name in names:
        stem = Path(name).stem
        matches = by_name.get(name) or by_name.get(stem) or by_file.get(stem) or []
        if len(matches) != 1:
            raise ValueError(f"{path}: {name!r} is the name of {len(matches)} samples, and not of one.")
        chosen += matches
    return sorted(set(chosen))


def in_part(case: str, first: float, last: float) -> bool:
    """Whether a case is in a range of [0, 1), where a hash of its name has given it a place."""
    place = int.from_bytes(hashlib.sha256(case.encode()).digest()[:6], "big") / 2**48
    return first <= place < last


def check_disjoint(splits: Mapping[str, list[FileSample]]) -> None:
    """Raises a `ValueError` if a file, under whatever names, or a patient or case, is in two of the splits."""
    owners = {}
    for name, samples in splits.items():
        for sample in samples:
            things = [(f"{field} {sample.fields[field]}",) * 2 for field in CASES if field in sample.fields]
            for thing, shown in [*things, *((identity(path), str(path)) for path in sample.images)]:
                owner, first = owners.setdefault(thing, (name, shown))
                if owner != name:
                    also = "" if first == shown else f", as {first} in {owner!r}"
                    raise ValueError(f"{shown} is in both splits {owner!r} and {name!r}{also}.")


def check_patients(splits: Mapping[str, list[FileSample]]) -> None:
    """Raises a `ValueError` that names the patient, by the tags of DICOM, of whom there are images in two splits."""
    owners = {}
    for name, samples in splits.items():
        for path in (path for sample in samples for path in sample.images):
            patient = patient_of(path)
            owner, first = owners.setdefault(patient, (name, path))
            if patient is not None and owner != name:
                raise ValueError(
                    f"{patient} is in both splits {owner!r}, as {first}, and {name!r}, as {path}: take the patient out "
                    "of one of the two, or, where the tag does not tell patients apart, set allow_shared_images in "
                    "`data`."
                )
