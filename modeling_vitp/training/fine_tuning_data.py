"""Data of fine-tuning: settings, files that match patterns, and checks that splits share no images."""

import glob
import gzip
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, Image, ReadInstruction, load_dataset
from torch.utils.data import ConcatDataset
from torchvision.transforms import v2

from ..cards.record import public_name
from ..configuration_vitp import check_keys
from ..hub.failures import retry
from ..images.reading import identity, packed_key, patient_of, read_picture
from ..images.volumes import files_of
from ..instructions.rows import content_of, undecoded
from ..instructions.sources import folder_cache
from .arguments import SplitArguments, check_type

logger = logging.getLogger(__name__)
CASES = ("patient", "case")  # fields whose files must be in one split
FIELD = re.compile(r"\{(?P<field>\w+)(?::(?P<form>[^{}]+))?\}")
TRAINED_PART = 0.9  # part of the images that is trained on if a folder has no other split
PIECE = 1 << 16  # bytes compared at the beginning, middle and end of files before whole files are compared
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


def check_disjoint(splits: Mapping[str, list[FileSample]]) -> None:
    """Raise a `ValueError` if two splits share a patient, a case, or a file, also under different names."""
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
    """Raise a `ValueError` if two splits have images of the same patient according to their DICOM tags."""
    owners = {}
    for name, samples in splits.items():
        for path in (path for sample in samples for path in sample.images):
            patient = patient_of(path)
            owner, first = owners.setdefault(patient, (name, path))
            if patient is not None and owner != name:
                raise ValueError(
                    f"{patient} is in both splits {owner!r}, as {first}, and {name!r}, as {path}: take the patient out "
                    "of one of them. If the tag does not identify patients, set allow_shared_images in `data`."
                )


@dataclass(frozen=True)
class StoredImage:
    """Encoded image of a split.

    Args:
        split: name of the split.
        name: name of the image in errors.
        size: size in bytes, or another number that is equal for equal images.
        open: function that opens the image as a binary file.
    """

    split: str
    name: str
    size: int
    open: Callable[[], BinaryIO]


def images_of_files(splits: Mapping[str, Iterable[FileSample]]) -> Iterator[StoredImage]:
    """Yield the files of splits, with each file of a series, and gzipped NIfTI as its unpacked content."""
    for split, samples in splits.items():
        for path in dict.fromkeys(path for sample in samples for path in sample.images):
            for file in files_of(path):
                unpack = gzip.open if file.name.lower().endswith(".nii.gz") else open
                yield StoredImage(
                    split, str(file), packed_key(file), lambda file=file, unpack=unpack: unpack(file, "rb")
                )


def images_of_rows(splits: Mapping[str, tuple[Dataset, Sequence[str]]]) -> Iterator[StoredImage]:
    """Yield the images of tables, reading only their sizes.

    Args:
        splits: rows with encoded images, and the names of their image columns, by split.
    """
    for split, (rows, columns) in splits.items():
        for column in columns:
            index = 0
            for part in rows.select_columns([column]).with_format("arrow").iter(1000):
                for size, path in sizes_and_paths(part.column(column)):

                    def open_row(rows=rows, column=column, index=index):
                        return io.BytesIO(content_of(rows[index][column]))

                    if size is not None or (path is not None and Path(path).is_file()):
                        size = Path(path).stat().st_size if size is None else size
                        yield StoredImage(split, f"row {index} ({column})", size, open_row)
                    index += 1


def sizes_and_paths(column: pa.ChunkedArray) -> Iterator[tuple[int | None, str | None]]:
    """Yield size and path of the encoded images in a column, nothing if it does not store encoded images."""
    for chunk in column.chunks:
        chunk = chunk.storage if isinstance(chunk.type, pa.BaseExtensionType) else chunk
        if not isinstance(chunk.type, pa.StructType) or {field.name for field in chunk.type} != {"bytes", "path"}:
            return
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes"))
        yield from zip(sizes.to_pylist(), pc.struct_field(chunk, "path").to_pylist())


def shared_images(images: Iterable[StoredImage]) -> Iterator[list[StoredImage]]:
    """Yield the images of several splits with identical bytes, as one list for each content.

    Images of one color are ignored, because empty tiles are equal in all splits. Sizes are compared first, then three
    pieces of files of equal size, and then whole files whose pieces are equal.
    """
    groups = [list(images)]
    for key in (lambda image: image.size, digest_of_pieces, digest_of_all):
        groups = [part for group in groups for part in divide(group, key) if len({image.split for image in part}) > 1]
    yield from (group for group in groups if not is_of_one_color(group[0]))


