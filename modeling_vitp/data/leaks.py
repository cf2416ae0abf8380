"""Checks that two splits share no image, patient or case."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, ReadInstruction
from tqdm.auto import tqdm

from ..images.reading import content_digest, identity, packed_key, patient_of, read_picture
from ..images.volumes import files_of
from .files import CASES, FileSample
from .layouts import Layout
from .rows import cases_of_rows, content_of

PIECE = 1 << 16  # bytes compared at the beginning, middle and end of files before whole files are compared


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


def check_case_splits(layout: Layout, chosen: dict[str, tuple[Path, ...]], held_out: set[Path]) -> None:
    """Raise a `ValueError` that names a case with both chosen and held-out images."""
    known = {layout.case(path): path for path in sorted(held_out) if path.exists()}
    known.pop(None, None)
    for path in (path for paths in chosen.values() for path in paths if known and path not in held_out):
        case = layout.case(path) if path.exists() else None
        if case in known:
            raise ValueError(
                f"{case} is in two splits: {path} is used, and {known[case]} is held out. A case must be in one split "
                "only. Select the images with --split_list, or rename them if they are different cases."
            )


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """Return the chosen images without copies of held-out files, and the pairs of identical files."""
    known = {file_digest(path): path for path in tqdm(sorted(held_out), desc="held-out images")}
    known.pop(None, None)
    kept, copies = {}, []
    for image_id, paths in tqdm(chosen.items(), desc="images"):
        found = [(path, known[digest]) for path in paths if known and (digest := file_digest(path)) in known]
        copies += found
        if not found:
            kept[image_id] = paths
    return kept, copies


def file_digest(path: Path) -> bytes | None:
    """Return the digest of a file, or `None` if it cannot be read, which is reported with its annotation."""
    try:
        return content_digest(path) if path.exists() else None
    except (OSError, EOFError, zlib.error):
        return None


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