def check_no_shared_images(images: Iterable[StoredImage]) -> None:
    """Raise a `ValueError` that names both images if two splits have images with identical bytes."""
    for first, *others in shared_images(images):
        other = next(image for image in others if image.split != first.split)
        raise ValueError(
            f"{other.name} in split {other.split!r} is the same image as {first.name} in {first.split!r}: take it out "
            "of one of them. If these are the published splits, set allow_shared_images in `data`."
        )


def divide(images: Iterable[StoredImage], key: Callable[[StoredImage], Hashable]) -> list[list[StoredImage]]:
    parts: dict[Hashable, list[StoredImage]] = {}
    for image in images:
        parts.setdefault(key(image), []).append(image)
    return list(parts.values())


def digest_of_pieces(image: StoredImage) -> bytes:
    seen = hashlib.blake2b()
    with image.open() as file:
        size = file.seek(0, io.SEEK_END)
        for start in sorted({0, max(size // 2 - PIECE // 2, 0), max(size - PIECE, 0)}):
            file.seek(start)
            seen.update(file.read(PIECE))
    return seen.digest()


def digest_of_all(image: StoredImage) -> bytes:
    with image.open() as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def is_of_one_color(image: StoredImage) -> bool:
    with image.open() as file:
        content = file.read()
    try:
        pixels = np.asarray(read_picture(content))
    except Exception:  # a volume, or a broken file, which causes an error when it is read for training
        return False
    pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
    return bool((pixels == pixels[0]).all())


def parts_of(samples: torch.utils.data.Dataset) -> list[torch.utils.data.Dataset]:
    """Return the data sets that samples are concatenated from."""
    return list(samples.datasets) if isinstance(samples, ConcatDataset) else [samples]


@dataclass(kw_only=True)
class DataSettings:
    """Base of the setting `data` in fine-tuning configurations.

    A subclass implements `_open` and `check_disjoint`.

    Args:
        root: folder of files.
        dataset_name: Hub id or folder that `datasets.load_dataset` opens, instead of `root`.
        dataset_config: name of its configuration.
        splits: settings of each split by name.
        columns: names of the columns of rows.
        input_spec: input spec of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        allow_shared_images: whether shared images and shared DICOM patients of two splits are a warning instead of an
            error.

    Attributes:
        choices: allowed values of settings by name.
        infer_options: settings that [`infer`] takes.
    """

    choices: ClassVar[dict[str, Collection[str]]] = {}
    infer_options: ClassVar[tuple[str, ...]] = ()
    template: ClassVar[str] = ""  # shortest configuration, for errors

    root: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    splits: Mapping[str, Mapping | str] = field(default_factory=dict)
    columns: Mapping[str, str | Sequence[str]] | None = None
    input_spec: dict | None = None
    allow_shared_images: bool = False

    def __post_init__(self):
        if (self.root is None) == (self.dataset_name is None):
            raise ValueError("data: set either `root`, a folder of files, or `dataset_name`.")
        for name, known in self.choices.items():
            if getattr(self, name) not in (*known, None):
                raise ValueError(f"data: expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Create the settings from the `data` of a configuration.

        Raises:
            ValueError: if a setting is missing, unknown, or of the wrong type.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"data: expected a mapping of classes, splits and files, got {str(settings)[:80]!r}.")
        own = [item for item in fields(cls) if item.init]
        known, types = {item.name for item in own}, get_type_hints(cls)
        needed = {item.name for item in own if item.default is MISSING and item.default_factory is MISSING}
        missing, unknown = sorted(needed - set(settings)), sorted(map(str, set(settings) - known))
        if missing or unknown:
            raise ValueError(f"data: missing {missing}, unknown {unknown}. Expected: {sorted(known)}.")
        for name, value in settings.items():
            check_type(f"data: {name}", value, types[name])
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if name in KEYS and isinstance(part, Mapping):
                    check_keys(f"data: {name}", part, KEYS[name], name)
        return cls(**settings)

    @classmethod
    def from_arguments(cls, args: SplitArguments, output_dir: str) -> Self:
        """Create the settings from the arguments of a recipe.

        If `data` has a root without splits, they are inferred from the folder, see [`infer`], and the configuration is
        saved as `data.yaml` in the output folder. `val` and `test` are then scored by default.

        Raises:
            ValueError: if the folder is not recognized, or `data.yaml` exists with other content.
        """
        if "root" in args.data and "splits" not in args.data:
            check_type("data: root", args.data["root"], str)
            root = Path(args.data["root"])
            if not root.is_dir():
                raise ValueError(f"Folder {root} of the data set not found. Set `data_root`.")
            inferred = cls.infer(root, **{key: args.data[key] for key in cls.infer_options if key in args.data})
            args.data = inferred | args.data
            if args.has_default_splits:
                labeled = {name for name, files in inferred["splits"].items() if {"mask", "annotations"} & files.keys()}
                unused = labeled - {*args.train_splits}
                args.eval_split, args.test_split = (name if name in unused else None for name in ("val", "test"))
            if PartialState().is_main_process and not args.dry_run:
                scored = {"eval_split": args.eval_split, "test_split": args.test_split}
                configuration = {"data": args.data, **{key: name for key, name in scored.items() if name}}
                save_inferred(configuration, Path(output_dir) / "data.yaml")
        return cls.from_dict(args.data)

    @classmethod
    def infer(cls, root: Path) -> dict[str, Any]:
        """Return the settings of a folder in a standard layout.

        Raises:
            ValueError: if the layout is not recognized, or has invalid annotations.
        """
        raise NotImplementedError

    @classmethod
    def unknown_layout(cls, root: Path, expected: str) -> ValueError:
        """Return the error for a folder whose layout is not recognized."""
        return ValueError(
            f"Classes and splits cannot be inferred from {root}: expected {expected}. Describe the data in a YAML "
            f"file, and pass it as --config: {cls.template}"
        )

    def open(self, names: Sequence[str], *args: Any) -> torch.utils.data.Dataset:
        """Return the samples of one or several splits.

        Raises:
            ValueError: if `names` is empty, a split does not exist, or its data are invalid.
        """
        if not names:
            raise ValueError(f"Expected names of splits, got none. Found in the configuration: {sorted(self.splits)}.")
        parts = [self.open_split(name, *args) for name in names]
        return parts[0] if len(parts) == 1 else self._join(parts)

    def open_split(self, name: str, *args: Any) -> torch.utils.data.Dataset:
        try:
            return self._open(name, *args)
        except OSError as error:
            raise ValueError(f"Split {name!r} cannot be opened: {error}.") from error

    def _open(self, name: str, *args: Any) -> torch.utils.data.Dataset:
        raise NotImplementedError

    def _join(self, parts: list[torch.utils.data.Dataset]) -> torch.utils.data.Dataset:
        return ConcatDataset(parts)

    def load_rows(self, split: str) -> Dataset:
        """Return a split of `dataset_name`; if that is a folder, as its files are now, see [`folder_cache`]."""
        where, cache = (self.dataset_name, self.dataset_config), folder_cache(self.dataset_name)
        return retry(partial(load_dataset, *where, cache_dir=cache, split=split))

    def split_settings(self, name: str) -> Mapping | str:
        if name not in self.splits:
            raise ValueError(f"No split {name!r} in the configuration. Found: {sorted(self.splits)}.")
        return self.splits[name]

    def describe(
        self, train_splits: Sequence[str], eval_split: str | None, test_split: str | None
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Return descriptions of the training data and of the scored data for the record of the run.

        The field `data` of the second description can be passed to [`from_dict`].
        """
        name = public_name(self.dataset_name or self.root)
        is_on_hub = self.dataset_name is not None and not Path(self.dataset_name).exists()
        on_hub = {"dataset": self.dataset_name} if is_on_hub else {}
        trained_on = [{"name": name, "split": split, **on_hub} for split in train_splits]
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        settings = {key: value for key, value in settings.items() if value not in (None, {})}
        return trained_on, {"name": name, "eval": eval_split, "test": test_split, **on_hub, "data": settings}

    def check_files(self, samples: Mapping[str, list[FileSample]]) -> None:
        """Raise a `ValueError` if two splits share a file, a patient, a case or an image with identical bytes."""
        check_disjoint(samples)
        self.check_shared(check_patients, samples)
        self.check_shared(check_no_shared_images, images_of_files(samples))

    def check_rows(self, rows: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
        """Raise a `ValueError` if two splits share an image, see [`images_of_rows`]."""
        self.check_shared(check_no_shared_images, images_of_rows(rows))

    def check_splits(self, rows: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
        """Raise a `ValueError` if two splits share rows, a patient, a case or an image, see [`check_rows`]."""
        check_shared_rows({name: split for name, (split, _) in rows.items()})
        self.check_rows(rows)

    def check_shared(self, check: Callable[[Any], None], images: Any) -> None:
        """Run a check of shared images; with `allow_shared_images`, log its error as a warning."""
        try:
            check(images)
        except ValueError as error:
            if not self.allow_shared_images:
                raise
            logger.warning("%s", error)


def save_inferred(configuration: dict[str, Any], path: Path) -> None:
    """Save an inferred configuration and log a summary. Raise a `ValueError` if the file was edited."""
    text = yaml.safe_dump(configuration, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    if path.is_file() and path.read_text() != text:
        raise ValueError(f"{path} differs from what the data folder gives. Use it with --config, or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    data = configuration["data"]
    names = [entry["name"] if isinstance(entry, Mapping) else entry for entry in data["classes"]]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    found = [data["format"]] if "format" in data else []
    found += [f"splits {', '.join(data['splits'])}", f"{len(names)} classes: {shown}"]
    logger.info("Found in %s: %s.", data["root"], "; ".join(found))
    scored = [f"{key} {configuration[key]}" for key in ("eval_split", "test_split") if key in configuration]
    logger.info("Scored: %s.", ", ".join(scored) or "no split")
    for name, settings in data["splits"].items():
        if "part" in settings:
            share = settings["part"][1] - settings["part"][0]
            logger.info("Split %s has %.0f%% of the images, by a hash of their names.", name, 100 * share)
    logger.info("The configuration of the data is saved as %s. To change it, pass an edited copy as --config.", path)


def encoded_rows(rows: Dataset) -> Dataset:
    """Return rows whose images stay encoded, because `datasets` decodes 16-bit images and TIFF to 8 bits.

    `Dataset.cast` is not used, because it writes a copy of all images.
    """
    rows = rows.select_columns(rows.column_names)
    rows.info.features = undecoded(rows.features)
    return rows


def find_columns(
    known: Collection[str], usual: Mapping[str, Sequence[str]], settings: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Return the column of each role: that of the settings, or the first one with a usual name that exists.

    Args:
        known: names of the columns of the rows.
        usual: usual names of the column of each role.
        settings: column of some roles, or a list of columns.
        name: name of the split in errors.

    Raises:
        ValueError: if a role or a column of the settings does not exist.
    """
    unknown = sorted(settings.keys() - usual.keys())
    if unknown:
        raise ValueError(f"columns: unknown option(s) {unknown}. Options: {sorted(usual)}.")
    columns = {}
    for role, names in usual.items():
        chosen = settings.get(role)
        if chosen is None:
            found = [column for column in names if column in known]
            columns |= {role: found[0]} if found else {}
            continue
        for column in [chosen] if isinstance(chosen, str) else chosen:
            if column not in known:
                raise missing_column(known, column, name)
        columns[role] = chosen
    return columns


def missing_column(known: Collection[str], column: str, name: str) -> ValueError:
    """Return the error for a column that does not exist."""
    found = ", ".join(sorted(known))
    return ValueError(f"Split {name!r} has no column {column!r}. Found: {found}. Set `columns` in `data`.")


def check_image_columns(rows: Dataset, columns: Iterable[str], name: str) -> None:
    """Raise a `ValueError` if a column of the split `name` does not store images."""
    for column in columns:
        feature = rows.features.get(column)
        if not isinstance(feature, Image):
            raise ValueError(f"Split {name!r}: expected the column {column!r} to be an `Image` feature, got {feature}.")


def cases_of_rows(rows: Dataset) -> list[str] | None:
    """Return the patient or the case of each row, or `None` without such a column.

    A row whose patient is missing is a case of its own.
    """
    column = next((name for name in CASES if name in rows.column_names), None)
    if column is None:
        return None
    own = f"row {{}} of {rows.split}".format
    return [own(index) if case is None else str(case) for index, case in enumerate(rows[column])]


def check_shared_rows(splits: Mapping[str, Dataset]) -> None:
    """Raise a `ValueError` if two splits of a data set, such as "train[:80%]", share rows, a patient or a case."""
    ranges: list[tuple[str, str, int, int]] = []
    owners: dict[str, str] = {}
    for name, rows in splits.items():
        lengths = {split: info.num_examples for split, info in rows.info.splits.items()}
        for part in ReadInstruction.from_spec(str(rows.split)).to_absolute(lengths):
            start, end = part.from_ or 0, lengths[part.splitname] if part.to is None else part.to
            for other, whole, other_start, other_end in ranges:
                if other != name and whole == part.splitname and max(start, other_start) < min(end, other_end):
                    raise ValueError(f"Splits {other!r} and {name!r} share rows of {whole!r}.")
            ranges.append((name, part.splitname, start, end))
        for case in set(cases_of_rows(rows) or ()):
            if owners.setdefault(case, name) != name:
                raise ValueError(f"The case {case!r} is in both splits {owners[case]!r} and {name!r}.")


class BandJitter(v2.Transform):
    """Random change of brightness or contrast with an independent factor for each band.

    Values of bands are in [0, 1] before and after.

    Args:
        factors: lowest and highest factor of the uniform distribution.
        from_mean: whether to change contrast around the mean of a band instead of brightness.
    """

    def __init__(self, factors: tuple[float, float], from_mean: bool):
        super().__init__()
        self.factors, self.from_mean = factors, from_mean

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        base = inpt.mean((1, 2), keepdim=True) if self.from_mean else 0.0
        factors = torch.empty(len(inpt), 1, 1).uniform_(*self.factors)
        return (base + factors * (inpt - base)).clamp(0, 1)
